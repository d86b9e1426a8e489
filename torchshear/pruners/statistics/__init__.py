"""Data run through a model, and what it shows of each unit: activations, gradients, gates."""

from torchshear.pruners.statistics._batches import batches_of
from torchshear.pruners.statistics._distributed import all_reduced
from torchshear.pruners.statistics._layers import Layer, find_layers
from torchshear.pruners.statistics._run import Loss, Run
from torchshear.pruners.statistics._statistics import (
    ALL_SUMS,
    SUM_OF_MEANS,
    SUMS_OF_GRADIENTS,
    SUMS_OF_WEIGHTS,
    GateSums,
    RowSums,
    Statistics,
    Sum,
    ValueSums,
    WeightSums,
)
from torchshear.pruners.statistics._sums import wide
from torchshear.pruners.statistics._taps import GroupTaps, Tap, find_taps

__all__ = [
    "ALL_SUMS",
    "SUMS_OF_GRADIENTS",
    "SUMS_OF_WEIGHTS",
    "SUM_OF_MEANS",
    "GateSums",
    "GroupTaps",
    "Layer",
    "Loss",
    "RowSums",
    "Run",
    "Statistics",
    "Sum",
    "Tap",
    "ValueSums",
    "WeightSums",
    "all_reduced",
    "batches_of",
    "find_layers",
    "find_taps",
    "wide",
]
