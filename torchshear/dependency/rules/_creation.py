"""Operators that make values: constants may shrink, counted or random ones may not."""

from torch import fx

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import Result
from torchshear.dependency.rules._registry import operator_rule
from torchshear.graph._operator_record import Operator


@operator_rule(
    "aten.full",
    "aten.new_full",
    "aten.new_ones",
    "aten.new_zeros",
    "aten.ones",
    "aten.zeros",
    operator=Operator(is_uniform=True),
)
@operator_rule("aten.empty.memory_format", "aten.new_empty")
def _constant(call: Call) -> Axes:
    """The same value everywhere: any position can go, and the size follows."""
    axes: list[Axis] = []
    for i, given in enumerate(call.arg("size")):
        if isinstance(given, fx.Node) or given <= 1:
            axes.append(call.fixed_axis(call.out_shape[i], "a free dimension"))
        else:
            axes.append(call.algebra.virtual(given))
            call.edit_size("size", axes[-1], i)
    return tuple(axes)


@operator_rule(
    "aten.arange",
    "aten.bernoulli",
    "aten.linspace",
    "aten.meshgrid",
    "aten.rand",
    "aten.rand_like",
    "aten.randn",
    "aten.randn_like",
    "aten.scalar_tensor",
    "aten.eye",
    "aten.tril_indices",
    "aten.triu_indices",
)
def _counted(call: Call) -> Axes | list[Axes]:
    """Values that depend on their position, or are drawn at random, in whatever number."""
    for node in call.tensor_args:
        call.fix(call.axes(node), "decides the size of a counted or random value")
    if call.out_shape and isinstance(call.out_shape[0], tuple):
        return [tuple(call.fixed_axis(size, "counted") for size in shape) for shape in call.out_shape]
    return tuple(call.fixed_axis(size, "counted or random") for size in call.out_shape)


@operator_rule("aten.exponential_", "aten.normal_", "aten.uniform_", "aten.random_", "aten.bernoulli_")
def _drawn(call: Call) -> Result:
    return call.refuse("drawn at random, in whatever number")


@operator_rule("aten.sym_size")
def _size(call: Call) -> None:
    """A size that enters the computation must stay what it is."""
    axis = call.axes("self")[call.dim("dim", len(call.axes("self")))]
    call.fix([axis], "its size is used in the computation")


@operator_rule("aten.tril", "aten.triu")
def _triangle(call: Call) -> Axes:
    x = call.axes("self")
    call.fix(x[-2:], "masked by position")
    return x
