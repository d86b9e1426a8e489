"""The calls of a graph that read weights, and over which dimensions they sum."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from torchshear.dependency._call import bind_arguments
from torchshear.dependency._registry import operator_name
from torchshear.dependency.rules._contraction import explicit_equation
from torchshear.graph import Graph
from torchshear.graph._graph import shape_of, tensor_operands
from torchshear.pruners.statistics._recurrent import is_recurrent, passes

_PRODUCTS = frozenset({"addmm", "matmul", "mm", "bmm", "baddbmm"})  # of the last two operands
_SUMMED = {  # dimensions of the input and of the weight
    "linear": (-1, 1),
    **{f"conv{rank}d": (1, 1) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": (1, 0) for rank in (1, 2, 3)},
}


@dataclass(frozen=True, slots=True)
class Layer:
    """A call that reads a weight.

    Attributes:
        node: name of the call.
        weight: canonical name of its weight.
        bias: canonical name of its bias, or "".
        source: name of the node that it reads, or of a value inside a recurrent call.
        dim: dimension of what it reads that it sums over, from 0; None for a norm, a depthwise or another layer.
        inputs: dimension of its weight that it sums over, from 0; None where `dim` is.
    """

    node: str
    weight: str
    bias: str
    source: str
    dim: int | None
    inputs: int | None


def find_layers(graph: Graph) -> Iterator[Layer]:
    """All calls that read a weight and perhaps a bias; of a recurrent call each of its weights."""
    for node in graph:
        operands = list(node.all_input_nodes) if node.op == "call_function" else []
        held = [n for n in operands if is_state(n)]
        computed = [n for n in operands if not is_state(n) and isinstance(n.meta.get("val"), Tensor)]
        if not held or not computed:
            continue
        if is_recurrent(node):
            yield from _layers_of_passes(node)
            continue
        weight = next((n for n in held if len(shape_of(n)) > 1), held[0])  # `addmm` has the bias first
        others = [n for n in held if n is not weight and len(shape_of(n)) == 1]
        bias = str(others[0].target) if others else ""
        yield Layer(node.name, str(weight.target), bias, *_read(node, weight, computed))


def is_state(node: fx.Node) -> bool:
    """Whether a node is a parameter, buffer or constant."""
    return node.op == "get_attr"


def short_name(node: fx.Node) -> str:
    """Name of an operator of torch without its overload, "" of any other."""
    parts = operator_name(node).split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "aten" else ""


def _layers_of_passes(node: fx.Node) -> Iterator[Layer]:
    """Both weights of each layer and direction of a recurrent call, and that of a projection."""
    for one in passes(node):
        biases = (*one.biases, "", "")
        for weight, bias, source in zip(one.weights, biases, (one.source, one.before, ""), strict=False):
            if weight:
                yield Layer(node.name, weight, bias, source, *((one.dim, 1) if source else (None, None)))


def _read(node: fx.Node, weight: fx.Node, computed: Sequence[fx.Node]) -> tuple[str, int | None, int | None]:
    """What a call multiplies a weight with, and the dimensions of both that it sums over if that is one pair."""
    name, ranks = short_name(node), (len(shape_of(computed[0])), len(shape_of(weight)))
    if name == "einsum":
        return _read_by_equation(node, weight, computed)
    if name in _PRODUCTS:
        left, right = tensor_operands(node)[-2:]
        if right is weight:
            return left.name, len(shape_of(left)) - 1, max(ranks[1] - 2, 0)
        return right.name, max(len(shape_of(right)) - 2, 0), ranks[1] - 1
    if name not in _SUMMED:
        return computed[0].name, None, None
    dims = _SUMMED[name]
    return computed[0].name, dims[0] % ranks[0], min(dims[1], ranks[1] - 1)


def _read_by_equation(
    node: fx.Node, weight: fx.Node, computed: Sequence[fx.Node]
) -> tuple[str, int | None, int | None]:
    operands = tensor_operands(node)
    terms, output = explicit_equation(bind_arguments(node)["equation"], [len(shape_of(n)) for n in operands])
    own = terms[operands.index(weight)]
    for other, term in zip(operands, terms, strict=True):
        summed = [letter for letter in own if letter in term and letter not in output]
        summed = [letter for letter in summed if sum(letter in each for each in terms) == 2]
        if other in computed and len(summed) == 1:
            return other.name, term.index(summed[0]), own.index(summed[0])
    return computed[0].name, None, None
