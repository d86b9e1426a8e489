"""What goes: criteria that score units, and the selection of those that stay."""

from typing import TYPE_CHECKING

from torchshear._other_tools import answering
from torchshear.pruners import masks
from torchshear.pruners._collecting import channel_means, collect
from torchshear.pruners._dependency_aware import DependencyAwarePlan, LayerMask, plan_dependency_aware
from torchshear.pruners._keys import Ratio
from torchshear.pruners._planning import check_request, plan_from_kept, plan_units
from torchshear.pruners._pools import isomorphism_classes
from torchshear.pruners._request import SCOPES, Request
from torchshear.pruners._scoring import COMBINE
from torchshear.pruners._selection import Limits, Width, choose_units, choose_width
from torchshear.pruners._targets import Target, choose_targets
from torchshear.pruners._unipruning import plan_unipruning
from torchshear.pruners._unipruning_mask import plan_from_unipruning_mask, write_unipruning_mask
from torchshear.pruners._weight_source import WeightSource
from torchshear.pruners.classes import (
    ActivationAPoZRankFilterPruner,
    ActivationAPoZRankPruner,
    ActivationMeanRankFilterPruner,
    ActivationMeanRankPruner,
    ConfigPruner,
    FPGMPruner,
    L1FilterPruner,
    L1NormPruner,
    L2FilterPruner,
    L2NormPruner,
    LevelPruner,
    Pruner,
    SlimPruner,
    TaylorFOWeightFilterPruner,
    TaylorFOWeightPruner,
)
from torchshear.pruners.configs import (
    ResolvedConfig,
    UniPruningConfig,
    load_config,
    parse_config,
    read_unipruning_config,
    resolve,
)
from torchshear.pruners.criteria import (
    Criterion,
    UnscorableError,
    criterion,
    find_criterion,
    random_criterion,
    registered_criteria,
    unit_sums,
)
from torchshear.pruners.statistics import Statistics

__all__ = [
    "COMBINE",
    "SCOPES",
    "ActivationAPoZRankFilterPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankFilterPruner",
    "ActivationMeanRankPruner",
    "ConfigPruner",
    "Criterion",
    "DependencyAwarePlan",
    "FPGMPruner",
    "L1FilterPruner",
    "L1NormPruner",
    "L2FilterPruner",
    "L2NormPruner",
    "LayerMask",
    "LevelPruner",
    "Limits",
    "Pruner",
    "Ratio",
    "Request",
    "ResolvedConfig",
    "SlimPruner",
    "Statistics",
    "Target",
    "TaylorFOWeightFilterPruner",
    "TaylorFOWeightPruner",
    "UniPruningConfig",
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
    "load_config",
    "masks",
    "parse_config",
    "plan_dependency_aware",
    "plan_from_kept",
    "plan_from_unipruning_mask",
    "plan_unipruning",
    "plan_units",
    "random_criterion",
    "read_unipruning_config",
    "registered_criteria",
    "resolve",
    "unit_sums",
    "write_unipruning_mask",
]

if not TYPE_CHECKING:
    __getattr__ = answering(__name__)
