"""Capturing code that looks at values: masks that say where to assign, and branches that are drawn at random."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MaskedAssignments(TorchFunctionMode):
    """Writes `x[mask] = value` as a choice between both, which computes the same and needs no count of the mask.

    torch.export refuses the assignment where the value is spread over an unknown number of places.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__setitem__ and _is_spread(*args):
            target, mask, value = args
            wide = mask.reshape(*mask.shape, *[1] * (target.ndim - mask.ndim))
            target.copy_(torch.where(wide, value, target))
            return None
        return func(*args, **(kwargs or {}))


def _is_spread(target: Tensor, index: Any, value: Any) -> bool:
    """Whether one value, or one row of values, is assigned to all places of a mask."""
    if not isinstance(index, Tensor) or index.dtype is not torch.bool or index.ndim == 0:
        return False
    n_rest = target.ndim - index.ndim
    return not isinstance(value, Tensor) or value.ndim <= n_rest


class RefusedBranches(TorchFunctionMode):
    """Answers every `if` on a value of a tensor with no.

    In train mode that is how layers are dropped at random: the graph is then that of a run in which none is. It holds
    how tensors depend on one another, and is not a graph to train with.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__:
            return False
        return func(*args, **(kwargs or {}))
