"""The registry of operators: one frozen record of what is known of each, beside the rule that relates its axes.

Records are registered together with the rules, in `torchshear/dependency/rules/`, one file for each kind of operator.
Code that has to know an operator (for roles, activations, costs, folding, rewriting) looks its record up and does not
compare names. The record does not hold what an operator gives without the cut positions of its operands: that is
`masked/_operators.py`, written apart, because the proof of a cut must share nothing with what it proves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from torchshear.errors import ArgumentError

Shape = tuple[int, ...]
MacsFormula = Callable[[Sequence[Shape], Any], int]  # of the shapes of operands and result; several results: a tuple

SourceDim = int | None  # a dimension of the operand; None for a new one
DimensionMap = Callable[[Mapping[str, Any], list[SourceDim]], list[SourceDim] | None]

Passing = Literal["copy", "conversion", "dropout", "layout", "choice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """An elementwise function behind a layer.

    Attributes:
        has_zeros: its results are exactly zero over a range of inputs.
        is_nonnegative: its results are never below zero.
        lower_bound: name of the argument that is the least result, which tells both of the above; "" if there is none.
    """

    has_zeros: bool = False
    is_nonnegative: bool = False
    lower_bound: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """An operator that normalises its operand, and then scales and shifts each channel.

    Attributes:
        over: what the statistics of the operand run over: "batch" (samples and space, for each channel), "space" (for
            each channel of each sample), "blocks" (blocks of channels and space) or "features" (the last dimensions).
        channels: the dimension along which scale, shift and running statistics lie; -1 for the last dimensions.
        input: name of the argument that is normalised.
        scale: name of the argument that the result is multiplied with; like all below "" if there is none.
        shift: name of the argument that is added to the result.
        mean: name of the running mean.
        variance: name of the running variance.
        own: name of the flag that says to take statistics of the operand in place of the running ones.
    """

    over: Literal["batch", "space", "blocks", "features"]
    channels: int
    input: str = "input"
    scale: str = "weight"
    shift: str = "bias"
    mean: str = ""
    variance: str = ""
    own: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """An operator that multiplies two operands and sums over one dimension of each: linear layers, convolutions.

    Attributes:
        left: name of the operand that a layer reads.
        right: name of the operand that is the weight of a layer. In a product of matrices it may be the other one.
        bias: name of the argument with one value for each output channel; "" if there is none.
        contracted: the dimensions of left and right that are summed over. Negative ones count from the last.
        channels: the dimension of the result along which the output channels lie, counted from the last.
    """

    left: str
    right: str
    bias: str = ""
    contracted: tuple[int, int] = (-1, -2)
    channels: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """A recurrent layer or cell.

    Attributes:
        n_gates: number of blocks of rows in its weights; each block has one row for each hidden unit.
        is_cell: it makes a single step.
        has_zeros: its results are exactly zero over a range of inputs, and never below zero.
    """

    n_gates: int
    is_cell: bool = False
    has_zeros: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """The facts about an operator that are known beside the rule for its axes. A default means: not known to be so.

    Attributes:
        passes: how it hands on the values of its first operand: as they are ("copy"); in another type or on another
            device ("conversion"); dropped and scaled in train mode ("dropout"); in another order, shape or number
            ("layout"); or at positions that an index picks ("choice").
        source_dims: for an operator that moves whole dimensions, a function of its arguments by name and of a list with
            one entry for each dimension of its first operand; it returns the entries of the dimensions of the result,
            None for a new dimension, or None altogether if it does more than move dimensions in this call.
        is_pointwise: each value is computed from the values at the same position.
        is_sum: it adds or subtracts two operands position by position.
        is_uniform: it makes a tensor with the same value everywhere.
        has_softmax: it takes a softmax.
        activation: it is an activation.
        norm: it is a norm.
        product: it multiplies two operands, and sums.
        recurrence: it is a recurrent layer or cell.
        macs: counts its multiply-accumulate operations.
    """

    passes: Passing | None = None
    source_dims: DimensionMap | None = None
    is_pointwise: bool = False
    is_sum: bool = False
    is_uniform: bool = False
    has_softmax: bool = False
    activation: Activation | None = None
    norm: Norm | None = None
    product: Product | None = None
    recurrence: Recurrence | None = None
    macs: MacsFormula | None = None

    @property
    def keeps_values(self) -> bool:
        """Return whether the values of the result are values of its first operand, whatever their order and type."""
        return self.passes in ("copy", "conversion", "layout")

    @property
    def keeps_positions(self) -> bool:
        """Return whether the result is its first operand, in another type or layout of memory at most."""
        return self.passes in ("copy", "conversion")


_UNKNOWN = Operator()
_POINTWISE = Operator(is_pointwise=True)
_OPERATORS: dict[str, Operator] = {}


def describe_operator(*names: str, operator: Operator) -> None:
    """Register what is known of operators.

    Args:
        names: operator names with namespace, as in "aten.conv2d"; all overloads are meant unless one is named, as in
            "aten.add.Tensor".
        operator: the record.

    Raises:
        ArgumentError: a name is described already, or is not "namespace.operator[.overload]".
    """
    for name in names:
        if not 2 <= len(name.split(".")) <= 3:
            raise ArgumentError(f"operator name {name!r}; expected 'namespace.operator' or with an overload.")
        if name in _OPERATORS:
            raise ArgumentError(f"operator {name!r} is described already, as {_OPERATORS[name]}.")
    _OPERATORS.update(dict.fromkeys(names, operator))


def forget_operator(name: str) -> None:
    """Forget what is known of an operator, if anything is."""
    _OPERATORS.pop(name, None)


def operator_named(name: str) -> Operator:
    """Look up an operator by its name, with or without overload. The record of an unknown one is empty."""
    return _OPERATORS.get(name) or _OPERATORS.get(".".join(name.split(".")[:2]), _UNKNOWN)


def node_macs(target: str, operands: Sequence[Shape], result: Any) -> int:
    """Count the multiply-accumulate operations of one operator call.

    Args:
        target: operator name, as in "aten.conv2d.default".
        operands: shapes of the tensor operands in order.
        result: shape of the result; a tuple of shapes for several results.

    Returns:
        The count for the whole batch; 0 for operators that are neither convolutions nor matrix products.
    """
    formula = operator_named(target).macs
    return formula(operands, result) if formula is not None else 0


def operator_of(node: fx.Node) -> Operator:
    """Look up the operator that a node calls. Elementwise ones that nobody described are known by torch's tag."""
    if node.op != "call_function":
        return _UNKNOWN
    known = operator_named(operator_name(node))
    if known is _UNKNOWN and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _POINTWISE
    return known


def operator_name(node: fx.Node) -> str:
    """Return the name of the operator that a node calls, as in "aten.conv2d.default"."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"python.{getattr(target, '__name__', target)}"
