"""Pruners as classes, under the names that users of NNI know."""

from torchshear.pruners.classes._choice import Widths, plan_config
from torchshear.pruners.classes._named import (
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
    SlimPruner,
    TaylorFOWeightFilterPruner,
    TaylorFOWeightPruner,
)
from torchshear.pruners.classes._pruner import ConfigList, Pruner
from torchshear.pruners.classes._stages import Pruned, Stages, provide_stages

__all__ = [
    "ActivationAPoZRankFilterPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankFilterPruner",
    "ActivationMeanRankPruner",
    "ConfigList",
    "ConfigPruner",
    "FPGMPruner",
    "L1FilterPruner",
    "L1NormPruner",
    "L2FilterPruner",
    "L2NormPruner",
    "LevelPruner",
    "Pruned",
    "Pruner",
    "SlimPruner",
    "Stages",
    "TaylorFOWeightFilterPruner",
    "TaylorFOWeightPruner",
    "Widths",
    "plan_config",
    "provide_stages",
]
