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
    largest = 0.0
    for a, b, c in zip(expected, actual, others, strict=True):
        is_of_tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
        if type(a) is not type(b) and not is_of_tensors:
            return float("inf")
        if not is_of_tensors:
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.is_meta or b.is_meta or a.numel() == 0:
            continue
        if not a.is_floating_point() and not a.is_complex():
            largest = largest if torch.equal(a, b) else float("inf")
            continue
        wanted, found, beside = _as_float64(a), _as_float64(b), _as_float64(c)
        same = (wanted == found) | (wanted.isnan() & found.isnan())  # masks of -inf are equal, so is NaN beside numbers
        if bool(same.all()):
            largest = float("inf") if bool(wanted.isnan().all()) else largest
            continue
        scale = typical_magnitude(wanted, beside if beside.shape == wanted.shape else wanted)
        error = float(((wanted - found).abs() / (wanted.abs() + scale)).masked_fill(same, 0).max())
        largest = max(largest, error if error == error else float("inf"))
    return largest


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
