"""Walk a graph once in execution order, apply each operator's rule, and form channel groups from what it says."""

import operator
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear._arguments import check_kind, matches
from torchshear.dependency import rules as _rules  # registers the rules of the ATen operators
from torchshear.dependency.algebra._axis import Algebra
from torchshear.dependency.groups._constraints import settle_balances
from torchshear.dependency.groups._grouping import form_groups
from torchshear.dependency.groups._groups import ChannelGroups
from torchshear.dependency.groups._weights import carrier_of
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import Facts, Result
from torchshear.dependency.rules._registry import Rule, find_position_rule, find_rule
from torchshear.graph import Graph
from torchshear.graph._graph import check_outputs, output_nodes
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

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> groups = torchshear.analyze(torchshear.trace(model, torch.randn(1, 4)))
        >>> [(group.name, group.width, group.role) for group in groups.prunable]
        [('0.weight[0]', 8, 'ffn')]
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
    """Return the groups with another graph over the same parameters in place of theirs, as of a single part."""
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
    """Fix the parameters and buffers of parts that the rest of the model holds or reads as well."""
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
        facts: results of the rules, added to.
        prunable_outputs: patterns of names of outputs that may shrink.
    """
    phrases = graph.describe_inputs()
    for node in graph:
        if node.op == "placeholder":
            shape, what = shape_of(node), phrases[node.name]
            facts.axes[node.name] = (
                tuple(algebra.fixed_axis(size, f"{what}, dimension {dim}") for dim, size in enumerate(shape))
                if isinstance(shape, tuple)
                else None
            )
        elif node.op == "get_attr":
            name = str(node.target)
            if name not in facts.state_axes:
                facts.state_axes[name] = tuple(algebra.fresh(size) for size in graph.state[name].shape)
            facts.axes[node.name] = facts.state_axes[name]
        elif node.op == "output":
            _fix_outputs(graph, algebra, facts, prunable_outputs)
        elif str(node.target) == "aten.sym_size.int" or any(
            isinstance(value, Tensor) for value in pytree.tree_leaves(node.meta.get("val"))
        ):
            facts.axes[node.name] = _apply_rule(Call(node, graph, algebra, facts), facts)
            carrier = carrier_of(node, algebra, facts)
            if carrier is not None:
                facts.carriers[node.name] = carrier


def _fix_outputs(graph: Graph, algebra: Algebra, facts: Facts, prunable_outputs: Collection[str]) -> None:
    """Fix all outputs of the model; of outputs that may shrink, the batch alone."""
    parts, in_mode = graph.output_parts(), " in train mode" if graph.mode == "train" else ""
    for number, (name, value) in enumerate(output_nodes(graph)):
        what = f"output of part {parts[number]!r}" if parts else f"model output {name}{in_mode}"
        axes = facts.axes.get(value.name) if isinstance(value, fx.Node) else None
        indexed = facts.index_axes.get(value.name) if isinstance(value, fx.Node) else None
        algebra.fix([] if indexed is None else [indexed], f"positions along it are {what}")
        if not isinstance(axes, tuple):
            for result in axes or ():
                algebra.fix(result, what)
            continue
        is_prunable = any(matches(pattern, name) for pattern in prunable_outputs)
        for dim, axis in enumerate(axes):
            if not is_prunable or graph.is_dynamic(value, dim):
                algebra.fix([axis], what)
            for row in axis.rows[1:]:  # one tensor keeps the same positions in each row
                algebra.equate(axis.rows[0], row, what)


_MISFITS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def _apply_rule(call: Call, facts: Facts) -> Result:
    """Return the axes of the result of a call; fixed ones if no rule fits it."""
    node = call.node
    rule = find_rule(node)
    if rule is None:
        return call.refuse("operator without a rule")
    try:
        result = _apply_with_positions(call, rule, facts)
        if result is not None:
            parts = result if isinstance(result, list) else [result]
            shapes = call.out_shape if isinstance(result, list) else (call.out_shape,)
            for axes, shape in zip(parts, shapes, strict=True):
                sizes = tuple(axis.size for axis in axes)
                if shape is not None and sizes != tuple(shape):
                    raise ValueError(f"it gives axes of sizes {sizes} for a result of shape {tuple(shape)}")
    except _MISFITS as error:  # a call that its rule does not foresee is as good as unknown, and reported as such
        facts.edits.pop(node.name, None)
        if any(has_data_dependent_shape(one) for one in (node, *call.tensor_args)):
            return call.refuse("how many positions there are depends on values, as of a mask")
        return call.refuse(f"the operator's rule does not fit this call ({type(error).__name__}: {error})")
    return result


def _apply_with_positions(call: Call, rule: Rule, facts: Facts) -> Result:
    """Apply a rule; if values of an operand are positions along an axis, see that they keep their meaning."""
    node = call.node
    if node.target is operator.getitem:
        indexed = facts.index_axes.get(f"{node.args[0]}:{node.args[1]}")
        if indexed is not None:
            call.gives_positions(indexed)
    axes = [axis for operand in call.tensor_args if (axis := call.positions(operand)) is not None]
    if not axes:
        return rule(call)
    special = find_position_rule(node)
    if special is None or any(axis is not axes[0] for axis in axes):
        call.fix(axes, "positions along it are values that this operator computes with")
        return rule(call)
    return special(call, axes[0], rule)
