"""Operators that gather from or write to positions that an index tensor names, one axis at a time."""

from collections.abc import Sequence

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._elementwise import broadcast
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._operator_record import Operator


def tie_others(call: Call, operands: Sequence[Axes], dim: int) -> None:
    """Tie all axes but `dim`; an operand that covers only the first positions of an axis holds it whole."""
    for i in range(len(operands[0])):
        if i == dim:
            continue
        axes = [axes[i] for axes in operands]
        if len({axis.size for axis in axes}) > 1:
            call.fix(axes, "only its first positions are indexed")
        for other in axes[1:]:
            if other.size == axes[0].size:
                call.tie(axes[0], other)


@operator_rule("aten.gather", operator=Operator(passes="choice"))
def _gather(call: Call) -> Axes:
    """out[.., i, ..] = x[.., index[.., i, ..], ..]: along `dim` data chooses, all other axes are those of both."""
    x, index = call.axes("self"), call.axes("index")
    dim = call.dim("dim", len(x))
    call.fix([x[dim]], "its positions are chosen by an index tensor")
    tie_others(call, [x, index], dim)
    return index


@operator_rule("aten.take_along_dim", operator=Operator(passes="choice"))
def _take_along(call: Call) -> Axes:
    """Gather, with axes other than `dim` broadcast."""
    x, index = call.axes("self"), call.axes("indices")
    if call.arg("dim") is None:
        call.fix([*x, *index], "chosen from a flat row")
        return tuple(call.fixed_axis(size, "chosen from a flat row") for size in call.out_shape)
    dim = call.dim("dim", len(x))
    call.fix([x[dim]], "its positions are chosen by an index tensor")
    picked = index[dim]
    aligned: list[Axes] = [(*axes[:dim], picked, *axes[dim + 1 :]) for axes in (x, index)]
    return broadcast(call, aligned, call.out_shape)


@operator_rule("aten.scatter", "aten.scatter_", "aten.scatter_add", "aten.scatter_add_", "aten.scatter_reduce")
def _scatter(call: Call) -> Axes:
    """x[.., index[.., i, ..], ..] = source[.., i, ..]: the mirror image of gather."""
    x, index = call.axes("self"), call.axes("index")
    dim = call.dim("dim", len(x))
    call.fix([x[dim]], "its positions are chosen by an index tensor")
    if call.is_tensor("src"):
        source = call.axes("src")
        tie_others(call, [x, index, source], dim)
        _tie_first(call, index[dim], source[dim])
    else:
        tie_others(call, [x, index], dim)
    return x


def _tie_first(call: Call, index: Axis, source: Axis) -> None:
    if index.size == source.size:
        call.tie(index, source)
    else:
        call.fix([index, source], "only its first positions are read")


@operator_rule("aten.index_add", "aten.index_add_", "aten.index_copy", "aten.index_copy_", "aten.index_reduce")
def _index_add(call: Call) -> Axes:
    """Whole slices of a source are written at the positions that a vector names."""
    x, source = call.axes("self"), call.axes("source")
    dim = call.dim("dim", len(x))
    call.fix([x[dim]], "its positions are chosen by an index tensor")
    tie_others(call, [x, source], dim)
    call.tie(source[dim], call.axes("index")[0])
    return x


@operator_rule("aten.index_fill", "aten.index_fill_")
def _index_fill(call: Call) -> Axes:
    x = call.axes("self")
    call.fix([x[call.dim("dim", len(x))]], "its positions are chosen by an index tensor")
    return x


@operator_rule("aten.index_put", "aten.index_put_")
def _index_put(call: Call) -> Axes:
    """Axes with an index are chosen by data; the values lie along the others, which follow the index's own axes."""
    x, values = call.axes("self"), call.axes("values")
    given = [(dim, node) for dim, node in enumerate(call.arg("indices")) if node is not None]
    dims = [dim for dim, _ in given]
    if any(call.is_boolean(node) and len(call.shape(node)) > 1 for _, node in given):
        call.fix([*x, *values], "written where a mask of several dimensions says")
        return x
    call.fix([x[dim] for dim in dims], "its positions are chosen by an index tensor")
    rest = [axis for dim, axis in enumerate(x) if dim not in dims]
    if dims != list(range(dims[0], dims[0] + len(dims))):
        call.fix([*rest, *values], "written at indices that are apart")
        return x
    rank = max(len(call.shape(node)) for _, node in given)
    chosen = [None] * rank
    for axis, value in zip([*rest[dims[0] :][::-1], *chosen, *rest[: dims[0]][::-1]], values[::-1], strict=False):
        if axis is None:
            call.fix([value], "written at the positions of an index tensor")
        elif axis.size == value.size:
            call.tie(axis, value)
    return x


@operator_rule("aten.one_hot")
def _one_hot(call: Call) -> Axes:
    return (*call.axes("self"), call.fixed_axis(call.out_shape[-1], "classes"))


@operator_rule("aten.bucketize.Tensor")
def _bucketize(call: Call) -> Axes:
    call.fix(call.axes("boundaries"), "boundaries that values are sorted into")
    return call.axes("self")
