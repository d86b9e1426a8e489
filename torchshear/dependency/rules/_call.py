"""One operator call as its rule sees it: arguments by name, axes of the operands, and what the rule can demand."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from torchshear.dependency.algebra._axis import Algebra, Axes, Axis
from torchshear.dependency.rules._findings import (
    UNCHANGED,
    Balance,
    Edit,
    Facts,
    FixReason,
    Minimum,
    NewValue,
    Result,
    SizeFactor,
)
from torchshear.dependency.rules._read_values import digest_of, label_of
from torchshear.dependency.rules._role_evidence import ROLES, Contraction, Kind
from torchshear.graph import Graph
from torchshear.graph._nodes import shape_of, tensor_operands
from torchshear.graph._operator_record import operator_of
from torchshear.graph._run import arguments_by_name
from torchshear.graph.masked._call import masked_form


class Call:
    """An operator call under analysis.

    A rule reads arguments with `arg`, axes of operands with `axes`, relates them, and returns the axes of the result:
    a tuple of axes for a tensor, a list of such tuples for several tensors.
    """

    def __init__(self, node: fx.Node, graph: Graph, algebra: Algebra, facts: Facts) -> None:
        self.node = node
        self.graph = graph
        self.algebra = algebra
        self.carriers: Mapping[str, fx.Node] = facts.carriers
        self._facts = facts
        self._arguments = bind_arguments(node)

    def arg(self, name: str) -> Any:
        """Return an argument by its schema name, the default if it is not given."""
        return self._arguments.get(name)

    @property
    def tensor_args(self) -> list[fx.Node]:
        """All operands that are tensors, in order, each as often as it is given."""
        return tensor_operands(self.node)

    def is_tensor(self, name: str) -> bool:
        """Return True if an argument is given and is a tensor."""
        node = self.arg(name)
        return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)

    def axes(self, operand: str | fx.Node) -> Axes:
        """Return the axes of a tensor operand, given by schema name or node."""
        axes = self.raw_axes(operand)
        return tuple(self._one(axis) for axis in axes) if any(axis.rows for axis in axes) else axes

    def raw_axes(self, operand: str | fx.Node) -> Axes:
        """Return the axes of an operand with `Axis.rows` kept apart, for a rule that knows what they mean."""
        node = self.arg(operand) if isinstance(operand, str) else operand
        axes = self._facts.axes[node.name]
        assert isinstance(axes, tuple), f"{node.name} is not one tensor"
        return axes

    def _one(self, axis: Axis) -> Axis:
        """Tie the rows of an axis, for rules that see one axis for each dimension, and return it."""
        for row in axis.rows[1:]:
            self.tie(axis.rows[0], row)
        return axis.rows[0] if axis.rows else axis

    def shape(self, operand: str | fx.Node) -> tuple[int, ...]:
        """Return the sizes of a tensor operand, dynamic ones as in the capture."""
        node = self.arg(operand) if isinstance(operand, str) else operand
        shape = shape_of(node)
        assert isinstance(shape, tuple)
        return shape

    @property
    def out_shape(self) -> tuple[Any, ...]:
        """Sizes of the result; a tuple of tuples for several results."""
        shape = shape_of(self.node)
        assert isinstance(shape, tuple)
        return shape

    def is_dynamic(self, operand: str | fx.Node, dim: int) -> bool:
        """Return True if a dimension of an operand is dynamic (the batch)."""
        return self.graph.is_dynamic(self.arg(operand) if isinstance(operand, str) else operand, dim)

    def is_boolean(self, operand: fx.Node) -> bool:
        """Return True if a tensor operand holds truth values, as a mask does."""
        return bool(operand.meta["val"].dtype == torch.bool)

    def dim(self, name: str, rank: int) -> int:
        """Return a dimension argument, counted from the front."""
        return int(self.arg(name)) % max(rank, 1)

    def state_name(self, operand: str | fx.Node) -> str | None:
        """Return the name of the parameter or buffer that an operand is; None if it is computed."""
        node = self.arg(operand) if isinstance(operand, str) else operand
        return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def source(self, operand: fx.Node) -> fx.Node | None:
        """Find the buffer or literal that an operand is, also behind copies; None if something else reads it too."""
        while len(operand.users) == 1:
            if operand.op == "get_attr":
                return operand
            if operator_of(operand).passes != "copy":
                return None
            operand = operand.all_input_nodes[0]
        return None

    def constant(self, operand: fx.Node) -> npt.NDArray[Any] | None:
        """Return the values of an operand that is a buffer or literal, or None if it is computed or has no data.

        They decide what a plan does from here on: it is refused where a model or a checkpoint has others.
        """
        name = self.state_name(operand)
        entry = self.graph.state.get(name) if name else None
        if name is None or entry is None or entry.kind == "parameter" or entry.tensor.is_meta:
            return None
        self._facts.values[label_of(self.graph, name)] = digest_of(entry.tensor)
        return np.asarray(entry.tensor.detach().cpu().numpy())

    def tie(self, left: Axis, right: Axis) -> Axis:
        """Tie two axes position by position."""
        return self.algebra.equate(left, right, FixReason("tied to what cannot be cut", self.node))

    def fix(self, axes: Sequence[Axis], why: str) -> None:
        """Fix axes; the reason names this call."""
        self.algebra.fix(axes, FixReason(why, self.node))

    def refuse(self, why: str) -> Result:
        """Fix all that the call touches, and return the axes of the result. The reason names this call."""
        for node in self.tensor_args:
            self.fix(self.axes(node), why)
        if isinstance(self.node.meta.get("val"), Tensor):
            return tuple(self.fixed_axis(size, why) for size in self.out_shape)
        return [tuple(self.fixed_axis(size, why) for size in shape or ()) for shape in self.out_shape]

    def fixed_axis(self, size: int, why: str = "computed") -> Axis:
        """Return a fixed axis; the reason names this call."""
        return self.algebra.fixed_axis(size, FixReason(why, self.node))

    def balance(self, axis: Axis, n_blocks: int) -> None:
        """Demand that each of `n_blocks` equal blocks of the axis loses equally many positions."""
        self._facts.balances.append(Balance(axis, n_blocks, self.node))

    def equally_wide(self, axes: Sequence[Axis]) -> None:
        """Demand that axes of one size, of different tensors, lose equally many positions, each of its own choice."""
        if len(axes) > 1:
            self._facts.balances.append(Balance(self.algebra.concat(axes), len(axes), self.node, is_joint=True))

    def at_least(self, axis: Axis, count: int) -> None:
        """Demand that `count` positions of the axis stay."""
        self._facts.minimums.append(Minimum(axis, count, self.node))

    def keep_some(self, axis: Axis) -> Axis:
        """Demand that something stays of an axis, as of a part cut from another; return the axis."""
        self._facts.nonempty.append(axis)
        return axis

    def mix(self, *axes: Axis) -> None:
        """Note that the values at one position of the axes depend on the others (a norm, a softmax, a mean).

        What such an operator gives without the cut positions can be proved only by its masked form; an operator without
        one keeps the axes whole.
        """
        if masked_form(self.node) is None:
            self.fix(axes, "its positions are mixed by an operator without a masked form")
        self._facts.cross_channel.setdefault(self.node.name, []).extend(axes)

    def block(self, operand: str, dim: int, axis: Axis, n_blocks: int) -> None:
        """Say that dimension `dim` of a weight holds, in block b of its dimension 0, block b of `axis`."""
        name = self.state_name(operand)
        assert name is not None
        known = self._facts.blocked.get(name)
        if known is not None:
            self.tie(known[1], axis)
        self._facts.blocked[name] = (dim, axis, n_blocks)

    def purpose(self, operand: str | fx.Node, **purposes: int) -> None:
        """Say what dimensions of a weight are for: `call.purpose("weight", out=0)` adds "out" to dimension 0."""
        node = self.arg(operand) if isinstance(operand, str) else operand
        name = self.state_name(self.carriers.get(getattr(node, "name", ""), node))
        if name is not None:
            for purpose, dim in purposes.items():
                self._facts.purposes.setdefault((name, dim), set()).add(purpose.rstrip("_"))

    def one_layer(self, weights: Sequence[fx.Node]) -> None:
        """Say that weights make the same units together, as one layer."""
        names = [name for name in map(self.state_name, weights) if name is not None]
        for name in names:
            self._facts.layers.setdefault(name, names[0])

    def contract(
        self,
        operands: tuple[fx.Node, fx.Node],
        contracted: Axes,
        free: tuple[Axes, Axes],
        batch: Axes = (),
        kind: Kind = "product",
    ) -> None:
        """Say that two operands are multiplied and summed over axes, from which the roles of groups are told.

        Args:
            operands: left and right operand; this call's own node stands for a product made inside it.
            contracted: axes that are summed over.
            free: axes that only the left, and that only the right operand has.
            batch: axes that both have and the result keeps.
            kind: see `Contraction`.
        """
        found = Contraction(kind, operands, contracted, free[0], free[1], batch)
        self._facts.contractions.setdefault(self.node.name, []).append(found)

    def declare_role(self, role: str, *axes: Axis) -> None:
        """Say what role axes have where the algebra cannot tell, as in `call.declare_role("hidden", state)`."""
        assert role in ROLES, f"role {role!r}; expected one of {', '.join(ROLES)}"
        self._facts.declared_roles.setdefault(role, []).extend(axes)

    def results_of(self, node: fx.Node) -> list[Axes]:
        """Return the axes of each result of a node that gives several."""
        results = self._facts.axes[node.name]
        assert isinstance(results, list), f"{node.name} is one tensor"
        return results

    def positions(self, operand: fx.Node) -> Axis | None:
        """Return the axis of which the values of an operand are positions, chosen by data; None if they are not."""
        return self._facts.index_axes.get(operand.name)

    def gives_positions(self, axis: Axis, result: int | None = None) -> None:
        """Say that the values of the result, or of one of several, are positions along an axis."""
        if not self.algebra.is_fixed(axis):
            self._facts.index_axes[self.node.name if result is None else f"{self.node.name}:{result}"] = axis

    def renumber(self, index: fx.Node, axis: Axis) -> None:
        """Say that a buffer holds positions of `axis`, to be counted anew when some are cut."""
        name = self.state_name(index)
        assert name is not None
        self._facts.positions[name] = axis

    def edit(self, name: str, value: NewValue, index: int | None = None) -> None:
        """Have an argument replaced by `value(keep)` when units are cut."""
        self._facts.edits.setdefault(self.node.name, []).append(Edit(name, index, value))

    def edit_call(self, value: NewValue) -> None:
        """Have the whole call replaced by `value(keep)`: name and arguments of an operator, or UNCHANGED."""
        self._facts.edits.setdefault(self.node.name, []).append(Edit("call", None, value))

    def edit_count(self, name: str, part: slice, axis: Axis, index: int | None = None) -> None:
        """Have a literal argument become the number of positions kept in a part of an axis, if the axis loses any."""
        counted = self.algebra.take(axis, part)
        self.edit(name, lambda keep: UNCHANGED if keep(axis).all() else int(keep(counted).sum()), index)

    def edit_size(self, name: str, axis: Axis, index: int | None = None) -> None:
        """Have a size argument follow an axis. A computed size is scaled; -1 and fixed sizes stay as they are.

        A sum is not scaled, as a batch with some rows more: its axis is fixed.
        """
        given = self.arg(name) if index is None else self.arg(name)[index]
        if isinstance(given, int) and given < 0:
            return
        if isinstance(given, fx.Node) and given.target is operator.add:
            self.fix([axis], "a size that is computed as a sum")
        elif isinstance(given, fx.Node):
            self.edit(name, lambda keep: SizeFactor(axis.size, int(keep(axis).sum())), index)
        else:
            self.edit(name, lambda keep: UNCHANGED if keep(axis).all() else int(keep(axis).sum()), index)


def bind_arguments(node: fx.Node) -> Mapping[str, Any]:
    """Return the arguments of a call by schema name with defaults; of plain Python functions by position."""
    return arguments_by_name(node.target, node.args, node.kwargs)
