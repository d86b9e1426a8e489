"""The group lasso of several pruners, each on its own layers and while its own schedule runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchshear.compat.neural_compressor._settings import PrunerSettings
from torchshear.pruners.regularizers import BlockLasso, GroupLasso, Penalty, Regularizer
from torchshear.pruners.regularizers._regularizer import Regularized, Weights


@dataclass(frozen=True, slots=True)
class PrunersLasso(Regularizer):
    """Norms of blocks: coefficient * sum over blocks b of the pruner of ||W_b||, from its start_step to its end_step.

    The gradient of a block is coefficient * W_b / ||W_b||, as the pages of Neural Compressor say. Channels are pressed
    with all that goes with them, see `GroupLasso`.

    Attributes:
        pruners: settings of the pruners that have a coefficient.
    """

    pruners: tuple[PrunerSettings, ...]

    @classmethod
    def of(cls, pruners: Sequence[PrunerSettings]) -> "PrunersLasso | None":
        """Make one of all pruners that ask for it; None if none does."""
        asking = tuple(one for one in pruners if one.coefficient)
        return cls(asking) if asking else None

    def bind(self, network: Regularized) -> Penalty:
        """Return the penalty on the units of each pruner; pruners without any in this model are left out."""
        parts = []
        for pruner in self.pruners:
            own = {name for name, label in network.owners.items() if label == pruner.entry.label}
            groups = tuple(group for group in network.groups if group.name in own)
            layers = {name: layer for name, layer in network.layers.items() if name in own}
            part = replace(network, groups=groups, layers=layers)
            if groups:
                bound = GroupLasso(pruner.coefficient).bind(part)
            elif layers:
                bound = BlockLasso(pruner.entry.pattern, pruner.coefficient).bind(part)
            else:
                continue
            schedule = pruner.schedule
            is_by_step = schedule.by == "step"
            parts.append((bound, schedule.start if is_by_step else 0, schedule.end if is_by_step else math.inf))
        return _Parts(parts)


class _Parts(Penalty):
    """Penalties, each for some steps."""

    def __init__(self, parts: Sequence[tuple[Penalty, float, float]]) -> None:
        self._parts = tuple(parts)

    def value(self, weights: Weights, step: int) -> Tensor:
        """Return the sum of those whose time it is."""
        now = [part.value(weights, step) for part, start, end in self._parts if start <= step <= end]
        return torch.stack(now).sum() if now else torch.zeros(())
