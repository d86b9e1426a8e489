"""Data run through a model, and what it shows of each unit: activations, gradients, gates."""

from torchshear.calibration._batches import Batch, CallForm, read_batches, read_graph_inputs
from torchshear.calibration._processes import all_reduced
from torchshear.calibration._progress import Progress, check_progress, with_progress
from torchshear.calibration._run import Loss, Run
from torchshear.calibration._statistics import (
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
from torchshear.calibration._sums import wide
from torchshear.calibration._taps import GroupTaps, Tap, find_taps
from torchshear.calibration._weight_calls import WeightCall, find_weight_calls

__all__ = [
    "ALL_SUMS",
    "SUMS_OF_GRADIENTS",
    "SUMS_OF_WEIGHTS",
    "SUM_OF_MEANS",
    "Batch",
    "CallForm",
    "GateSums",
    "GroupTaps",
    "Loss",
    "Progress",
    "RowSums",
    "Run",
    "Statistics",
    "Sum",
    "Tap",
    "ValueSums",
    "WeightCall",
    "WeightSums",
    "all_reduced",
    "check_progress",
    "find_taps",
    "find_weight_calls",
    "read_batches",
    "read_graph_inputs",
    "wide",
    "with_progress",
]
