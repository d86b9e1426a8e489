"""Criteria that score units, the selection of those that stay, and masks."""

from typing import TYPE_CHECKING

from torchshear._other_tools import answering
from torchshear.calibration._weight_source import WeightSource
from torchshear.pruners import masks
from torchshear.pruners._collecting import channel_means
from torchshear.pruners._planning import plan_from_kept
from torchshear.pruners.criteria._criterion import Criterion, UnscorableError, criterion, registered_criteria
from torchshear.pruners.criteria._random import random_criterion
from torchshear.pruners.criteria._reconstruction import reconstruction_errors
from torchshear.pruners.criteria._weight_sums import unit_sums
from torchshear.pruners.selection._pools import isomorphism_classes
from torchshear.pruners.selection._request import Ratio

__all__ = [
    "Criterion",
    "Ratio",
    "UnscorableError",
    "WeightSource",
    "channel_means",
    "criterion",
    "isomorphism_classes",
    "masks",
    "plan_from_kept",
    "random_criterion",
    "reconstruction_errors",
    "registered_criteria",
    "unit_sums",
]

if not TYPE_CHECKING:
    __getattr__ = answering(__name__)
