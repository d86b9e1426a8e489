"""Criteria that score units, the selection of those that stay, and masks."""

from typing import TYPE_CHECKING

from torchshear._other_tools import answering
from torchshear.calibration import Statistics
from torchshear.calibration._weight_source import WeightSource
from torchshear.pruners import masks
from torchshear.pruners._collecting import channel_means, collect
from torchshear.pruners._planning import check_request, plan_from_kept, plan_units
from torchshear.pruners.criteria import (
    Criterion,
    UnscorableError,
    criterion,
    find_criterion,
    random_criterion,
    registered_criteria,
    unit_sums,
)
from torchshear.pruners.selection._exact import Limits, Width, choose_units, choose_width
from torchshear.pruners.selection._per_group import Ratio
from torchshear.pruners.selection._pools import isomorphism_classes
from torchshear.pruners.selection._request import SCOPES, Request
from torchshear.pruners.selection._scoring import GROUP_REDUCTIONS
from torchshear.pruners.selection._targets import Target, choose_targets

__all__ = [
    "GROUP_REDUCTIONS",
    "SCOPES",
    "Criterion",
    "Limits",
    "Ratio",
    "Request",
    "Statistics",
    "Target",
    "UnscorableError",
    "WeightSource",
    "Width",
    "channel_means",
    "check_request",
    "choose_targets",
    "choose_units",
    "choose_width",
    "collect",
    "criterion",
    "find_criterion",
    "isomorphism_classes",
    "masks",
    "plan_from_kept",
    "plan_units",
    "random_criterion",
    "registered_criteria",
    "unit_sums",
]

if not TYPE_CHECKING:
    __getattr__ = answering(__name__)
