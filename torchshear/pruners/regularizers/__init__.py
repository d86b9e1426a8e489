"""Regularizers: what presses units of a network towards zero while it trains."""

from torchshear.pruners.regularizers._admm import ADMM
from torchshear.pruners.regularizers._group_lasso import BlockLasso, GroupLasso
from torchshear.pruners.regularizers._growing_l2 import GrowingL2
from torchshear.pruners.regularizers._regularizer import Penalty, Regularized, Regularizer
from torchshear.pruners.regularizers._scale_l1 import ScaleL1

__all__ = ["ADMM", "BlockLasso", "GroupLasso", "GrowingL2", "Penalty", "Regularized", "Regularizer", "ScaleL1"]
