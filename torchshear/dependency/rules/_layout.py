"""Operators that reorder, add, drop or repeat axes without touching the order of positions inside them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import UNCHANGED, Keep
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._operator_record import Operator, SourceDim

_LAYOUT = Operator(passes="layout")


def _exchange_two(given: Mapping[str, Any], dims: list[SourceDim]) -> list[SourceDim]:
    one, other = (given["dim0"], given["dim1"]) if "dim0" in given else (given["axis0"], given["axis1"])
    result = list(dims)
    result[one], result[other] = dims[other], dims[one]
    return result


def _exchange_last_two(given: Mapping[str, Any], dims: list[SourceDim]) -> list[SourceDim]:
    return [*dims[:-2], dims[-1], dims[-2]]


@operator_rule(
    "aten.permute",
    operator=Operator(passes="layout", source_dims=lambda given, dims: [dims[int(dim)] for dim in given["dims"]]),
)
def _permute(call: Call) -> Axes:
    x = call.axes("self")
    return tuple(x[dim] for dim in call.arg("dims"))


@operator_rule(
    "aten.transpose.int",
    "aten.swapaxes",
    "aten.swapdims",
    operator=Operator(passes="layout", source_dims=_exchange_two),
)
def _transpose(call: Call) -> Axes:
    x = list(call.axes("self"))
    names = ("dim0", "dim1") if call.arg("dim0") is not None else ("axis0", "axis1")
    i, j = (call.dim(name, len(x)) for name in names)
    x[i], x[j] = x[j], x[i]
    return tuple(x)


@operator_rule("aten.t", "aten.numpy_T", operator=Operator(passes="layout", source_dims=lambda given, dims: dims[::-1]))
@operator_rule("aten.mT", operator=Operator(passes="layout", source_dims=_exchange_last_two))
@operator_rule("aten.mH", "aten.matrix_H", "aten.adjoint")
def _reverse(call: Call) -> Axes:
    x = call.axes("self")
    return x[::-1] if "numpy_T" in str(call.node.target) else (*x[:-2], *x[-2:][::-1])


@operator_rule("aten.movedim", "aten.moveaxis", operator=_LAYOUT)
def _movedim(call: Call) -> Axes:
    x = call.axes("self")
    source, destination = (
        [int(d) % len(x) for d in (value if isinstance(value, list | tuple) else [value])]
        for value in (call.arg("source"), call.arg("destination"))
    )
    order: list[int] = [dim for dim in range(len(x)) if dim not in source]
    for to, dim in sorted(zip(destination, source, strict=True)):
        order.insert(to, dim)
    return tuple(x[dim] for dim in order)


@operator_rule("aten.unsqueeze", "aten.unsqueeze_", operator=_LAYOUT)
def _unsqueeze(call: Call) -> Axes:
    x = call.axes("self")
    dim = call.dim("dim", len(x) + 1)
    return (*x[:dim], call.fixed_axis(1, "a new dimension"), *x[dim:])


@operator_rule("aten.squeeze", "aten.squeeze_", operator=_LAYOUT)
def _squeeze(call: Call) -> Axes:
    """Only the dimensions that have size 1 now are dropped, even if others shrink to 1. A free batch is left to it."""
    x = call.axes("self")
    dims = call.arg("dim")
    given = range(len(x)) if dims is None else [dims] if isinstance(dims, int) else dims
    dropped = [dim % len(x) for dim in given if x[dim].size == 1]

    def rewrite(keep: Keep) -> Any:
        new_ones = any(axis.size > 1 and int(keep(axis).sum()) == 1 for axis in x)
        return ("aten.squeeze.dims", (call.arg("self"), dropped)) if new_ones else UNCHANGED

    call.edit_call(rewrite)
    return tuple(axis for dim, axis in enumerate(x) if dim not in dropped)


@operator_rule("aten.expand", "aten.broadcast_to", operator=_LAYOUT)
def _expand(call: Call) -> Axes:
    """A dimension of size 1 becomes copies, which are units of their own: cutting one rewrites the size."""
    x, sizes = call.axes("self"), call.arg("size")
    offset = len(sizes) - len(x)
    result: list[Axis] = []
    for i, given in enumerate(sizes):
        old = x[i - offset] if i >= offset else None
        axis = old if old is not None and old.size == call.out_shape[i] else _copies(call, given, call.out_shape[i])
        call.edit_size("size", axis, i)
        result.append(axis)
    return tuple(result)


def _copies(call: Call, given: Any, size: int) -> Axis:
    if isinstance(given, fx.Node) or size <= 1:
        return call.fixed_axis(size, "a free dimension")
    return call.algebra.virtual(size)


@operator_rule("aten.expand_as", operator=_LAYOUT)
def _expand_as(call: Call) -> Axes:
    x, other = call.axes("self"), call.axes("other")
    offset = len(other) - len(x)
    for i, axis in enumerate(x):
        if axis.size == other[i + offset].size:
            call.tie(axis, other[i + offset])
    return other


@operator_rule("aten.repeat", operator=_LAYOUT)
def _repeat(call: Call) -> Axes:
    return _repeat_axes(call, call.axes("self"), "repeats")


@operator_rule("aten.tile", operator=_LAYOUT)
def _tile(call: Call) -> Axes:
    """Repeat, with numbers of times for the last dimensions only."""
    x = call.axes("self")
    n_whole = max(0, len(x) - len(call.arg("dims")))
    return (*x[:n_whole], *_repeat_axes(call, x[n_whole:], "dims"))


def _repeat_axes(call: Call, x: Axes, name: str) -> Axes:
    repeats = call.arg(name)
    offset = len(repeats) - len(x)
    result: list[Axis] = []
    for i, times in enumerate(repeats):
        old = x[i - offset] if i >= offset else call.fixed_axis(1, "a new dimension")
        if isinstance(times, fx.Node):
            call.fix([old], "repeated a free number of times")
            result.append(call.fixed_axis(call.out_shape[i - len(repeats)], "a free dimension"))
        elif times == 1:
            result.append(old)
        else:
            copies = call.algebra.virtual(times)
            call.edit_size(name, copies, i)
            result.append(copies if old.size == 1 else call.algebra.merge((copies, old)))
    return tuple(result)


@operator_rule("aten.repeat_interleave.self_int", operator=_LAYOUT)
def _repeat_interleave(call: Call) -> Axes:
    """Each position becomes a run of copies."""
    x, times = call.axes("self"), call.arg("repeats")
    if call.arg("dim") is None or not isinstance(times, int):
        call.fix(x, "repeated in a way that depends on data or flattens")
        return tuple(call.fixed_axis(size, "repeated") for size in call.out_shape)
    dim = call.dim("dim", len(x))
    copies = call.algebra.virtual(times)
    merged = copies if x[dim].size == 1 else call.algebra.merge((x[dim], copies))
    call.edit_size("repeats", copies)
    if isinstance(call.arg("output_size"), int):
        call.edit_size("output_size", merged)
    return (*x[:dim], merged, *x[dim + 1 :])


@operator_rule("aten.flip", operator=_LAYOUT)
def _flip(call: Call) -> Axes:
    x = list(call.axes("self"))
    for dim in call.arg("dims"):
        x[dim] = call.algebra.take(x[dim], slice(None, None, -1))
    return tuple(x)


@operator_rule("aten.flipud", "aten.fliplr", operator=_LAYOUT)
def _flip_its_own(call: Call) -> Axes:
    x, dim = list(call.axes("self")), 0 if "flipud" in str(call.node.target) else 1
    x[dim] = call.algebra.take(x[dim], slice(None, None, -1))
    return tuple(x)


@operator_rule("aten.rot90", operator=_LAYOUT)
def _rotate(call: Call) -> Axes:
    """A quarter turn is a transposition and a flip."""
    x = list(call.axes("self"))
    first, second = (int(dim) % len(x) for dim in call.arg("dims"))
    turns = int(call.arg("k")) % 4
    if turns % 2:
        x[first], x[second] = x[second], x[first]
    for dim in {0: (), 1: (first,), 2: (first, second), 3: (second,)}[turns]:
        x[dim] = call.algebra.take(x[dim], slice(None, None, -1))
    return tuple(x)


@operator_rule("aten.diagonal", "aten.diag_embed")
def _diagonal(call: Call) -> Axes:
    """The main diagonal of two dimensions of one size becomes the last dimension, or the other way round."""
    x = call.axes("self")
    embeds = "diag_embed" in str(call.node.target)
    rank = len(x) + embeds
    first, second = sorted((call.dim("dim1", rank), call.dim("dim2", rank)))
    if call.arg("offset") != 0 or (not embeds and x[first].size != x[second].size):
        call.fix([x[-1]] if embeds else [x[first], x[second]], "a diagonal beside the main one or of a rectangle")
    if embeds:
        result = list(x[:-1])
        for dim in (first, second):
            result.insert(dim, x[-1])
        sizes = call.out_shape
        return tuple(
            a if a.size == n else call.fixed_axis(n, "beside the diagonal") for a, n in zip(result, sizes, strict=True)
        )
    rest = tuple(axis for dim, axis in enumerate(x) if dim not in (first, second))
    if x[first].size == x[second].size == call.out_shape[-1]:
        return (*rest, call.tie(x[first], x[second]))
    return (*rest, call.fixed_axis(call.out_shape[-1], "a diagonal of a rectangle"))


@operator_rule("aten.view_as_real", "aten.view_as_complex")
def _pairs(call: Call) -> Axes:
    """Real and imaginary part are the two positions of a last dimension."""
    x = call.axes("self")
    if "view_as_real" in str(call.node.target):
        return (*x, call.fixed_axis(2, "real and imaginary part"))
    call.fix(x[-1:], "real and imaginary part")
    return x[:-1]


@operator_rule("aten.roll", operator=_LAYOUT)
def _roll(call: Call) -> Axes:
    """Positions move round by `shift`; of the last `shift` ones, those that are kept move to the front."""
    x = list(call.axes("self"))
    if not call.arg("dims"):
        call.fix(x, "rolled as one flat row")
        return tuple(x)
    for i, (shift, dim) in enumerate(zip(call.arg("shifts"), call.arg("dims"), strict=True)):
        axis = x[dim]
        if isinstance(shift, fx.Node):
            call.fix([axis], "rolled by a free number")
            continue
        call.edit_count("shifts", slice(axis.size - shift % axis.size, None), axis, i)
        x[dim] = call.algebra.take(axis, np.roll(np.arange(axis.size), shift))
    return tuple(x)
