"""L1 on the scales of norms."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchshear.dependency.groups._purposes import NORM_PURPOSES
from torchshear.errors import ArgumentError
from torchshear.pruners.regularizers._regularizer import (
    Penalty,
    Regularized,
    Regularizer,
    Weights,
    check_coefficient,
)


@dataclass(frozen=True, slots=True)
class ScaleL1(Regularizer):
    """L1 norm of the scales of all norms whose channels may shrink (network slimming).

    coefficient * sum over norms, over channels c, of |gamma_c|; its slope at 0 is 0. Goes with criterion "bn_scale".

    Attributes:
        coefficient: at least 0; 1e-4 in the paper.

    Raises:
        ArgumentError: the coefficient is no finite number of at least 0; when bound: no norm has a scale.

    Reference: Liu et al., ICCV 2017, arXiv:1708.06519.
    """

    coefficient: float = 1e-4

    def __post_init__(self) -> None:
        """Refuse what is no coefficient."""
        check_coefficient("coefficient", self.coefficient)

    def bind(self, network: Regularized) -> Penalty:
        """Return the penalty on the scales of a network."""
        names = [m.name for group in network.groups for m in group.members if m.purposes & NORM_PURPOSES]
        if not names:
            raise ArgumentError("ScaleL1: no group that may shrink has a norm with a scale; use GroupLasso.")
        return _ScalePenalty(self.coefficient, tuple(dict.fromkeys(names)))


class _ScalePenalty(Penalty):
    def __init__(self, coefficient: float, names: tuple[str, ...]) -> None:
        self._coefficient, self._names = coefficient, names

    def value(self, weights: Weights, step: int) -> Tensor:
        """Return coefficient * sum of |gamma|."""
        return self._coefficient * torch.stack([weights[name].abs().sum() for name in self._names]).sum()
