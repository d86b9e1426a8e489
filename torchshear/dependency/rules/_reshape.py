"""Reshapes: dimensions are products of factors, split and merged in row-major order; sizes of calls follow."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import UNCHANGED, Keep
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._operator_record import Operator

_LAYOUT = Operator(passes="layout")


@operator_rule("aten._reshape_alias", operator=_LAYOUT)
def _reshape_alias(call: Call) -> Axes:
    """A view whose strides are given as well; with other sizes it is a plain reshape, whose strides are its own."""
    result = reshape_axes(call, call.axes("self"), call.out_shape)
    source, sizes = call.arg("self"), list(call.arg("size"))

    def smaller(keep: Keep) -> Any:
        if all(keep(axis).all() for axis in (*call.axes("self"), *result)):
            return UNCHANGED
        kept = [int(keep(axis).sum()) if isinstance(n, int) else n for axis, n in zip(result, sizes, strict=True)]
        return "aten.reshape.default", (source, kept)

    call.edit_call(smaller)
    return result


@operator_rule("aten.view.default", "aten.reshape", "aten._unsafe_view", operator=_LAYOUT)
def _reshape(call: Call) -> Axes:
    name = "size" if call.arg("size") is not None else "shape"
    result = reshape_axes(call, call.axes("self"), call.out_shape)
    for i, axis in enumerate(result):
        call.edit_size(name, axis, i)
    return result


@operator_rule("aten.view_as", "aten.reshape_as", operator=_LAYOUT)
def _reshape_as(call: Call) -> Axes:
    result = reshape_axes(call, call.axes("self"), call.out_shape)
    for axis, other in zip(result, call.axes("other"), strict=True):
        call.tie(axis, other)
    return result


@operator_rule("aten.flatten.using_ints", "aten.ravel", operator=_LAYOUT)
def _flatten(call: Call) -> Axes:
    return reshape_axes(call, call.axes("self"), call.out_shape)


@operator_rule("aten.unflatten.int", operator=_LAYOUT)
def _unflatten(call: Call) -> Axes:
    x = call.axes("self")
    result = reshape_axes(call, x, call.out_shape)
    dim = call.dim("dim", len(x))
    for i in range(len(call.arg("sizes"))):
        call.edit_size("sizes", result[dim + i], i)
    return result


def reshape_axes(call: Call, axes: Axes, shape: Sequence[int]) -> Axes:
    """Axes of a value seen in another shape of as many positions.

    Dimensions are taken together in the smallest runs that hold equally many positions before and after. Inside a
    run, both sides are products of the same factors if every stride of one side divides or is a multiple of every
    stride of the other; otherwise the run is fixed.
    """
    if 0 in shape:
        call.fix(axes, "reshaped while empty")
        return tuple(call.fixed_axis(size, "empty") for size in shape)
    result: list[Axis] = []
    for before, after in _runs([axis.size for axis in axes], shape):
        result += _reshape_run(call, [axes[i] for i in before], [shape[j] for j in after])
    return tuple(result)


def _runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions, as indices, with equal products on both sides."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before: list[int] = []
        after: list[int] = []
        n_old = n_new = 1
        while True:
            if i < len(old) and (n_old < n_new or not before):
                n_old *= old[i]
                before.append(i)
                i += 1
            elif j < len(new) and (n_new < n_old or not after):
                n_new *= new[j]
                after.append(j)
                j += 1
            if n_old == n_new or (i == len(old) and j == len(new)):
                break
        runs.append((before, after))
    return runs


def _reshape_run(call: Call, axes: list[Axis], sizes: list[int]) -> list[Axis]:
    if len(sizes) == 1 and len(axes) == 1:
        return axes
    wide = [axis for axis in axes if axis.size > 1]
    factors = _common_factors([axis.size for axis in wide], [size for size in sizes if size > 1])
    if factors is None:
        call.fix(axes, "reshaped into sizes that share no factors")
        return [call.fixed_axis(size, "reshaped into sizes that share no factors") for size in sizes]
    parts = _split(call, wide, factors)
    result: list[Axis] = []
    for size in sizes:
        run: list[Axis] = []
        filled = 1
        while filled < size:
            filled *= parts[0].size
            run.append(parts.pop(0))
        result.append(call.fixed_axis(1, "a dimension of size 1") if not run else _merge(call, run))
    return result


def _common_factors(old: list[int], new: list[int]) -> list[int] | None:
    """Sizes of the factors that both sides are products of, outermost first, or None if there are none."""
    strides = sorted(set(_strides(old)) | set(_strides(new)), reverse=True)
    factors = []
    for outer, inner in pairwise(strides):
        if outer % inner:
            return None
        factors.append(outer // inner)
    return factors


def _strides(sizes: list[int]) -> list[int]:
    strides = [1]
    for size in reversed(sizes):
        strides.append(strides[-1] * size)
    return strides


def _split(call: Call, axes: list[Axis], factors: list[int]) -> list[Axis]:
    parts: list[Axis] = []
    rest = list(factors)
    for axis in axes:
        sizes, filled = [], 1
        while filled < axis.size:
            sizes.append(rest.pop(0))
            filled *= sizes[-1]
        parts += call.algebra.factor(axis, sizes) if len(sizes) > 1 else [axis]
    return parts


def _merge(call: Call, run: list[Axis]) -> Axis:
    return run[0] if len(run) == 1 else call.algebra.merge(run)
