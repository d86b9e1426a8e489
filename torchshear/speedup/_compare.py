"""Comparing outputs of two models on inputs that exercise them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchshear.graph import ExampleInputs

# Relative differences that equal computations may have, by dtype of the outputs: about a thousand times the unit
# round-off, for sums in another order.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def tolerance(outputs: Sequence[Any]) -> float:
    """The largest relative difference that counts as equal, by the coarsest dtype among the outputs."""
    return max(
        (_TOLERANCES.get(value.dtype, 0.0) for value in outputs if isinstance(value, Tensor)),
        default=0.0,
    )


def relative_error(expected: Sequence[Any], actual: Sequence[Any]) -> float:
    """Largest difference over all outputs, each relative to its own largest absolute value.

    Other shapes, dtypes or numbers of outputs, and NaN where there was none, count as infinitely different.
    """
    if len(expected) != len(actual):
        return float("inf")
    return max((_error_of_one(a, b) for a, b in zip(expected, actual, strict=True)), default=0.0)


def _error_of_one(expected: Any, actual: Any) -> float:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return 0.0 if type(expected) is type(actual) else float("inf")
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if expected.is_meta or actual.is_meta or expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual) else float("inf")
    wide, other = expected.to(torch.float64), actual.to(torch.float64)
    same = (wide == other) | (wide.isnan() & other.isnan())  # masks of -inf are equal, and so is NaN beside numbers
    if bool(wide.isnan().all()):
        return float("inf")
    difference = (wide - other).abs().masked_fill(same, 0).max()
    finite = wide[wide.isfinite()]
    scale = (finite.abs().max() if finite.numel() else difference).clamp_min(torch.finfo(torch.float64).tiny)
    error = float(difference / scale)
    return error if error == error else float("inf")


def random_like(inputs: ExampleInputs, seed: int) -> ExampleInputs:
    """Inputs of the same shapes: floating tensors drawn anew with the spread of the examples, others as they are.

    Args:
        inputs: the example inputs.
        seed: seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.is_meta:
            return tensor.clone()
        spread = float(tensor.detach().to(torch.float64).std(correction=0)) if tensor.numel() > 1 else 1.0
        spread = spread if 0 < spread < float("inf") else 1.0
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * spread
        return noise.to(tensor.device, tensor.dtype)

    return inputs.map(draw)
