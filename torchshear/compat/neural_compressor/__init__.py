"""Neural Compressor: its pruning of a model that trains, with its config, its hooks and its automatic form."""

from typing import TYPE_CHECKING

from torchshear._other_tools import answering
from torchshear.compat.neural_compressor._auto_slim import parse_auto_slim_config
from torchshear.compat.neural_compressor._config import WeightPruningConfig
from torchshear.compat.neural_compressor._manager import CompressionManager, prepare_compression
from torchshear.compat.neural_compressor._prepare_pruning import prepare_pruning

__all__ = [
    "CompressionManager",
    "WeightPruningConfig",
    "parse_auto_slim_config",
    "prepare_compression",
    "prepare_pruning",
]

if not TYPE_CHECKING:
    __getattr__ = answering(__name__)
