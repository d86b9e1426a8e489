"""Matrix products: contracted axes are one, all others pass."""

import string
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations

from torch import fx

from torchshear.dependency._axis import Axes, Axis
from torchshear.dependency._call import Call
from torchshear.dependency._registry import operator_rule
from torchshear.dependency.rules._elementwise import broadcast


@operator_rule("aten.linear")
def _linear(call: Call) -> Axes:
    """Weight is (out, in); the last axis of the input is contracted with dimension 1."""
    x, weight = call.axes("input"), call.axes("weight")
    call.tie(weight[-1], x[-1])
    call.contract((call.arg("input"), call.arg("weight")), x[-1:], (x[:-1], weight[:-1]))
    if len(weight) == 1:
        return x[:-1]
    call.role("weight", out=0, in_=1)
    if call.is_tensor("bias"):
        call.tie(weight[0], call.axes("bias")[-1])
        call.role("bias", bias=0)
    return (*x[:-1], weight[0])


@operator_rule("aten.embedding")
def _embedding(call: Call) -> Axes:
    """Weight is (entries, features); entries are chosen by data and stay."""
    weight = call.axes("weight")
    call.fix(weight[:1], "entries of a table that data chooses from")
    call.role("weight", embedding=1)
    operands = (call.arg("indices"), call.arg("weight"))
    call.contract(operands, weight[:1], (call.axes("indices"), weight[1:]), kind="lookup")
    return (*call.axes("indices"), weight[1])


@operator_rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot")
def _matmul(call: Call) -> Axes:
    left, right = call.tensor_args
    if len(call.axes(right)) == 2:
        call.role(right, in_=0, out=1)
    return _product(call, left, right)


@operator_rule("aten.addmm", "aten.baddbmm")
def _added_matmul(call: Call) -> Axes:
    added, left, right = call.tensor_args
    if len(call.axes(right)) == 2:
        call.role(right, in_=0, out=1)
        call.role(added, bias=len(call.axes(added)) - 1)
    product = _product(call, left, right)
    return broadcast(call, [product, call.axes(added)], call.out_shape)


def _is_state(call: Call, *operands: object) -> bool:
    return any(call.state_name(node) is not None for node in operands)  # type: ignore[arg-type]


def _product(call: Call, left_node: fx.Node, right_node: fx.Node) -> Axes:
    """Contract the last axis of the left with the last but one of the right operand; leading axes are broadcast."""
    left, right = call.axes(left_node), call.axes(right_node)
    inner = right[-2] if len(right) > 1 else right[0]
    call.tie(left[-1], inner)
    if not _is_state(call, left_node, right_node):
        call.mix(inner)
    columns = right[-1:] if len(right) > 1 else ()
    rows = left[-2:-1]
    n_batch = len(call.out_shape) - len(rows) - len(columns)
    batch = broadcast(call, [left[:-2], right[:-2]], call.out_shape[:n_batch])
    both, alone = _shared_batch(left[:-2], right[:-2], batch)
    call.contract((left_node, right_node), (inner,), ((*alone[0], *rows), (*alone[1], *columns)), both)
    return (*batch, *rows, *columns)


def _shared_batch(left: Axes, right: Axes, batch: Axes) -> tuple[Axes, tuple[Axes, Axes]]:
    """Leading axes of a product that both operands have, and those that only the left and only the right one has."""
    sides: dict[tuple[bool, bool], list[Axis]] = defaultdict(list)
    for back, axis in zip(range(len(batch), 0, -1), batch, strict=True):
        in_left, in_right = (len(own) >= back and own[-back].size == axis.size for own in (left, right))
        sides[in_left, in_right].append(axis)
    return tuple(sides[True, True]), (tuple(sides[True, False]), tuple(sides[False, True]))


@operator_rule("aten.einsum")
def _einsum(call: Call) -> Axes:
    """Axes under one letter are one; an ellipsis stands for leading axes that are broadcast."""
    operands = call.tensor_args
    inputs, output = _explicit_equation(call.arg("equation"), [len(call.axes(node)) for node in operands])
    by_letter: dict[str, Axis] = {}
    for letters, node in zip(inputs, operands, strict=True):
        for letter, axis in zip(letters, call.axes(node), strict=True):
            known = by_letter.setdefault(letter, axis)
            if known.size == axis.size:
                call.tie(known, axis)
            elif known.size == 1:
                by_letter[letter] = axis
    if not _is_state(call, *operands):
        call.mix(*(axis for letter, axis in by_letter.items() if letter not in output))
    for (left, left_node), (right, right_node) in combinations(zip(inputs, operands, strict=True), 2):
        call.contract((left_node, right_node), *_sides(left, right, output, by_letter))
    return tuple(by_letter[letter] for letter in output)


def _sides(left: str, right: str, output: str, axes: Mapping[str, Axis]) -> tuple[Axes, tuple[Axes, Axes], Axes]:
    """Of two terms of an equation: contracted axes, axes of the left and of the right alone, and batch axes."""
    shared = [letter for letter in left if letter in right]
    alone = [tuple(axes[x] for x in term if x not in shared) for term in (left, right)]
    return (
        tuple(axes[letter] for letter in shared if letter not in output),
        (alone[0], alone[1]),
        tuple(axes[letter] for letter in shared if letter in output),
    )


def _explicit_equation(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Write an equation with letters for the ellipsis and with its output."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    n_hidden = max(rank - len(term.replace("...", "")) for term, rank in zip(inputs, ranks, strict=True))
    hidden = "".join(unused[:n_hidden])
    if not arrow:
        letters = sorted(letter for letter in set(left) - set(".,") if left.count(letter) == 1)
        output = ("..." if "..." in left else "") + "".join(letters)
    explicit = []
    for term, rank in zip(inputs, ranks, strict=True):
        own = rank - len(term.replace("...", ""))
        explicit.append(term.replace("...", hidden[n_hidden - own :] if own else ""))
    return explicit, output.replace("...", hidden)
