"""Criteria: how much each unit of a channel group is worth. One file each, one registry."""

from torchshear.pruners.criteria._activation_variance import activation_variance_scores
from torchshear.pruners.criteria._apoz import apoz_scores
from torchshear.pruners.criteria._bn_scale import bn_scale_scores
from torchshear.pruners.criteria._fpgm import fpgm_scores
from torchshear.pruners.criteria._gradient import gradient_scores
from torchshear.pruners.criteria._group_fisher import group_fisher_scores
from torchshear.pruners.criteria._l1 import l1_scores
from torchshear.pruners.criteria._l2 import l2_scores
from torchshear.pruners.criteria._lamp import lamp_scores
from torchshear.pruners.criteria._mean_activation import mean_activation_scores
from torchshear.pruners.criteria._random import random_criterion
from torchshear.pruners.criteria._registry import (
    Criterion,
    Rearrangement,
    UnscorableError,
    criterion,
    declared_needs,
    find_criterion,
    is_comparable,
    needs_of,
    rearrangement_of,
    registered_criteria,
)
from torchshear.pruners.criteria._retrain_free import retrain_free_scores, retrain_free_units
from torchshear.pruners.criteria._sensitivity import sensitivity_scores
from torchshear.pruners.criteria._snip import snip_scores
from torchshear.pruners.criteria._snip_momentum import snip_momentum_scores
from torchshear.pruners.criteria._taylor import taylor_scores
from torchshear.pruners.criteria._taylor_bn import taylor_bn_scores
from torchshear.pruners.criteria._unipruning import unipruning_scores
from torchshear.pruners.criteria._wanda import wanda_scores
from torchshear.pruners.criteria._weights import unit_sums

__all__ = [
    "Criterion",
    "Rearrangement",
    "UnscorableError",
    "activation_variance_scores",
    "apoz_scores",
    "bn_scale_scores",
    "criterion",
    "declared_needs",
    "find_criterion",
    "fpgm_scores",
    "gradient_scores",
    "group_fisher_scores",
    "is_comparable",
    "l1_scores",
    "l2_scores",
    "lamp_scores",
    "mean_activation_scores",
    "needs_of",
    "random_criterion",
    "rearrangement_of",
    "registered_criteria",
    "retrain_free_scores",
    "retrain_free_units",
    "sensitivity_scores",
    "snip_momentum_scores",
    "snip_scores",
    "taylor_bn_scores",
    "taylor_scores",
    "unipruning_scores",
    "unit_sums",
    "wanda_scores",
]
