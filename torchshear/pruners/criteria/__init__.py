"""Criteria: how much each unit of a channel group is worth. One file each, one registry."""

from torchshear.pruners.criteria import _l1, _l2
from torchshear.pruners.criteria._random import random_criterion
from torchshear.pruners.criteria._registry import Criterion, criterion, find_criterion, registered_criteria
from torchshear.pruners.criteria._weights import unit_sums

__all__ = ["Criterion", "criterion", "find_criterion", "random_criterion", "registered_criteria", "unit_sums"]

assert _l1
assert _l2
