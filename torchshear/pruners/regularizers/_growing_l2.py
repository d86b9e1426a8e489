"""An L2 penalty that grows, on what will go."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchshear._arguments import check_count
from torchshear.errors import ArgumentError
from torchshear.pruners.regularizers._regularizer import (
    Penalty,
    Regularized,
    Regularizer,
    Weights,
    check_coefficient,
)


@dataclass(frozen=True, slots=True)
class GrowingL2(Regularizer):
    """L2 penalty on all weights that are going to go, which grows until they are nearly nothing (GReg).

    lambda_t / 2 * sum over these weights w of w^2,    lambda_t = min(most, growth * (floor(t / every) + 1))

    at step t of the optimizer. What goes is chosen by the session's criterion when the training begins, at the final
    ratio; the schedule may then take it at the end, as `OneShot(at=...)` does.

    Attributes:
        growth: by how much lambda grows at a time, above 0.
        every: steps of the optimizer between two growths.
        most: the largest lambda.

    Raises:
        ArgumentError: an attribute is none of those above; when bound: nothing is going to go.

    Reference: Wang et al., ICLR 2021, arXiv:2012.09243 (GReg-1).
    """

    growth: float = 1e-4
    every: int = 10
    most: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        check_coefficient("growth", self.growth)
        check_coefficient("most", self.most)
        check_count("every", self.every)

    @property
    def wants_final_units(self) -> bool:
        """True: it presses what would go at the final ratio."""
        return True

    def factor(self, step: int) -> float:
        """Return lambda at a step of the optimizer."""
        return min(self.most, self.growth * (step // self.every + 1))

    def bind(self, network: Regularized) -> Penalty:
        """Return the penalty on what goes of a network."""
        goes = {name: mask for name, mask in network.goes.items() if bool(mask.any())}
        if not goes:
            raise ArgumentError("GrowingL2: nothing goes at the ratio that is asked for; ask for more.")
        return _GrowingPenalty(self, goes)


class _GrowingPenalty(Penalty):
    def __init__(self, settings: GrowingL2, goes: Mapping[str, Tensor]) -> None:
        self._settings, self._goes = settings, dict(goes)

    def value(self, weights: Weights, step: int) -> Tensor:
        """Return lambda / 2 * the sum of squares of what goes."""
        found = []
        for name, mask in self._goes.items():
            weight = weights[name]
            if mask.device != weight.device:
                mask = self._goes[name] = mask.to(weight.device)
            found.append(torch.where(mask, weight, 0.0).square().sum())
        return 0.5 * self._settings.factor(step) * torch.stack(found).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return what goes."""
        return {name: mask.cpu() for name, mask in self._goes.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what goes."""
        self._goes = dict(state)
