"""Operators that join values along an axis or cut one into several: rows of positions joined and cut."""

from itertools import accumulate

from torch import fx

from torchshear.dependency._axis import Axes, Axis
from torchshear.dependency._call import Call, Keep, Result
from torchshear.dependency._registry import operator_rule


@operator_rule("aten.cat", "aten.concat")
def _cat(call: Call) -> Axes:
    operands = [call.axes(node) for node in call.arg("tensors") if call.shape(node) != (0,)]
    rank = len(operands[0])
    dim = call.dim("dim", rank)
    result: list[Axis] = []
    for i in range(rank):
        if i == dim:
            result.append(call.algebra.concat([axes[i] for axes in operands]))
        else:
            for axes in operands[1:]:
                call.tie(operands[0][i], axes[i])
            result.append(operands[0][i])
    return tuple(result)


@operator_rule("aten.stack")
def _stack(call: Call) -> Axes:
    operands = [call.axes(node) for node in call.arg("tensors")]
    dim = call.dim("dim", len(operands[0]) + 1)
    for axes in operands[1:]:
        for mine, other in zip(operands[0], axes, strict=True):
            call.tie(mine, other)
    return (*operands[0][:dim], call.fixed(len(operands), "values put side by side"), *operands[0][dim:])


@operator_rule(
    "aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split", "aten.unsafe_chunk", "aten.unsafe_split"
)
def _split(call: Call) -> Result:
    """Whatever the call names (sizes, a size, a count), it becomes a split into the sizes that are left."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    sizes = [shape[dim] for shape in call.out_shape]
    if call.is_free("self", dim):
        return [(*x[:dim], call.fixed(size, "a part of a free dimension"), *x[dim + 1 :]) for size in sizes]
    stops = list(accumulate(sizes))
    starts = [stop - size for size, stop in zip(sizes, stops, strict=True)]
    parts = [call.part(call.algebra.take(x[dim], slice(*ends))) for ends in zip(starts, stops, strict=True)]

    def rewritten(keep: Keep) -> tuple[str, tuple[object, ...]]:
        return "aten.split_with_sizes.default", (call.arg("self"), [int(keep(part).sum()) for part in parts], dim)

    call.edit_call(rewritten)
    return [(*x[:dim], part, *x[dim + 1 :]) for part in parts]


@operator_rule("aten.unbind")
def _unbind(call: Call) -> Result:
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    call.fix([x[dim]], "each position becomes a value of its own")
    return [(*x[:dim], *x[dim + 1 :]) for _ in call.out_shape]


@operator_rule("aten.select.int")
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
    elif call.is_free("self", dim):
        call.fix([x[dim]], "a free dimension")
    else:
        index %= x[dim].size
        call.fix([call.algebra.take(x[dim], slice(index, index + 1))], "selected by its index")
        call.edit_count("index", slice(0, index), x[dim])
    return (*x[:dim], *x[dim + 1 :])


@operator_rule("aten.slice.Tensor")
def _slice(call: Call) -> Axes:
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    start, stop, step = call.arg("start"), call.arg("end"), call.arg("step")
    size, out_size = x[dim].size, call.out_shape[dim]
    if call.is_free("self", dim) or any(isinstance(value, fx.Node) for value in (start, stop, step)):
        call.fix([x[dim]], "sliced at a computed position")
        return (*x[:dim], call.fixed(out_size, "sliced at a computed position"), *x[dim + 1 :])
    start, stop, _ = slice(start, stop, step).indices(size)
    if (start, out_size) == (0, size):
        return x
    taken = call.part(call.algebra.take(x[dim], slice(start, stop, step)))
    if step > 1:
        _strided(call, x[dim], start, step)
    else:
        call.edit_count("start", slice(0, start), x[dim])
        call.edit_count("end", slice(0, stop), x[dim])
    return (*x[:dim], taken, *x[dim + 1 :])


def _strided(call: Call, axis: Axis, start: int, step: int) -> None:
    """Every step-th position: whole runs of `step` go together, so that start and step stay as they are."""
    if axis.size % step == 0 and start < step and call.arg("end") in (None, axis.size, 2**63 - 1):
        _, inside = call.algebra.factor(axis, (axis.size // step, step))
        call.fix([inside], "every so many positions are taken")
        call.edit_size("end", axis)
    else:
        call.fix([axis], "every so many positions are taken")


@operator_rule("aten.narrow")
def _narrow(call: Call) -> Axes:
    x = call.axes("self")
    dim, start, length = call.dim("dim", len(x)), call.arg("start"), call.arg("length")
    if not isinstance(start, int) or not isinstance(length, int):
        call.fix([x[dim]], "sliced at a computed position")
        return (*x[:dim], call.fixed(call.out_shape[dim], "sliced at a computed position"), *x[dim + 1 :])
    start %= x[dim].size
    taken = call.part(call.algebra.take(x[dim], slice(start, start + length)))
    call.edit_count("start", slice(0, start), x[dim])
    call.edit_size("length", taken)
    return (*x[:dim], taken, *x[dim + 1 :])


@operator_rule("aten.unfold.default")
def _windows(call: Call) -> Axes:
    x = call.axes("self")
    dim = call.dim("dimension", len(x))
    call.fix([x[dim]], "cut into windows")
    window = call.fixed(call.out_shape[-1], "window")
    return (*x[:dim], call.fixed(call.out_shape[dim], "windows"), *x[dim + 1 :], window)


@operator_rule("python.getitem")
def _getitem(call: Call) -> Result:
    return call.results_of(call.arg("0"))[int(call.arg("1"))]
