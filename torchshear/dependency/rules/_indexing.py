"""Operators that pick positions by an index tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

from torchshear.dependency.algebra._axis import Algebra, Axes, Axis
from torchshear.dependency.rules._call import Call, bind_arguments
from torchshear.dependency.rules._elementwise import broadcast
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._nodes import shape_of, unwrap_copies
from torchshear.graph._operator_record import Operator, SourceDim, operator_name, operator_of


def _with_rows(given: Mapping[str, Any], dims: list[SourceDim]) -> list[SourceDim]:
    return [None if at == int(given["dim"]) % len(dims) else dim for at, dim in enumerate(dims)]


def _with_indices(given: Mapping[str, Any], dims: list[SourceDim]) -> list[SourceDim] | None:
    if len(given["indices"]) != 1:
        return None
    return [None] * len(shape_of(given["indices"][0])) + dims[1:]


@operator_rule("aten.index_select", operator=Operator(passes="choice", source_dims=_with_rows))
def _index_select(call: Call) -> Axes:
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    return (*x[:dim], _pick(call, dim, call.arg("index")), *x[dim + 1 :])


@operator_rule("aten.index.Tensor", operator=Operator(passes="choice", source_dims=_with_indices))
def _index(call: Call) -> Axes:
    """Constant rows of positions, or one of truth values, pick exactly; any other index leaves its axes whole."""
    x = call.axes("self")
    given = [(dim, node) for dim, node in enumerate(call.arg("indices")) if node is not None]
    dims = [dim for dim, _ in given]
    if len(given) == 1 and len(call.shape(given[0][1])) == 1:
        dim, node = given[0]
        row = _where_true(call, x[dim], node) if call.is_boolean(node) else _pick(call, dim, node)
        if row is not None:
            return (*x[:dim], row, *x[dim + 1 :])
    rest = [axis for dim, axis in enumerate(x) if dim not in dims]
    rank = len(call.out_shape) - len(rest)
    adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
    at = dims[0] if adjacent else 0
    row = _pick_together(call, given)
    if row is not None:
        return (*rest[:at], row, *rest[at:])
    call.fix([x[dim] for dim in dims], "picked by an index tensor")
    indices = [call.axes(node) for _, node in given]
    is_mask = any(len(axes) != rank for axes in indices)
    picked = (
        tuple(call.fixed_axis(size, "picked by an index tensor") for size in call.out_shape[at : at + rank])
        if is_mask
        else broadcast(call, indices, call.out_shape[at : at + rank])
    )
    return (*rest[:at], *picked, *rest[at:])


def _where_true(call: Call, axis: Axis, mask: fx.Node) -> Axis | None:
    """The axis of positions where a mask is true, which loses what the axis does; None if the mask is computed."""
    values = call.constant(unwrap_copies(mask))
    if values is None:
        return None
    call.tie(axis, call.axes(mask)[0])
    return call.keep_some(call.algebra.take(axis, np.flatnonzero(values)))


def _pick(call: Call, dim: int, index: fx.Node) -> Axis:
    """The axis of picked positions. A buffer of positions is renumbered when others go."""
    own, axis = call.axes(index)[0], call.axes("self")[dim]
    if call.algebra.is_fixed(axis):
        return own
    source, positions = call.source(index), _constant_row(call, index, axis)
    if source is None or positions is None:
        call.fix([axis, own], "picked by an index that is computed or shared")
        return call.fixed_axis(own.size, "picked by an index that is computed or shared")
    call.renumber(source, axis)
    sides = [call.algebra.take(axis, row) for row in (positions, *_rows_met(call, dim, len(positions)))]
    return call.keep_some(
        call.tie(own, call.algebra.any_of(sides) if _leave_nothing_tied(call.algebra, sides) else sides[0])
    )


def _pick_together(call: Call, given: Sequence[tuple[int, fx.Node]]) -> Axis | None:
    """The axis of what constant rows pick in several dimensions at once, which goes with any of its positions.

    None where an index is computed or shared, or nothing that is picked from can be cut.
    """
    x = call.axes("self")
    sources = {call.source(node) for _, node in given}
    if None in sources or len(sources) < len(given) or all(call.algebra.is_fixed(x[dim]) for dim, _ in given):
        return None
    rows = [_constant_row(call, node, x[dim]) for dim, node in given]
    sides = [call.algebra.take(x[dim], row) for (dim, _), row in zip(given, rows, strict=True) if row is not None]
    if len(sides) < len(given) or len({side.size for side in sides}) > 1:
        return None
    picked = call.algebra.any_of(sides)
    for dim, node in given:
        source = call.source(node)
        assert source is not None
        call.renumber(source, x[dim])
        call.tie(call.axes(node)[0], picked)
    return call.keep_some(picked)


def _constant_row(call: Call, index: fx.Node, axis: Axis) -> npt.NDArray[np.int64] | None:
    """The positions along an axis that a constant row names, counted from the front; None for any other index."""
    source = call.source(index)
    values = None if source is None or call.is_boolean(index) else call.constant(source)
    return values.astype(np.int64) % axis.size if values is not None and values.ndim == 1 else None


def _rows_met(call: Call, dim: int, size: int) -> list[npt.NDArray[np.int64]]:
    """Rows of as many positions of the same dimension whose picks meet this one's position by position.

    So do the two sides of all pairs of channels, as in `x[:, rows] * x[:, columns]`.
    """
    x = call.arg("self")
    own = _elementwise_of(call.node)
    found = []
    for other in x.users:
        index = _row_of_pick(other, dim, len(call.shape(x)))
        if (
            other is not call.node
            and index is not None
            and call.shape(index) == (size,)
            and own & _elementwise_of(other)
        ):
            found.append(_constant_row(call, index, call.axes(x)[dim]))
    return [row for row in found if row is not None]


def _row_of_pick(node: fx.Node, dim: int, rank: int) -> fx.Node | None:
    """The index of a call that picks positions of one dimension alone; None for any other call."""
    given = bind_arguments(node)
    indices: dict[int, fx.Node] = {}
    if operator_name(node) == "aten.index_select.default":
        indices = {given["dim"] % rank: given["index"]}
    elif operator_name(node) == "aten.index.Tensor":
        indices = {place: index for place, index in enumerate(given["indices"]) if index is not None}
    return indices[dim] if indices.keys() == {dim} else None


def _elementwise_of(node: fx.Node) -> set[fx.Node]:
    """Calls that compute position by position with the value of a call, in one or more steps."""
    found: set[fx.Node] = set()
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user not in found and operator_of(user).is_pointwise:
            found.add(user)
            waiting += user.users
    return found


def _leave_nothing_tied(algebra: Algebra, sides: Sequence[Axis]) -> bool:
    """Return True if nothing could go, or only all together, once several axes are tied position by position."""
    if len(sides) == 1:
        return False
    trial = algebra.copy()
    for side in sides[1:]:
        trial.equate(sides[0], side, "tried")
    rows = trial.store.resolve(trial.concat(sides).units)
    return rows.shape[1] == 0 or bool((rows == rows[0]).all())
