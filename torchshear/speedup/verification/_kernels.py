"""Kernels of torch that compute wrongly on some layouts, and are given others while gradients are compared."""

from collections.abc import Callable
from typing import Any

import torch

from torchshear.graph.numerics._dispatch import LeanDispatchMode

_NORM_BACKWARDS = frozenset({torch.ops.aten.native_batch_norm_backward.default})


class SoundKernels(LeanDispatchMode):  # type: ignore[no-untyped-call]
    """Gives the backward of a batch norm a gradient that lies in memory as its shape says.

    On the CPU (torch 2.13) the gradients that it gives are wrong, and differ between equal models, where the gradient
    of a single sample comes with channels innermost and another stride between samples than the size of one, as from
    a slice of tokens. Nothing in that is ours, but two models could not be compared.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _NORM_BACKWARDS:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))
