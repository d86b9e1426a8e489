"""Values that are positions along an axis, as a router's choice of experts is: where they come from and who reads them.

Positions that are chosen by data stay meaningful when others go if everybody who reads them counts along the same axis:
an expert's number picks a row of a table, a column of a mask, a bin of a count. An operator that is not known to read
positions so fixes the axis.
"""

from collections.abc import Callable

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import UNCHANGED, Result
from torchshear.dependency.rules._normalization import reduce_axes
from torchshear.dependency.rules._registry import operator_rule, position_rule
from torchshear.dependency.rules._scattering import tie_others
from torchshear.dependency.rules._weights import weight_roles
from torchshear.graph._operator_record import Operator, Product


@operator_rule("aten.topk")
def _topk(call: Call) -> Result:
    """The largest values along an axis, and their positions; as many as there are must be left."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    call.mix(x[dim])
    call.at_least(x[dim], call.out_shape[0][dim])
    axes = (*x[:dim], call.fixed_axis(call.out_shape[0][dim], "chosen positions"), *x[dim + 1 :])
    call.gives_positions(x[dim], 1)
    return [axes, axes]


@operator_rule("aten.max.dim", "aten.min.dim")
def _extreme_with_position(call: Call) -> Result:
    x = call.axes("self")
    axes = reduce_axes(call, x, call.arg("dim"), bool(call.arg("keepdim")))
    call.gives_positions(x[call.dim("dim", len(x))], 1)
    return [axes, axes]


@operator_rule("aten.argmax", "aten.argmin")
def _position(call: Call) -> Axes:
    x, dim = call.axes("self"), call.arg("dim")
    if dim is None:
        call.fix(x, "positions along it are the result")
    else:
        call.gives_positions(x[dim % len(x)])
    return reduce_axes(call, x, dim, bool(call.arg("keepdim")))


@position_rule("torchshear.passing")
def _passed(call: Call, axis: Axis, rule: Callable[[Call], Result]) -> Result:
    """Operators that hand on the values of their first operand: these stay positions along the axis."""
    if call.positions(call.tensor_args[0]) is axis:
        call.gives_positions(axis)
    else:
        call.fix([axis], "positions along it are values that this operator computes with")
    return rule(call)


@position_rule("aten.sort")
def _sorted(call: Call, axis: Axis, rule: Callable[[Call], Result]) -> Result:
    """In order of their number; which stood where is no position along the axis."""
    call.gives_positions(axis, 0)
    return rule(call)


@position_rule("aten.one_hot")
def _one_hot(call: Call, axis: Axis, _: Callable[[Call], Result]) -> Result:
    """A new dimension that is the axis."""
    if call.out_shape[-1] != axis.size:
        call.fix([axis], "its positions are counted in another row")
        return (*call.axes("self"), call.fixed_axis(call.out_shape[-1], "classes"))
    call.mix(axis)
    call.edit_size("num_classes", axis)
    return (*call.axes("self"), axis)


@position_rule("aten.histc")
def _histogram(call: Call, axis: Axis, rule: Callable[[Call], Result]) -> Result:
    """Count how often each position is chosen, where every position has a bin of its own."""
    if (call.arg("bins"), call.arg("min"), call.arg("max")) != (axis.size, 0, axis.size - 1):
        call.fix([axis], "its positions are counted in other bins")
        return rule(call)
    call.mix(axis)
    call.edit_size("bins", axis)
    call.edit("max", lambda keep: UNCHANGED if keep(axis).all() else int(keep(axis).sum()) - 1)
    return (axis,)


@position_rule("aten.bincount")
def _count(call: Call, axis: Axis, rule: Callable[[Call], Result]) -> Result:
    if call.arg("minlength") != axis.size or call.out_shape != (axis.size,):
        call.fix([axis], "its positions are counted in other bins")
        return rule(call)
    call.mix(axis)
    call.edit_size("minlength", axis)
    return (axis,)


@position_rule("aten.index.Tensor")
def _index(call: Call, axis: Axis, rule: Callable[[Call], Result]) -> Result:
    """A row of a table for each position; or some of the positions, picked by others."""
    given = [(dim, node) for dim, node in enumerate(call.arg("indices")) if node is not None]
    if call.positions(call.arg("self")) is not None:
        if any(call.positions(node) is not None for _, node in given):
            call.fix([axis], "its positions pick positions")
        else:
            call.gives_positions(axis)
        return rule(call)
    dim, index = given[0]
    x = call.axes("self")
    if len(given) > 1 or x[dim].size != axis.size:
        call.fix([axis], "its positions are counted in another row")
        return rule(call)
    call.tie(x[dim], axis)
    call.mix(axis)
    return (*x[:dim], *call.axes(index), *x[dim + 1 :])


@position_rule("aten.embedding")
def _row(call: Call, axis: Axis, rule: Callable[[Call], Result]) -> Result:
    weight = call.axes("weight")
    if weight[0].size != axis.size:
        call.fix([axis], "its positions are counted in another row")
        return rule(call)
    call.tie(weight[0], axis)
    call.mix(axis)
    call.purpose("weight", out=0, embedding=1)
    return (*call.axes("indices"), weight[1])


@position_rule("aten.gather", "aten.scatter", "aten.scatter_")
def _along(call: Call, axis: Axis, rule: Callable[[Call], Result]) -> Result:
    """Values taken from, or written to, the positions along one dimension."""
    x, index = call.axes("self"), call.axes("index")
    dim = call.dim("dim", len(x))
    if call.positions(call.arg("index")) is None or x[dim].size != axis.size:
        call.fix([axis], "its positions are counted in another row")
        return rule(call)
    call.tie(x[dim], axis)
    call.mix(axis)
    if not call.is_tensor("src"):
        tie_others(call, [x, index], dim)
    else:
        source = call.axes("src")
        tie_others(call, [x, index, source], dim)
        call.tie(index[dim], source[dim])
    return index if "gather" in str(call.node.target) else x


@operator_rule("transformers.grouped_mm_fallback", operator=Operator(product=Product(left="input", right="weight")))
@operator_rule("aten._grouped_mm", operator=Operator(product=Product(left="self", right="mat2")))
def grouped_product(call: Call) -> Axes:
    """Runs of rows, each times the matrix of its own group: (rows, k) and (groups, k, n) give (rows, n).

    Where the runs end is told by a vector with one offset a group.
    """
    name, other = ("input", "weight") if call.is_tensor("input") else ("self", "mat2")
    x, weight, ends = call.axes(name), call.axes(other), call.axes("offs")
    if len(x) != 2 or len(weight) != 3 or call.is_tensor("bias"):
        raise ValueError("rows and one matrix a group are expected")
    call.mix(call.tie(weight[0], ends[0]))  # each run begins where the one before ends
    call.tie(weight[1], x[1])
    weight_roles(call, call.arg(other), (2,), (1,))
    call.contract((call.arg(name), call.arg(other)), (weight[1],), (x[:1], weight[2:]), weight[:1])
    return (x[0], weight[2])
