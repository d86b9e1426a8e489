"""Relative difference between the outputs of two models, element by element."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Differences that equal computations may have, by dtype of the outputs: about a thousand times the unit round-off, for
# sums in another order.
_TOLERANCES = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
_ORDINARY = 1e4  # values above so many times the small ones of an output are fillers, not results
_ENOUGH = 1 << 16  # number of values that a scale is taken from


def tolerance(outputs: Sequence[Any]) -> float:
    """Return the largest relative difference that counts as equal, by the coarsest dtype among the outputs."""
    return max((_TOLERANCES.get(v.dtype, 0.0) for v in outputs if isinstance(v, Tensor)), default=0.0)


def relative_error(expected: Sequence[Any], actual: Sequence[Any], others: Sequence[Any] | None = None) -> float:
    """Return the largest difference of any element, relative to that element and to ordinary values of its output.

        |a - b| / (|a| + s)

    with s the median magnitude of the ordinary values. It is not the largest value: that may be a filler, such as the
    -1e9 of a mask. If outputs on other inputs are given, only elements that differ from them are ordinary.

    Args:
        expected: flat outputs of the reference.
        actual: flat outputs of the candidate.
        others: flat outputs of the reference on other inputs.

    Returns:
        The difference; infinity for other shapes, dtypes or numbers of outputs, other integers, and NaN in place of a
        number.
    """
    if len(expected) != len(actual):
        return float("inf")
    others = expected if others is None or len(others) != len(expected) else others
    return max((_error_of_value(a, b, c) for a, b, c in zip(expected, actual, others, strict=True)), default=0.0)


def _error_of_value(expected: Any, actual: Any, other: Any) -> float:
    """Compare one flat output; see `relative_error`."""
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return 0.0 if type(expected) is type(actual) else float("inf")
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if expected.is_meta or actual.is_meta or expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(expected, actual) else float("inf")
    wanted, found, beside = _as_float64(expected), _as_float64(actual), _as_float64(other)
    same = (wanted == found) | (wanted.isnan() & found.isnan())  # masks of -inf are equal, and so is NaN beside numbers
    if bool(same.all()):
        return float("inf") if bool(wanted.isnan().all()) else 0.0
    scale = typical_magnitude(wanted, beside if beside.shape == wanted.shape else wanted)
    error = float(((wanted - found).abs() / (wanted.abs() + scale)).masked_fill(same, 0).max())
    return error if error == error else float("inf")


def _as_float64(tensor: Tensor) -> Tensor:
    """Return real numbers as float64, complex ones as pairs of float64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.detach().to(torch.float64)


def typical_magnitude(values: Tensor, others: Tensor) -> float:
    """Return the median magnitude of ordinary values: those that vary with the input, without fillers.

    Args:
        values: float64 numbers of any shape.
        others: the same on other inputs; `values` itself if there are none.
    """
    small = torch.minimum(values.abs(), others.abs()).flatten()
    varying = small[(values != others).flatten() & small.isfinite() & (small > 0)]
    if not varying.numel():
        varying = small[small.isfinite() & (small > 0)]
    if not varying.numel():
        return float(torch.finfo(torch.float64).tiny)
    varying = varying[:: 1 + varying.numel() // _ENOUGH].sort().values
    ordinary = varying[varying <= _ORDINARY * varying[varying.numel() // 10]]
    return float(ordinary[ordinary.numel() // 2])
