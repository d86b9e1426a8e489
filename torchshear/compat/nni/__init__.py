"""NNI: its pruners as classes under the names that its users know, and its dependency-aware mode."""

from typing import TYPE_CHECKING

from torchshear._other_tools import answering
from torchshear.compat.nni._admm import ADMMPruner
from torchshear.compat.nni._amc import AMCPruner
from torchshear.compat.nni._auto_compress import AutoCompressPruner
from torchshear.compat.nni._dependency_aware import DependencyAwarePlan, plan_dependency_aware
from torchshear.compat.nni._gradual import AGPPruner, LinearPruner
from torchshear.compat.nni._lottery import LotteryTicketPruner
from torchshear.compat.nni._named import (
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
    TaylorFOWeightFilterPruner,
    TaylorFOWeightPruner,
)
from torchshear.compat.nni._pruner import Pruner
from torchshear.compat.nni._scheduler import (
    AGPTaskGenerator,
    LinearTaskGenerator,
    LotteryTicketTaskGenerator,
    PruningScheduler,
)
from torchshear.compat.nni._searching import NetAdaptPruner, SensitivityPruner, SimulatedAnnealingPruner
from torchshear.compat.nni._slim import SlimPruner

__all__ = [
    "ADMMPruner",
    "AGPPruner",
    "AGPTaskGenerator",
    "AMCPruner",
    "ActivationAPoZRankFilterPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankFilterPruner",
    "ActivationMeanRankPruner",
    "AutoCompressPruner",
    "ConfigPruner",
    "DependencyAwarePlan",
    "FPGMPruner",
    "L1FilterPruner",
    "L1NormPruner",
    "L2FilterPruner",
    "L2NormPruner",
    "LevelPruner",
    "LinearPruner",
    "LinearTaskGenerator",
    "LotteryTicketPruner",
    "LotteryTicketTaskGenerator",
    "NetAdaptPruner",
    "Pruner",
    "PruningScheduler",
    "SensitivityPruner",
    "SimulatedAnnealingPruner",
    "SlimPruner",
    "TaylorFOWeightFilterPruner",
    "TaylorFOWeightPruner",
    "plan_dependency_aware",
]

if not TYPE_CHECKING:
    __getattr__ = answering(__name__)
