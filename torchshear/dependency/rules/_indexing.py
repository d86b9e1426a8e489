"""Operators that pick positions by an index tensor."""

import numpy as np
from torch import fx

from torchshear.dependency._axis import Axes, Axis
from torchshear.dependency._call import Call
from torchshear.dependency._registry import operator_rule
from torchshear.dependency.rules._elementwise import broadcast
from torchshear.graph._masks import mask_behind


@operator_rule("aten.index_select")
def _index_select(call: Call) -> Axes:
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    return (*x[:dim], _picked(call, x[dim], call.arg("index")), *x[dim + 1 :])


@operator_rule("aten.index.Tensor")
def _index(call: Call) -> Axes:
    """One constant row of positions, or of truth values, picks exactly; any other index leaves its axes whole."""
    x = call.axes("self")
    given = [(dim, node) for dim, node in enumerate(call.arg("indices")) if node is not None]
    dims = [dim for dim, _ in given]
    if len(given) == 1 and len(call.shape(given[0][1])) == 1:
        dim, node = given[0]
        row = _where_true(call, x[dim], node) if call.is_boolean(node) else _picked(call, x[dim], node)
        if row is not None:
            return (*x[:dim], row, *x[dim + 1 :])
    call.fix([x[dim] for dim in dims], "picked by an index tensor")
    rest = [axis for dim, axis in enumerate(x) if dim not in dims]
    rank = len(call.out_shape) - len(rest)
    adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
    at = dims[0] if adjacent else 0
    indices = [call.axes(node) for _, node in given]
    is_mask = any(len(axes) != rank for axes in indices)
    picked = (
        tuple(call.fixed(size, "picked by an index tensor") for size in call.out_shape[at : at + rank])
        if is_mask
        else broadcast(call, indices, call.out_shape[at : at + rank])
    )
    return (*rest[:at], *picked, *rest[at:])


def _where_true(call: Call, axis: Axis, mask: fx.Node) -> Axis | None:
    """The axis of positions where a mask is true, which loses what the axis does; None if the mask is computed."""
    values = call.constant(mask_behind(mask))
    if values is None:
        return None
    call.tie(axis, call.axes(mask)[0])
    return call.part(call.algebra.take(axis, np.flatnonzero(values)))


def _picked(call: Call, axis: Axis, index: fx.Node) -> Axis:
    """The axis of picked positions. A buffer of positions is renumbered when others go."""
    own = call.axes(index)[0]
    if call.algebra.is_fixed(axis):
        return own
    source = call.source(index)
    positions = call.constant(source) if source is not None else None
    if source is None or positions is None:
        call.fix([axis, own], "picked by an index that is computed or shared")
        return call.fixed(own.size, "picked by an index that is computed or shared")
    call.renumber(source, axis)
    return call.part(call.tie(own, call.algebra.take(axis, positions.astype(np.int64) % axis.size)))
