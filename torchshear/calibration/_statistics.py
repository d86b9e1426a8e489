"""Statistics of a network: sums over batches of data, from which criteria make scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from torchshear.calibration._taps import Tap
from torchshear.calibration._weight_calls import WeightCall

Sum = Literal[
    "zeros", "total", "magnitude", "squares",  # of activations: attributes of ValueSums
    "inputs",  # squares of what layers read
    "means",  # what layers read itself; of no criterion, but for what is folded into biases
    "grams",  # products of what layers read, each number with each other; for criteria that name them
    "taylor", "saliency", "momentum", "gradient",  # of gradients: attributes of WeightSums
    "output_gradients",  # squared gradients by what layers give; for criteria that name them
    "rows",  # RowSums
    "heads",  # gates on what layers read of attention heads
    "gates",  # GateSums
]  # fmt: skip
SUMS_OF_VALUES: frozenset[Sum] = frozenset({"zeros", "total", "magnitude", "squares"})
SUMS_OF_WEIGHTS: frozenset[Sum] = frozenset({"taylor", "saliency", "momentum", "gradient"})
SUMS_OF_GRADIENTS: frozenset[Sum] = SUMS_OF_WEIGHTS | {"rows", "heads", "gates"}  # those that need a loss
SUM_OF_MEANS: frozenset[Sum] = frozenset({"means"})
NAMED_SUMS: frozenset[Sum] = frozenset({"grams", "output_gradients"})  # cost much; taken only where asked for by name
ALL_SUMS: frozenset[Sum] = frozenset(get_args(Sum)) - SUM_OF_MEANS - NAMED_SUMS  # those of criteria
MAX_GRAM = 4608  # numbers of which products are summed at most: 170 MB
MOMENTUM = 0.9  # weight of what was seen before, in the criterion |W g| with momentum


@dataclass(frozen=True, slots=True, eq=False)
class ValueSums:
    """Sums over one dimension of a value; P = its number of positions. All float64, on the CPU.

    What was not asked for has shape (0,): `zeros` of groups without an activation that gives exact zeros, and all but
    `squares`, `total` and `grams` of values that no group shows in and that layers only read.

    Attributes:
        count: numbers seen at each position.
        zeros: how many of them were exactly zero, shape (P,).
        total: their sum, shape (P,).
        magnitude: sum of their absolute values, shape (P,).
        squares: sum of their squares, shape (P,).
        grams: sum of products of the numbers at a place and a one behind them, pair by pair, over some of all places of
            three in four samples; shape (P + 1, P + 1).
        held_out: the same over the fourth samples.
    """

    count: int
    zeros: Tensor
    total: Tensor
    magnitude: Tensor
    squares: Tensor
    grams: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    held_out: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))


@dataclass(frozen=True, slots=True, eq=False)
class WeightSums:
    """Sums over batches b for each number w of a parameter, g_b being the gradient of the loss of the batch.

    What was not asked for has shape (0,).

    Attributes:
        taylor: sum of (w g_b)^2; shape of the parameter, on its device; float32, or float64 like the parameter.
        saliency: sum of |w g_b|.
        momentum: S of the last batch, where S <- 0.9 S + |w g_b|.
        gradient: sum of |g_b|.
    """

    taylor: Tensor
    saliency: Tensor
    momentum: Tensor
    gradient: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowSums:
    """Sums over batches b for each row c of a layer, of r_b = sum of w g_b over the row's weights and its bias.

    Rows of all blocks one after another, where a dimension is blocked.

    Attributes:
        squares: sum of r_b^2, shape (rows,), float64, on the CPU.
        magnitude: sum of |r_b|.
    """

    squares: Tensor
    magnitude: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GateSums:
    """Gradients of the loss by a gate on each unit of a group, which multiplies what every layer of the group makes.

    Attributes:
        squares: sum over samples of the squared gradient, shape (C,), float64, on the CPU.
        batches: gradient of each batch, shape (C, n_batches), likewise.
    """

    squares: Tensor
    batches: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Statistics that `torchshear.collect` gives.

    Attributes:
        fingerprint: hash of the graph that was run.
        n_batches: number of batches, over all processes.
        n_samples: number of samples, over all processes.
        values: (node, dimension) -> sums of the value of that node; see `Tap.key`.
        weights: canonical name of a parameter -> its sums; empty if none was asked for or no loss was given.
        rows: (canonical name of a weight, dimension) -> sums of its rows along that dimension; likewise.
        gates: name of a group -> sums of its gates; likewise.
        heads: name of a group of attention heads -> sum over batches of |dL_b/dxi|, xi multiplying what the layers that
            read a head read of it; shape (C,), float64, on the CPU; likewise.
        taps: name of a group -> where its units show: behind its activations, or behind its layers if it has none.
        output_gradients: name of a call that layers of a group make -> squared gradient of the loss of a sample by each
            channel of what it gives, summed over positions, mean over samples; shape (O,), float64, on the CPU.
        layers: calls that read a weight.
        by_layer: canonical name of a weight -> where what its layer alone makes shows; see `GroupTaps`.
        sums: what was summed.
        loss: mean loss over batches; None if no gradients were taken.
        notes: remarks on how it was collected.
    """

    fingerprint: str
    n_batches: int
    n_samples: int
    values: Mapping[tuple[str, int], ValueSums]
    weights: Mapping[str, WeightSums]
    rows: Mapping[tuple[str, int], RowSums]
    gates: Mapping[str, GateSums]
    heads: Mapping[str, Tensor]
    taps: Mapping[str, tuple[Tap, ...]]
    layers: tuple[WeightCall, ...]
    by_layer: Mapping[str, tuple[Tap, ...]] = field(default_factory=dict)
    output_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    sums: frozenset[Sum] = ALL_SUMS
    loss: float | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        batches = f"{self.n_samples} samples in {self.n_batches} batches"
        return f"<Statistics of {batches}: {', '.join(sorted(self.sums))}>"
