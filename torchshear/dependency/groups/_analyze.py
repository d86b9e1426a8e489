"""Walk a graph once in execution order, apply each operator's rule, and form channel groups from what it says."""

import operator
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, fx

from torchshear._arguments import check_kind
from torchshear.dependency import rules as _rules  # registers the rules of the ATen operators
from torchshear.dependency.algebra._axis import Algebra, Axes
from torchshear.dependency.groups._balance import settle_balances
from torchshear.dependency.groups._computed_weights import carrier_of
from torchshear.dependency.groups._grouping import form_groups
from torchshear.dependency.groups._groups import ChannelGroups
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._facts import Facts, Result
from torchshear.dependency.rules._registry import Rule, find_position_rule, find_rule
from torchshear.graph import Graph, check_outputs, matches, output_nodes
from torchshear.graph._nodes import has_data_dependent_shape, shape_of

assert _rules


def analyze(graph: Graph, prunable_outputs: str | Collection[str] = ()) -> ChannelGroups:
    """Find out which channels of a network must be cut together, and which cannot be cut.

    Needs shapes only: the model may live on the meta device.

    Args:
        graph: the captured model, from `torchshear.trace`.
        prunable_outputs: names of outputs whose dimensions may shrink, all others stay as they are: keys of a
            dictionary or fields of a dataclass, places in a tuple, joined by dots as in "features.3"; or patterns such
            as "features.*". A single output is called "0".

    Returns:
        The channel groups, in order of appearance of their first parameter.

    Raises:
        ArgumentError: `graph` is no captured graph, or the model has no such output.
    """
    check_kind("graph", graph, Graph, "a captured graph, from torchshear.trace")
    algebra, facts = Algebra(), Facts()
    prunable = check_outputs(graph, prunable_outputs)
    relate(graph, algebra, facts, prunable)
    training = None
    if graph.training is not None:
        training = facts.for_other_graph()
        relate(graph.training, algebra, training, prunable)
    pin(graph, algebra, facts)
    settle_balances(algebra, facts)
    return replace(form_groups(graph, algebra, facts, training), prunable_outputs=prunable)


def relate_graph(groups: ChannelGroups, graph: Graph) -> ChannelGroups:
    """The same groups with another graph over the same parameters, such as one of a single part, in place of theirs."""
    algebra, facts = groups.algebra.copy(), groups.facts.copy().for_other_graph()
    for name in [name for name, entry in groups.graph.state.items() if entry.kind == "constant"]:
        for table in (facts.state_axes, facts.blocked, facts.positions):  # the other graph has constants of its own
            table.pop(name, None)
    relate(graph, algebra, facts)
    training = None
    if graph.training is not None:
        training = facts.for_other_graph()
        relate(graph.training, algebra, training)
    pin(graph, algebra, facts)
    return replace(groups, graph=graph, algebra=algebra, facts=facts, training_facts=training)


def pin(graph: Graph, algebra: Algebra, facts: Facts) -> None:
    """Fix parameters and buffers of parts that the rest of the model holds or reads as well, and what follows them."""
    for name, reason in (graph.parts.pinned if graph.parts is not None else {}).items():
        algebra.fix(facts.state_axes.get(name, ()), reason)
        if name in facts.blocked:
            algebra.fix([facts.blocked[name][1]], reason)
        if name in facts.positions:
            algebra.fix([facts.positions[name]], reason)


def relate(graph: Graph, algebra: Algebra, facts: Facts, prunable_outputs: Collection[str] = ()) -> None:
    """Apply the rules of all operators of a graph.

    Args:
        graph: the captured model.
        algebra: relations, added to.
        facts: what the rules note, added to.
        prunable_outputs: patterns of names of outputs that may shrink.
    """
    walker = _Walker(graph, algebra, facts, prunable_outputs)
    for node in graph:
        walker.visit(node)


class _Walker:
    """Visits nodes and records the axes of their values."""

    def __init__(self, graph: Graph, algebra: Algebra, facts: Facts, prunable_outputs: Collection[str]) -> None:
        self.prunable_outputs = prunable_outputs
        self.graph = graph
        self.algebra = algebra
        self.facts = facts
        self._inputs = graph.describe_inputs()

    def visit(self, node: fx.Node) -> None:
        """Give the node's value its axes."""
        if node.op == "placeholder":
            self.facts.axes[node.name] = self._input(node)
        elif node.op == "get_attr":
            self.facts.axes[node.name] = self._state(str(node.target))
        elif node.op == "output":
            self._outputs()
        elif _gives_tensors(node) or str(node.target) == "aten.sym_size.int":
            self.facts.axes[node.name] = self._call(node)
            carrier = carrier_of(node, self.algebra, self.facts)
            if carrier is not None:
                self.facts.carriers[node.name] = carrier

    def _input(self, node: fx.Node) -> Result:
        shape = shape_of(node)
        if not isinstance(shape, tuple):
            return None
        return tuple(
            self.algebra.fixed_axis(size, f"{self._inputs[node.name]}, dimension {dim}")
            for dim, size in enumerate(shape)
        )

    def _state(self, name: str) -> Axes:
        if name not in self.facts.state_axes:
            shape = self.graph.state[name].shape
            self.facts.state_axes[name] = tuple(self.algebra.fresh(size) for size in shape)
        return self.facts.state_axes[name]

    def _outputs(self) -> None:
        """Fix what the model gives, but for outputs that may shrink, of which the batch alone is."""
        parts, in_mode = self.graph.output_parts(), " in train mode" if self.graph.mode == "train" else ""
        for number, (name, value) in enumerate(output_nodes(self.graph)):
            what = f"output of part {parts[number]!r}" if parts else f"model output {name}{in_mode}"
            axes = self.facts.axes.get(value.name) if isinstance(value, fx.Node) else None
            pointer = self.facts.index_axes.get(value.name) if isinstance(value, fx.Node) else None
            self.algebra.fix([] if pointer is None else [pointer], f"positions along it are {what}")
            if not isinstance(axes, tuple):
                for part in axes or ():
                    self.algebra.fix(part, what)
                continue
            is_prunable = any(matches(pattern, name) for pattern in self.prunable_outputs)
            for dim, axis in enumerate(axes):
                if not is_prunable or self.graph.is_dynamic(value, dim):
                    self.algebra.fix([axis], what)
                for row in axis.rows[1:]:  # one tensor keeps the same positions in each row
                    self.algebra.equate(axis.rows[0], row, what)

    def _call(self, node: fx.Node) -> Result:
        call = Call(node, self.graph, self.algebra, self.facts)
        rule = find_rule(node)
        if rule is None:
            return call.refuse("operator without a rule")
        try:
            return _checked(call, self._with_positions(call, rule))
        except _MISFITS as error:  # a call that its rule does not foresee is as good as unknown, and reported as such
            self.facts.edits.pop(node.name, None)
            if any(has_data_dependent_shape(one) for one in (node, *call.tensor_args)):
                return call.refuse("how many positions there are depends on values, as of a mask")
            return call.refuse(f"the operator's rule does not fit this call ({type(error).__name__}: {error})")

    def _with_positions(self, call: Call, rule: Rule) -> Result:
        """Apply a rule; where an operand's values are positions along an axis, so that they stay meaningful."""
        node = call.node
        if node.target is operator.getitem:
            pointer = self.facts.index_axes.get(f"{node.args[0]}:{node.args[1]}")
            if pointer is not None:
                call.gives_positions(pointer)
        axes = [axis for operand in call.tensor_args if (axis := call.positions(operand)) is not None]
        if not axes:
            return rule(call)
        special = find_position_rule(node)
        if special is None or any(axis is not axes[0] for axis in axes):
            call.fix(axes, "positions along it are values that this operator computes with")
            return rule(call)
        return special(call, axes[0], rule)


def _gives_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value)
    )


_MISFITS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def _checked(call: Call, result: Result) -> Result:
    """What a rule gave, if it has the sizes of the call's result.

    Raises:
        ValueError: it has not.
    """
    if result is None:
        return None
    parts = result if isinstance(result, list) else [result]
    shapes = call.out_shape if isinstance(result, list) else (call.out_shape,)
    for axes, shape in zip(parts, shapes, strict=True):
        sizes = tuple(axis.size for axis in axes)
        if shape is not None and sizes != tuple(shape):
            raise ValueError(f"it gives axes of sizes {sizes} for a result of shape {tuple(shape)}")
    return result
