"""Products of two linear layers in a graph, such as the logits of attention: where they are, and which numbers meet."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules._call import bind_arguments
from torchshear.dependency.rules._contraction import explicit_equation
from torchshear.dependency.rules._findings import Facts
from torchshear.graph._nodes import ancestors, is_from_state, is_written
from torchshear.graph._operator_record import operator_name, operator_of
from torchshear.speedup.compensation._stored_parts import SPLITS
from torchshear.speedup.rewriting._slicing import select_kept

Lookup = Callable[[fx.Node], Any]
_ATTENTION: Final = "aten.scaled_dot_product_attention"
_SCALINGS: Final = ("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar")
_OTHER_OPERATORS: Final = (
    "what it multiplies is changed on the way from its layers (rotated, normalised, ...), so each was fitted to its "
    "own kept dimensions"
)


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One operand of a product.

    Attributes:
        operand: what the product reads.
        linear: the linear layer that it comes from.
        path: calls between, in order; they move and scale values.
        dim: dimension of the operand that is summed over.
    """

    operand: fx.Node
    linear: fx.Node
    path: tuple[fx.Node, ...]
    dim: int


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """A product of what two linear layers give, summed over dimensions some of which are cut.

    Attributes:
        node: the call.
        queries: its left side.
        keys: its right side.
    """

    node: fx.Node
    queries: Side
    keys: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        """Return both sides."""
        return self.queries, self.keys

    def recomputed(self) -> list[str]:
        """Return the names of the calls that change with the layers, in order."""
        nodes = {node for side in self.sides for node in (side.linear, *side.path)}
        return [node.name for node in sorted(nodes)]

    def needed(self) -> set[str]:
        """Return the names of all values that must be known until the product is computed."""
        nodes = {node for side in self.sides for node in (side.linear, *side.path)}
        return {each.name for node in nodes for each in (node, *(a for o in node.all_input_nodes for a in _sources(o)))}

    def arrange(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the operands as matrices, of shape (n, rows, dimensions), that are multiplied pair by pair."""
        given = bind_arguments(self.node)
        if operator_name(self.node).startswith("aten.einsum"):
            return _by_equation(given["equation"], queries, keys)
        if not operator_name(self.node).startswith(_ATTENTION):
            keys = keys.mT
        if given.get("enable_gqa"):
            keys = keys.repeat_interleave(queries.shape[-3] // keys.shape[-3], -3)
        n_lead = max(queries.ndim, keys.ndim) - 2
        leads = zip(*((*[1] * (n_lead + 2 - one.ndim), *one.shape[:-2]) for one in (queries, keys)), strict=True)
        lead = [max(sizes) for sizes in leads]
        found = [value.expand(*lead, *value.shape[-2:]).flatten(0, -3) for value in (queries, keys)]
        return found[0], found[1]


def find_logits(node: fx.Node, facts: Facts, cut: Cut) -> Logits | str:
    """Find the layers behind a product that sums over dimensions some of which are cut.

    Args:
        node: a call of the captured network.
        facts: what the rules noted of it.
        cut: the units that were removed.

    Returns:
        The product; the reason why its layers cannot be fitted together; "" for any other call.
    """
    operands = _operands(node)
    if operands is None or any(is_from_state(operand) for operand, _ in operands):
        return ""
    sides = []
    for operand, dim in operands:
        axes = facts.axes.get(operand.name)
        if not isinstance(axes, tuple) or any(axis.rows for axis in axes) or not cut.changes(axes[dim]):
            return ""
        side = _side_of(operand, dim)
        if side is None:
            return _OTHER_OPERATORS
        sides.append(side)
    if any(is_written(each) for side in sides for each in (side.linear, *side.path)):
        return "what it multiplies is written to"
    return Logits(node, *sides)


def _operands(node: fx.Node) -> tuple[tuple[fx.Node, int], tuple[fx.Node, int]] | None:
    """Return both operands of a product of batches of matrices, each with its dimension that is summed over."""
    given, product, name = bind_arguments(node) if node.op == "call_function" else {}, operator_of(node).product, ""
    if node.op == "call_function":
        name = operator_name(node)
    if name.startswith(_ATTENTION):
        left, right, dims = given["query"], given["key"], (-1, -1)
    elif name.startswith("aten.einsum") and len(given["tensors"]) == 2:
        left, right = given["tensors"]
        found = _summed_letter(given["equation"], left, right)
        if found is None:
            return None
        dims = found
    elif product is not None and product.contracted == (-1, -2):
        left, right, dims = given[product.left], given[product.right], product.contracted
    else:
        return None
    both = (left, right)
    if not all(isinstance(one, fx.Node) and one.meta["val"].ndim >= 3 for one in both):
        return None
    return (left, dims[0] % left.meta["val"].ndim), (right, dims[1] % right.meta["val"].ndim)


def _terms(equation: str, left: int, right: int) -> tuple[str, str, str]:
    (one, other), output = explicit_equation(equation, [left, right])
    return one, other, output


def _summed_letter(equation: str, left: fx.Node, right: fx.Node) -> tuple[int, int] | None:
    """Return the dimensions of both operands that an einsum sums over; None unless it is a product of matrices."""
    one, other, output = _terms(equation, left.meta["val"].ndim, right.meta["val"].ndim)
    summed = [letter for letter in one if letter in other and letter not in output]
    alone = [letter for own, rest in ((one, other), (other, one)) for letter in own if letter not in rest]
    is_plain = all(len(set(term)) == len(term) for term in (one, other)) and set(alone) <= set(output)
    if not is_plain or len(summed) != 1:
        return None
    return one.index(summed[0]), other.index(summed[0])


def _by_equation(equation: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    one, other, output = _terms(equation, left.ndim, right.ndim)
    shared = [letter for letter in one if letter in other and letter in output]
    found = []
    for own, rest, value in ((one, other, left), (other, one, right)):
        rows = [letter for letter in own if letter not in rest]
        (summed,) = (letter for letter in own if letter in rest and letter not in output)
        moved = value.permute([own.index(letter) for letter in (*shared, *rows, summed)])
        n, length = moved.shape[: len(shared)].numel(), moved.shape[len(shared) : -1].numel()
        found.append(moved.reshape(n, length, moved.shape[-1]))
    return found[0], found[1]


def _side_of(operand: fx.Node, dim: int) -> Side | None:
    """Go back from an operand to its linear layer; None where calls between do more than move and scale values."""
    path: list[fx.Node] = []
    node = operand
    while is_moving(node) or is_scaling(node):
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    product = operator_of(node).product
    if product is None or not operator_name(node).startswith(("aten.linear", "aten.addmm", "aten.mm", "aten.matmul")):
        return None
    return Side(operand, node, tuple(reversed(path)), dim)


def is_moving(node: fx.Node) -> bool:
    """Check that a call gives values of its first operand in another order, shape or number; sizes may be computed."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    others = [each for each in node.all_input_nodes if each is not node.args[0]]
    if any(isinstance(each.meta.get("val"), Tensor) for each in others):
        return False
    known = operator_of(node)
    is_part = node.target is operator.getitem or ".".join(operator_name(node).split(".")[:2]) in SPLITS
    return known.keeps_values or is_part


def is_scaling(node: fx.Node) -> bool:
    """Check that a call multiplies a value with a number, or divides it by one."""
    is_known = node.op == "call_function" and operator_name(node) in _SCALINGS and not node.kwargs
    return is_known and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int | float)


def move(node: fx.Node, value: Any, lookup: Lookup) -> Any:
    """Make a call that moves values with numbers in their place; one that scales or converts them leaves them.

    Args:
        node: the call.
        value: what it reads.
        lookup: returns a size that another call computed.
    """
    if is_scaling(node) or operator_of(node).passes == "conversion":
        return value
    args, kwargs = fx.map_arg((node.args[1:], dict(node.kwargs)), lookup)
    return node.target(value, *args, **kwargs)  # type: ignore[operator]


def places(side: Side, path: Mapping[str, fx.Node], shape: torch.Size, lookup: Lookup) -> Tensor:
    """Return for each value of an operand its place in the flattened result of the layer.

    Args:
        side: the operand.
        path: the calls of one of the networks by name.
        shape: of the result of the layer.
        lookup: returns a size that another call computed.
    """
    value: Any = torch.arange(shape.numel()).reshape(shape)
    for node in side.path:
        value = move(path[node.name], value, lookup)
    found: Tensor = value
    return found


def keep_others(side: Side, value: Tensor, facts: Facts, cut: Cut) -> Tensor:
    """Select the kept positions of an operand along all dimensions but the one that is summed over."""
    axes = facts.axes[side.operand.name]
    assert isinstance(axes, tuple), "looked at when the product was found"
    rest = tuple(axis for dim, axis in enumerate(axes) if dim != side.dim)
    return select_kept(value.movedim(side.dim, -1), rest, cut).movedim(-1, side.dim)


def leaks(logits: Logits, linear: fx.Node, channels: Tensor, shape: torch.Size, lookup: Lookup) -> bool:
    """Check that something else reads outputs of a layer that a product reads.

    Args:
        logits: the product.
        linear: the layer, in the captured network.
        channels: outputs of it that the product reads.
        shape: of its result.
        lookup: returns a size that another call computed.
    """
    inside = {node for side in logits.sides for node in side.path} | {logits.node}
    is_read = torch.zeros(shape[-1], dtype=torch.bool)
    is_read[channels] = True
    waiting: list[tuple[fx.Node, Any]] = [(linear, is_read.expand(shape).contiguous())]
    while waiting:
        node, value = waiting.pop()
        for user, found in _users(node, value, lookup):
            if found is None:
                if user not in inside and _has_any(value):
                    return True
            elif _has_any(found):
                waiting.append((user, found))
    return False


def _has_any(value: Any) -> bool:
    return any(bool(part.any()) for part in (value if isinstance(value, list | tuple) else [value]))


def _users(node: fx.Node, value: Any, lookup: Lookup) -> Iterator[tuple[fx.Node, Any]]:
    """Give the calls that read a value, each with what it gives; None where it does more than move and scale."""
    for user in node.users:
        if user.op == "output" or isinstance(user.meta.get("val"), Tensor | list | tuple):
            is_plain = (is_moving(user) or is_scaling(user)) and user.args[0] is node
            yield user, move(user, value, lookup) if is_plain else None


def _sources(operand: fx.Node) -> list[fx.Node]:
    """Return an operand, and all that it is computed of if that is the model's own."""
    return ancestors(operand) if is_from_state(operand) else [operand]
