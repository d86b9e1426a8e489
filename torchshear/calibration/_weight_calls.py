"""The calls of a graph that read weights, and over which dimensions they sum."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from torchshear.calibration._recurrent import is_recurrent, passes
from torchshear.dependency import ChannelGroups
from torchshear.dependency.rules._call import bind_arguments
from torchshear.dependency.rules._contraction import explicit_equation
from torchshear.dependency.rules._weights import weight_behind
from torchshear.graph._nodes import is_from_state, shape_of, tensor_operands
from torchshear.graph._operator_record import operator_name, operator_of


@dataclass(frozen=True, slots=True)
class WeightCall:
    """A call that reads a weight.

    Attributes:
        node: name of the call.
        weight: canonical name of its weight.
        bias: canonical name of its bias, or "".
        source: name of the node that it reads, or of a value inside a recurrent call.
        dim: dimension of what it reads that it sums over, from 0; None for a norm or another layer.
        inputs: dimension of its weight that it sums over, from 0; None where `dim` is.
        output: what the weight makes: the node, or sums inside a recurrent call.
    """

    node: str
    weight: str
    bias: str
    source: str
    dim: int | None
    inputs: int | None
    output: str


def find_weight_calls(groups: ChannelGroups) -> Iterator[WeightCall]:
    """All calls that read a weight and perhaps a bias; of a recurrent call each of its weights."""
    carriers = groups.facts.carriers
    for node in groups.graph:
        if node.op == "call_function" and not is_from_state(node):
            yield from _calls_of_passes(node) if is_recurrent(node) else _calls_of(node, carriers)


def _calls_of(node: fx.Node, carriers: Mapping[str, fx.Node]) -> Iterator[WeightCall]:
    is_product = operator_of(node).product is not None or _is_einsum(node)
    are_read = {n: is_product or is_state(n) or n.name in carriers for n in node.all_input_nodes}
    behind = {n: weight_behind(n, carriers) if is_read else None for n, is_read in are_read.items()}
    held = {n: found for n, found in behind.items() if found is not None}
    computed = [n for n in behind if n not in held and isinstance(n.meta.get("val"), Tensor)]
    if not held or not computed:
        return
    operand = next((n for n in held if len(shape_of(n)) > 1), next(iter(held)))  # `addmm` has the bias first
    others = [n for n in held if n is not operand and len(shape_of(n)) == 1]
    source, dim, at = _read(node, operand, computed)
    weight, places = held[operand]
    inputs = None if at is None else places[at]
    bias = str(held[others[0]][0].target) if others else ""
    yield WeightCall(node.name, str(weight.target), bias, source, None if inputs is None else dim, inputs, node.name)


def is_state(node: fx.Node) -> bool:
    """Return whether a node is a parameter, buffer or constant."""
    return node.op == "get_attr"


def _is_einsum(node: fx.Node) -> bool:
    return operator_name(node) == "aten.einsum.default"


def _calls_of_passes(node: fx.Node) -> Iterator[WeightCall]:
    """Both weights of each layer and direction of a recurrent call, and that of a projection."""
    for one in passes(node):
        biases = (*one.biases, "", "")
        for weight, bias, source in zip(one.weights, biases, (one.source, one.before, ""), strict=False):
            if weight:
                dim, inputs = (one.dim, 1) if source else (None, None)
                yield WeightCall(node.name, weight, bias, source, dim, inputs, one.sums)


def _read(node: fx.Node, weight: fx.Node, computed: Sequence[fx.Node]) -> tuple[str, int | None, int | None]:
    """Return the operand that a call multiplies a weight with, and the dimensions of both that it sums over.

    The dimensions are None unless it sums over one pair of them.
    """
    if _is_einsum(node):
        return _read_by_equation(node, weight, computed)
    product = operator_of(node).product
    if product is None:
        return computed[0].name, None, None
    given = bind_arguments(node)
    operands = [given[product.left], given[product.right]]
    if weight not in operands:  # what is added
        return computed[0].name, None, None
    own = operands.index(weight)
    over = [_dimension(dim, len(shape_of(operand))) for dim, operand in zip(product.contracted, operands, strict=True)]
    return operands[1 - own].name, over[1 - own], over[own]


def _dimension(dim: int, rank: int) -> int:
    """A dimension counted from the front; the last or first one where there are too few."""
    return min(dim, rank - 1) if dim >= 0 else max(dim + rank, 0)


def _read_by_equation(
    node: fx.Node, weight: fx.Node, computed: Sequence[fx.Node]
) -> tuple[str, int | None, int | None]:
    operands = tensor_operands(node)
    terms, output = explicit_equation(bind_arguments(node)["equation"], [len(shape_of(n)) for n in operands])
    own = terms[operands.index(weight)]
    for other, term in zip(operands, terms, strict=True):
        sum_over_processes = [letter for letter in own if letter in term and letter not in output]
        sum_over_processes = [letter for letter in sum_over_processes if sum(letter in each for each in terms) == 2]
        if other in computed and len(sum_over_processes) == 1:
            return other.name, term.index(sum_over_processes[0]), own.index(sum_over_processes[0])
    return computed[0].name, None, None
