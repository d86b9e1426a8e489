"""Criteria: how much each unit of a channel group is worth. One file each, one registry."""

from torchshear.pruners.criteria import (
    _activation_variance,
    _apoz,
    _bn_scale,
    _fpgm,
    _gradient,
    _group_fisher,
    _l1,
    _l2,
    _mean_activation,
    _snip,
    _snip_momentum,
    _taylor,
    _taylor_bn,
    _wanda,
)
from torchshear.pruners.criteria._random import random_criterion
from torchshear.pruners.criteria._registry import (
    Criterion,
    UnscorableError,
    criterion,
    find_criterion,
    is_comparable,
    registered_criteria,
)
from torchshear.pruners.criteria._weights import unit_sums

__all__ = [
    "Criterion",
    "UnscorableError",
    "criterion",
    "find_criterion",
    "is_comparable",
    "random_criterion",
    "registered_criteria",
    "unit_sums",
]

_MODULES = (
    _activation_variance,
    _apoz,
    _bn_scale,
    _fpgm,
    _gradient,
    _group_fisher,
    _l1,
    _l2,
    _mean_activation,
    _snip,
    _snip_momentum,
    _taylor,
    _taylor_bn,
    _wanda,
)
