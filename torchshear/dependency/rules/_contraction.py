"""Matrix products: contracted axes are one, all others pass."""

import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod

from torch import fx

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._elementwise import broadcast
from torchshear.dependency.rules._findings import Result
from torchshear.dependency.rules._registry import operator_rule
from torchshear.dependency.rules._weights import weight_roles
from torchshear.graph._operator_record import Operator, Product, Shape


def _macs_of_layer(operands: Sequence[Shape], result: Shape) -> int:
    """Count for every output value one product with each weight of its row."""
    return prod(result) * prod(operands[1][1:])


def _macs_of_product(operands: Sequence[Shape], result: Shape) -> int:
    return prod(result) * operands[0][-1]


def _macs_of_added_product(operands: Sequence[Shape], result: Shape) -> int:
    return prod(result) * operands[1][-1]


@operator_rule(
    "aten.linear",
    operator=Operator(
        product=Product(left="input", right="weight", bias="bias", contracted=(-1, 1)), macs=_macs_of_layer
    ),
)
def _linear(call: Call) -> Axes:
    """Weight is (out, in); the last axis of the input is contracted with dimension 1."""
    x, weight = call.axes("input"), call.axes("weight")
    call.tie(weight[-1], x[-1])
    if not _is_state(call, call.arg("weight")):
        call.mix(x[-1])
    call.contract((call.arg("input"), call.arg("weight")), x[-1:], (x[:-1], weight[:-1]))
    if len(weight) == 1:
        return x[:-1]
    weight_roles(call, call.arg("weight"), (0,), (1,))
    if call.is_tensor("bias"):
        call.tie(weight[0], call.axes("bias")[-1])
        call.purpose("bias", bias=0)
    return (*x[:-1], weight[0])


@operator_rule("aten.embedding")
def _embedding(call: Call) -> Axes:
    """Weight is (entries, features); entries are chosen by data and stay."""
    weight = call.axes("weight")
    call.fix(weight[:1], "entries of a table that data chooses from")
    call.purpose("weight", embedding=1)
    operands = (call.arg("indices"), call.arg("weight"))
    call.contract(operands, weight[:1], (call.axes("indices"), weight[1:]), kind="lookup")
    return (*call.axes("indices"), weight[1])


@operator_rule("aten.embedding_bag")
def _embedding_bag(call: Call) -> Result:
    """Sums, means or maxima over the entries of each bag; the other results only count."""
    weight = call.axes("weight")
    call.fix(weight[:1], "entries of a table that data chooses from")
    call.purpose("weight", embedding=1)
    counts = [tuple(call.fixed_axis(size, "counted") for size in shape) for shape in call.out_shape[1:]]
    return [(call.fixed_axis(call.out_shape[0][0], "bags"), weight[1]), *counts]


@operator_rule("aten.bilinear")
def _bilinear(call: Call) -> Axes:
    """x1 W x2 for each output, with weight (out, in1, in2)."""
    left, right, weight = call.axes("input1"), call.axes("input2"), call.axes("weight")
    call.purpose("weight", out=0)
    call.tie(weight[1], left[-1])
    call.tie(weight[2], right[-1])
    if not _is_state(call, call.arg("weight")):
        call.mix(left[-1], right[-1])
    if call.is_tensor("bias"):
        call.tie(weight[0], call.axes("bias")[0])
        call.purpose("bias", bias=0)
    return (*broadcast(call, [left[:-1], right[:-1]], call.out_shape[:-1]), weight[0])


@operator_rule("aten.tensordot")
def _tensordot(call: Call) -> Axes:
    """The named dimensions of both are contracted in pairs; the others follow one another."""
    left, right = call.axes("self"), call.axes("other")
    over_left = [int(dim) % len(left) for dim in call.arg("dims_self")]
    over_right = [int(dim) % len(right) for dim in call.arg("dims_other")]
    for i, j in zip(over_left, over_right, strict=True):
        call.tie(left[i], right[j])
    if not _is_state(call, call.arg("self"), call.arg("other")):
        call.mix(*(left[i] for i in over_left))
    rest = [axis for dim, axis in enumerate(left) if dim not in over_left]
    return (*rest, *(axis for dim, axis in enumerate(right) if dim not in over_right))


@operator_rule("aten.inner")
def _inner(call: Call) -> Axes:
    left, right = call.axes("self"), call.axes("other")
    if not left or not right:
        return left or right
    call.tie(left[-1], right[-1])
    if not _is_state(call, call.arg("self"), call.arg("other")):
        call.mix(left[-1])
    return (*left[:-1], *right[:-1])


@operator_rule("aten.outer", "aten.ger", "aten.addr")
def _outer(call: Call) -> Axes:
    """Every position of one vector with every one of another."""
    *added, left, right = (call.axes(node) for node in call.tensor_args)
    return broadcast(call, [(left[0], right[0]), *added], call.out_shape)


@operator_rule("aten.kron")
def _kron(call: Call) -> Axes:
    """Each position of the first is a block of the second, in every dimension."""
    one = call.fixed_axis(1, "a new dimension")
    left, right = call.axes("self"), call.axes("other")
    rank = max(len(left), len(right))
    pairs = zip(((one,) * (rank - len(left)) + left), ((one,) * (rank - len(right)) + right), strict=True)
    return tuple(b if a.size == 1 else a if b.size == 1 else call.algebra.merge((a, b)) for a, b in pairs)


@operator_rule("aten.addmv")
def _added_vector(call: Call) -> Axes:
    added, left, right = call.tensor_args
    return broadcast(call, [_product(call, left, right), call.axes(added)], call.out_shape)


@operator_rule("aten.addbmm")
def _added_sum_of_products(call: Call) -> Axes:
    """Products of a batch of matrices, summed over the batch."""
    added, left, right = call.tensor_args
    a, b = call.axes(left), call.axes(right)
    call.mix(call.tie(a[0], b[0]), call.tie(a[2], b[1]))
    return broadcast(call, [(a[1], b[2]), call.axes(added)], call.out_shape)


@operator_rule("aten.linalg_multi_dot", "aten.chain_matmul")
def _chain(call: Call) -> Axes:
    first, *others = call.tensor_args
    product = call.axes(first)
    for node in others:
        right = call.axes(node)
        call.mix(call.tie(product[-1], right[0]))
        product = (*product[:-1], *right[1:])
    return product


@operator_rule("aten.matmul", operator=Operator(product=Product(left="self", right="other"), macs=_macs_of_product))
@operator_rule(
    "aten.mm", "aten.bmm", operator=Operator(product=Product(left="self", right="mat2"), macs=_macs_of_product)
)
@operator_rule("aten.mv", "aten.dot", "aten.vdot", operator=Operator(macs=_macs_of_product))
def _matmul(call: Call) -> Axes:
    left, right = call.tensor_args
    _matrix_roles(call, left, right)
    return _product(call, left, right)


@operator_rule(
    "aten.addmm",
    operator=Operator(product=Product(left="mat1", right="mat2", bias="self"), macs=_macs_of_added_product),
)
@operator_rule(
    "aten.baddbmm", operator=Operator(product=Product(left="batch1", right="batch2"), macs=_macs_of_added_product)
)
def _added_matmul(call: Call) -> Axes:
    added, left, right = call.tensor_args
    _matrix_roles(call, left, right)
    if len(call.axes(right)) == 2:
        call.purpose(added, bias=len(call.axes(added)) - 1)
    product = _product(call, left, right)
    return broadcast(call, [product, call.axes(added)], call.out_shape)


def _is_state(call: Call, *operands: object) -> bool:
    return any(call.state_name(node) is not None for node in operands)  # type: ignore[arg-type]


def _matrix_roles(call: Call, left: fx.Node, right: fx.Node) -> None:
    """A weight on the right is one matrix or several; on the left several: a single one may be what is read."""
    ranks = len(call.axes(left)), len(call.axes(right))
    if ranks[1] > 1:
        weight_roles(call, right, (ranks[1] - 1,), (ranks[1] - 2,))
    if ranks[0] > 2 and prod(call.shape(left)[:-2]) > 1:
        weight_roles(call, left, (ranks[0] - 2,), (ranks[0] - 1,))


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
    inputs, output = explicit_equation(call.arg("equation"), [len(call.axes(node)) for node in operands])
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
    for own, node in zip(inputs, operands, strict=True):
        reads = [at for at, letter in enumerate(own) if letter not in output and sum(letter in x for x in inputs) == 2]
        makes = [at for at, letter in enumerate(own) if letter in output and sum(letter in x for x in inputs) == 1]
        if reads and makes:
            weight_roles(call, node, makes, reads)
    return tuple(by_letter[letter] for letter in output)


def _sides(left: str, right: str, output: str, axes: Mapping[str, Axis]) -> tuple[Axes, tuple[Axes, Axes], Axes]:
    """Return the contracted axes of two terms, those of the left and of the right alone, and batch axes."""
    shared = [letter for letter in left if letter in right]
    alone = [tuple(axes[x] for x in term if x not in shared) for term in (left, right)]
    return (
        tuple(axes[letter] for letter in shared if letter not in output),
        (alone[0], alone[1]),
        tuple(axes[letter] for letter in shared if letter in output),
    )


def explicit_equation(equation: str, ranks: list[int]) -> tuple[list[str], str]:
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
