"""Walk a graph once in execution order, apply each operator's rule, and form channel groups from what it says."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from torchshear.dependency import rules as _rules  # registers the rules of the ATen operators
from torchshear.dependency._axis import Algebra, Axes
from torchshear.dependency._balance import settle_balances
from torchshear.dependency._call import Call, Facts, Result
from torchshear.dependency._grouping import form_groups
from torchshear.dependency._groups import ChannelGroups
from torchshear.dependency._registry import find_rule
from torchshear.graph import Graph, check_outputs, matches, output_nodes
from torchshear.graph._graph import shape_of

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
        ArgumentError: the model has no such output.
    """
    algebra, facts = Algebra(), Facts()
    prunable = check_outputs(graph, prunable_outputs)
    relate(graph, algebra, facts, prunable)
    training = None
    if graph.training is not None:
        training = facts.for_other_graph()
        relate(graph.training, algebra, training, prunable)
    settle_balances(algebra, facts)
    return replace(form_groups(graph, algebra, facts, training), prunable_outputs=prunable)


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

    def _input(self, node: fx.Node) -> Result:
        shape = shape_of(node)
        if not isinstance(shape, tuple):
            return None
        return tuple(
            self.algebra.fixed(size, f"model input {node.name!r}, dimension {dim}") for dim, size in enumerate(shape)
        )

    def _state(self, name: str) -> Axes:
        if name not in self.facts.state_axes:
            shape = self.graph.state[name].shape
            self.facts.state_axes[name] = tuple(self.algebra.fresh(size) for size in shape)
        return self.facts.state_axes[name]

    def _outputs(self) -> None:
        """Fix what the model gives, but for outputs that may shrink, of which the batch alone is."""
        for name, value in output_nodes(self.graph):
            axes = self.facts.axes.get(value.name) if isinstance(value, fx.Node) else None
            if not isinstance(axes, tuple):
                for part in axes or ():
                    self.algebra.fix(part, f"model output {name}")
                continue
            is_prunable = any(matches(pattern, name) for pattern in self.prunable_outputs)
            for dim, axis in enumerate(axes):
                if not is_prunable or self.graph.is_free(value, dim):
                    self.algebra.fix([axis], f"model output {name}")

    def _call(self, node: fx.Node) -> Result:
        call = Call(node, self.graph, self.algebra, self.facts)
        rule = find_rule(node)
        if rule is None:
            return _unknown(call, "operator without a rule")
        try:
            return rule(call)
        except _MISFITS as error:  # a call that its rule does not foresee is as good as unknown, and reported as such
            self.facts.edits.pop(node.name, None)
            return _unknown(call, f"the operator's rule does not fit this call ({type(error).__name__}: {error})")


def _gives_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value)
    )


_MISFITS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def _unknown(call: Call, why: str) -> Result:
    """Nothing is known about the operator, so nothing that it touches may change."""
    for node in call.tensor_args:
        call.fix(call.axes(node), why)

    def fixed(shape: Any) -> Axes:
        return tuple(call.fixed(size, why) for size in shape or ())

    shape = shape_of(call.node)
    if isinstance(call.node.meta.get("val"), torch.Tensor):
        return fixed(shape)
    return [fixed(item) for item in shape]
