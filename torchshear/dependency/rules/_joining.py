"""Operators that join values along an axis or cut one into several: rows of positions joined and cut."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from torch import fx

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import Keep, Result
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._operator_record import Operator, SourceDim


@operator_rule("aten.cat", "aten.concat", "aten.concatenate")
def _cat(call: Call) -> Axes:
    operands = [call.axes(node) for node in call.arg("tensors") if call.shape(node) != (0,)]
    return _join(call, operands, call.dim("dim", len(operands[0])))


def _join(call: Call, operands: list[Axes], dim: int) -> Axes:
    rank = len(operands[0])
    result: list[Axis] = []
    for i in range(rank):
        if i == dim:
            result.append(call.algebra.concat([axes[i] for axes in operands]))
        else:
            for axes in operands[1:]:
                call.tie(operands[0][i], axes[i])
            result.append(operands[0][i])
    return tuple(result)


@operator_rule("aten.hstack", "aten.vstack", "aten.row_stack", "aten.dstack", "aten.column_stack")
def _stacked_in_place(call: Call) -> Axes:
    """Joined along a dimension that exists, after values of low rank are given more dimensions of size 1."""
    how = str(call.node.target).split(".")[1]
    operands = [call.axes(node) for node in call.arg("tensors")]
    if how == "column_stack":
        operands = [(*axes, call.fixed_axis(1, "a new dimension")) if len(axes) == 1 else axes for axes in operands]
        return _join(call, operands, 1)
    dim, rank = {"hstack": (1, 1), "dstack": (2, 3)}.get(how, (0, 2))
    operands = [at_least(call, axes, rank) for axes in operands]
    return _join(call, operands, min(dim, len(operands[0]) - 1))


def at_least(call: Call, axes: Axes, rank: int) -> Axes:
    """Axes with dimensions of size 1 added as NumPy does: in front, and for three dimensions behind as well."""
    one = call.fixed_axis(1, "a new dimension")
    if len(axes) >= rank:
        return axes
    if rank == 3:
        return {0: (one, one, one), 1: (one, *axes, one), 2: (*axes, one)}[len(axes)]
    return (*(one,) * (rank - len(axes)), *axes)


@operator_rule("aten.atleast_1d", "aten.atleast_2d", "aten.atleast_3d")
def _at_least(call: Call) -> Result:
    rank = int(str(call.node.target).split("_")[1][0])
    results = [at_least(call, call.axes(node), rank) for node in call.tensor_args]
    return results if call.arg("tensors") is not None else results[0]


@operator_rule("aten.block_diag")
def _block_diag(call: Call) -> Axes:
    """Matrices along a diagonal: rows and columns of all, one after another, zeros elsewhere."""
    matrices = [at_least(call, call.axes(node), 2) for node in call.arg("tensors")]
    rows, columns = zip(*matrices, strict=True)
    return (call.algebra.concat(rows), call.algebra.concat(columns))


@operator_rule("aten.stack")
def _stack(call: Call) -> Axes:
    operands = [call.axes(node) for node in call.arg("tensors")]
    dim = call.dim("dim", len(operands[0]) + 1)
    for axes in operands[1:]:
        for mine, other in zip(operands[0], axes, strict=True):
            call.tie(mine, other)
    return (*operands[0][:dim], call.fixed_axis(len(operands), "values put side by side"), *operands[0][dim:])


@operator_rule(
    "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split", "aten.unsafe_chunk", "aten.unsafe_split"
)
def _split(call: Call) -> Result:
    """Whatever the call names (sizes, a size, a count), it becomes a split into the sizes that are left."""
    return _parts(call, call.dim("dim", len(call.axes("self"))))


@operator_rule("aten.hsplit", "aten.vsplit", "aten.dsplit")
def _split_along_its_own(call: Call) -> Result:
    dim = {"hsplit": 1, "vsplit": 0, "dsplit": 2}[str(call.node.target).split(".")[1]]
    return _parts(call, min(dim, len(call.axes("self")) - 1))


def _parts(call: Call, dim: int) -> Result:
    x = call.axes("self")
    sizes = [shape[dim] for shape in call.out_shape]
    if call.is_dynamic("self", dim):
        return [(*x[:dim], call.fixed_axis(size, "a part of a free dimension"), *x[dim + 1 :]) for size in sizes]
    stops = list(accumulate(sizes))
    starts = [stop - size for size, stop in zip(sizes, stops, strict=True)]
    parts = [call.keep_some(call.algebra.take(x[dim], slice(*ends))) for ends in zip(starts, stops, strict=True)]

    def rewrite(keep: Keep) -> tuple[str, tuple[object, ...]]:
        return "aten.split_with_sizes.default", (call.arg("self"), [int(keep(part).sum()) for part in parts], dim)

    call.edit_call(rewrite)
    return [(*x[:dim], part, *x[dim + 1 :]) for part in parts]


@operator_rule("aten.unbind")
def _unbind(call: Call) -> Result:
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    call.fix([x[dim]], "each position becomes a value of its own")
    return [(*x[:dim], *x[dim + 1 :]) for _ in call.out_shape]


def _without_one(given: Mapping[str, Any], dims: list[SourceDim]) -> list[SourceDim]:
    dim = int(given["dim"]) % len(dims)
    return dims[:dim] + dims[dim + 1 :]


@operator_rule("aten.select.int", operator=Operator(passes="layout", source_dims=_without_one))
def _select(call: Call) -> Axes:
    """The selected position stays; others may go, and the index moves up."""
    x = call.raw_axes("self")
    dim, index = call.dim("dim", len(x)), call.arg("index")
    if dim == 0 and isinstance(index, int):
        x = tuple(axis.rows[index] if axis.rows else axis for axis in x)
    else:
        x = call.axes("self")
    if isinstance(index, fx.Node):
        call.fix([x[dim]], "selected by a computed index")
    elif call.is_dynamic("self", dim):
        call.fix([x[dim]], "a free dimension")
    else:
        index %= x[dim].size
        call.fix([call.algebra.take(x[dim], slice(index, index + 1))], "selected by its index")
        call.edit_count("index", slice(0, index), x[dim])
    return (*x[:dim], *x[dim + 1 :])


@operator_rule("aten.slice.Tensor", operator=Operator(passes="layout"))
def _slice(call: Call) -> Axes:
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    start, stop, step = call.arg("start"), call.arg("end"), call.arg("step")
    size, out_size = x[dim].size, call.out_shape[dim]
    if call.is_dynamic("self", dim) or any(isinstance(value, fx.Node) for value in (start, stop, step)):
        call.fix([x[dim]], "sliced at a computed position")
        return (*x[:dim], call.fixed_axis(out_size, "sliced at a computed position"), *x[dim + 1 :])
    start, stop, _ = slice(start, stop, step).indices(size)
    if (start, out_size) == (0, size):
        return x
    taken = call.keep_some(call.algebra.take(x[dim], slice(start, stop, step)))
    if step > 1:
        _take_every(call, x[dim], start, step)
    else:
        call.edit_count("start", slice(0, start), x[dim])
        call.edit_count("end", slice(0, stop), x[dim])
    return (*x[:dim], taken, *x[dim + 1 :])


def _take_every(call: Call, axis: Axis, start: int, step: int) -> None:
    """Every step-th position: whole runs of `step` go together, so that start and step stay as they are."""
    if axis.size % step == 0 and start < step and call.arg("end") in (None, axis.size, 2**63 - 1):
        _, inside = call.algebra.factor(axis, (axis.size // step, step))
        call.fix([inside], "every so many positions are taken")
        call.edit_size("end", axis)
    else:
        call.fix([axis], "every so many positions are taken")


@operator_rule("aten.narrow", operator=Operator(passes="layout"))
def _narrow(call: Call) -> Axes:
    x = call.axes("self")
    dim, start, length = call.dim("dim", len(x)), call.arg("start"), call.arg("length")
    if not isinstance(start, int) or not isinstance(length, int):
        call.fix([x[dim]], "sliced at a computed position")
        return (*x[:dim], call.fixed_axis(call.out_shape[dim], "sliced at a computed position"), *x[dim + 1 :])
    start %= x[dim].size
    taken = call.keep_some(call.algebra.take(x[dim], slice(start, start + length)))
    call.edit_count("start", slice(0, start), x[dim])
    call.edit_size("length", taken)
    return (*x[:dim], taken, *x[dim + 1 :])


@operator_rule("aten.select_scatter")
def _select_scatter(call: Call) -> Axes:
    """A copy with one position written anew; that one stays, and its index moves up."""
    x, source = call.axes("self"), call.axes("src")
    dim = call.dim("dim", len(x))
    for axis, other in zip((*x[:dim], *x[dim + 1 :]), source, strict=True):
        call.tie(axis, other)
    index = call.arg("index")
    if isinstance(index, fx.Node) or call.is_dynamic("self", dim):
        call.fix([x[dim]], "written at a computed index")
    else:
        index %= x[dim].size
        call.fix([call.algebra.take(x[dim], slice(index, index + 1))], "written at its index")
        call.edit_count("index", slice(0, index), x[dim])
    return x


@operator_rule("aten.slice_scatter")
def _slice_scatter(call: Call) -> Axes:
    """A copy with a run of positions written anew, one for one."""
    x, source = call.axes("self"), call.axes("src")
    dim, given = call.dim("dim", len(x)), [call.arg(name) for name in ("start", "end", "step")]
    for i, (axis, other) in enumerate(zip(x, source, strict=True)):
        if i != dim:
            call.tie(axis, other)
    is_computed = call.is_dynamic("self", dim) or any(isinstance(value, fx.Node) for value in given)
    if is_computed or given[2] != 1:
        call.fix([x[dim], source[dim]], "written at a computed position or every so many")
        return x
    start, stop, _ = slice(*given).indices(x[dim].size)
    call.keep_some(call.tie(call.algebra.take(x[dim], slice(start, stop)), source[dim]))
    call.edit_count("start", slice(0, start), x[dim])
    call.edit_count("end", slice(0, stop), x[dim])
    return x


@operator_rule("aten.unfold.default")
def _windows(call: Call) -> Axes:
    x = call.axes("self")
    dim = call.dim("dimension", len(x))
    call.fix([x[dim]], "cut into windows")
    window = call.fixed_axis(call.out_shape[-1], "window")
    return (*x[:dim], call.fixed_axis(call.out_shape[dim], "windows"), *x[dim + 1 :], window)


@operator_rule("python.getitem")
def _getitem(call: Call) -> Result:
    return call.results_of(call.arg("0"))[int(call.arg("1"))]
