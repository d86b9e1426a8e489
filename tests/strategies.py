"""Random small networks and random kept sets, for Hypothesis and for plain random numbers alike.

A network is described by plain data (dicts, lists, strings, numbers), so a failure can be printed, stored and rebuilt.
One function per kind of block both chooses its numbers and builds the module: it asks a `Picker` for every choice by
name. A `Recorder` draws the answers and notes them, a `Replay` reads them from the description.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.blocks import BLOCKS, Description, HypothesisSource, RandomSource, Recorder, Replay, Shape, Source
from tests.networks import randomise

INPUTS: dict[str, Sequence[Shape]] = {
    "map": ((2, 3, 6, 6), (2, 4, 8, 8), (2, 3, 4, 4), (2, 3, 12), (2, 2, 4, 4, 4)),
    "tokens": ((2, 5, 6), (2, 9, 8)),
    "vector": ((2, 6), (3, 10)),
}
CONVERSIONS = {"to_vector": "vector", "to_tokens": "tokens", "tokens_to_vector": "vector"}
MAX_CHANNELS = 32
OUTPUTS = ("plain", "head", "head", "head", "tuple", "dict")


def _layout_of(description: Description) -> str:
    layout = description["layout"]
    for item in description["blocks"]:
        layout = CONVERSIONS.get(item["kind"], layout)
    return layout


class RandomNetwork(nn.Module):
    """The network of a description; float64, its weights drawn from the description's seed."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.blocks, self.outputs = nn.ModuleList(), description["outputs"]
        shape = tuple(description["input"])
        self.channel_dim = -1 if _layout_of(description) == "tokens" else 1
        # Default initialisation draws from the global random state, which building must not move.
        with torch.random.fork_rng(devices=[]):
            for item in description["blocks"]:
                module = BLOCKS[item["kind"]].build(Replay(item), shape)
                shape = _shape_after(module, shape)
                self.blocks.append(module)
            self.head = nn.Identity() if self.outputs == "plain" else nn.Linear(shape[self.channel_dim], 5)
        randomise(self.double().eval(), description["seed"])

    def forward(self, x: Tensor) -> Any:
        for module in self.blocks:
            x = module(x)
        if self.outputs == "plain":
            return x
        y = self.head(x.movedim(self.channel_dim, -1))
        if self.outputs == "tuple":
            return y, None, x[:, :1]
        return {"logits": y, "n_classes": 5} if self.outputs == "dict" else y


def _shape_after(module: nn.Module, shape: Shape) -> Shape:
    with torch.no_grad():
        device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
        return tuple(module.eval()(torch.zeros(shape, device=device)).shape)


def describe_network(source: Source) -> Description:
    """Draw the description of a network; `RandomNetwork` builds it."""
    layout = source.choice(["map", "map", "map", "map", "tokens", "vector"])
    shape = source.choice(list(INPUTS[layout]))
    may_mix = source.choice([False, True])
    description: Description = {
        "layout": layout,
        "input": list(shape),
        "seed": source.integer(0, 2**16),
        "outputs": source.choice(list(OUTPUTS)),
        "blocks": [],
    }
    for _ in range(source.integer(2, 7)):
        kinds = [
            b.kind
            for b in BLOCKS.values()
            if b.layout == layout and (may_mix or not b.is_mixing) and b.fits(shape)
            for _ in range(3 if b.is_mixing or b.kind in CONVERSIONS else 1)
        ]
        kind = _first_map_block(description, layout, source) or source.choice(kinds)
        recorder = Recorder(source)
        with torch.device("meta"):
            shape_after = _shape_after(BLOCKS[kind].build(recorder, shape), shape)
        if layout == "map" and shape_after[1] > MAX_CHANNELS:
            continue
        shape = shape_after
        description["blocks"].append({"kind": kind, **recorder.values})
        layout = CONVERSIONS.get(kind, layout)
    return description


def _first_map_block(description: Description, layout: str, source: Source) -> str | None:
    """Networks begin with a layer of weights, mostly: what follows the input directly can seldom be cut."""
    if description["blocks"] or source.integer(0, 4) == 0:
        return None
    return {"map": "conv", "tokens": "token_linear", "vector": "linear"}[layout]


def example_input(description: Description) -> Tensor:
    """A random input for the network of a description."""
    generator = torch.Generator().manual_seed(description["seed"] + 1)
    return torch.randn(tuple(description["input"]), generator=generator, dtype=torch.float64)


def has_mixing(description: Description) -> bool:
    """Whether a block computes a statistic over channels, so that zeroing channels is not cutting them."""
    return any(BLOCKS[item["kind"]].is_mixing for item in description["blocks"])


def random_description(seed: int) -> Description:
    """The description that a seed of `random.Random` gives."""
    return describe_network(RandomSource(random.Random(seed)))


@st.composite
def networks(draw: Callable[..., Any]) -> Description:
    """Hypothesis strategy for descriptions of networks."""
    return describe_network(HypothesisSource(draw))


def kept_sets(groups: Iterable[Any], seed: int) -> dict[str, np.ndarray]:
    """A random kept set for every prunable group: one unit at least is kept, every block of a group loses as many.

    Most groups lose something wherever they can; one in six keeps everything.
    """
    rng = np.random.default_rng(seed)
    kept = {}
    for group in groups:
        if not group.is_prunable:
            continue
        labels = np.zeros(group.width, dtype=int) if group.balance is None else np.asarray(group.balance)
        blocks = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        most = min(min(len(positions) for positions in blocks) - 1, group.max_cut // len(blocks))
        n_cut = 0 if most < 1 or rng.random() < 1 / 6 else int(rng.integers(1, most + 1))
        kept[group.name] = np.sort(np.concatenate([rng.permutation(p)[n_cut:] for p in blocks]))
    return kept
