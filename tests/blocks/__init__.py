"""Blocks of random networks, one function each; importing their files registers them."""

from tests.blocks import language, map_weights, maps, sequences
from tests.blocks._base import BLOCKS, Shape
from tests.blocks._choices import Description, HypothesisSource, RandomSource, Recorder, Replay, Source

__all__ = [
    "BLOCKS", "Description", "HypothesisSource", "RandomSource", "Recorder", "Replay", "Shape", "Source",
    "language", "map_weights", "maps", "sequences",
]  # fmt: skip
