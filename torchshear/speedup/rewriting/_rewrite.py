"""Rewriting a captured graph for fewer units: every size in it follows from its axis."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchshear.dependency import Axis, Cut
from torchshear.dependency._call import UNCHANGED, Edit, Facts, Scaled, bind_arguments
from torchshear.dependency._registry import operator_name

Target = Any
_CHANNEL_NORMS = frozenset({"aten.batch_norm.default", "aten.instance_norm.default"})


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A call after the cut. Arguments hold nodes of the original graph, and `Scaled` for computed sizes."""

    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """An integer in the graph that became another.

    Attributes:
        node: the call that it is an argument of.
        old: value before.
        new: value after.
    """

    node: fx.Node
    old: int
    new: int


def rewrite_graph(graph: fx.Graph, facts: Facts, cut: Cut) -> fx.Graph:
    """Copy a graph with all sizes after the cut. Node names are kept; metadata is not.

    Nodes are made before their arguments, so that calls that compute a size cannot take the name of any of them.

    Args:
        graph: the captured graph.
        facts: what the rules noted of this graph.
        cut: the checked choice of units.
    """
    copy = fx.Graph()
    calls = {node: rewritten_call(node, facts, cut) for node in graph.nodes}
    env = {node: copy.create_node(node.op, call.target, name=node.name) for node, call in calls.items()}
    for node, call in calls.items():
        with copy.inserting_before(env[node]):
            env[node].args = _instantiate(copy, call.args, env)
            env[node].kwargs = _instantiate(copy, call.kwargs, env)
    return copy


def _instantiate(copy: fx.Graph, value: Any, env: dict[fx.Node, fx.Node]) -> Any:
    """Arguments for the new graph; sizes that the graph computes are scaled by new over old."""
    if isinstance(value, tuple | list):
        return type(value)(_instantiate(copy, item, env) for item in value)
    if isinstance(value, dict):
        return {key: _instantiate(copy, item, env) for key, item in value.items()}
    if isinstance(value, _ScaledNode):
        scaled = copy.call_function(operator.mul, (env[value.node], value.scale.new))
        return copy.call_function(operator.floordiv, (scaled, value.scale.old))
    return fx.map_arg(value, lambda n: env[n])


@dataclass(frozen=True, slots=True)
class _ScaledNode:
    node: fx.Node
    scale: Scaled


def rewritten_call(node: fx.Node, facts: Facts, cut: Cut) -> Rewritten:
    """The call of a node after the cut; the node's own call if nothing about it changes."""
    edits = facts.edits.get(node.name, [])
    if not edits or not _is_touched(node, facts, cut):
        return Rewritten(node.target, node.args, dict(node.kwargs))
    whole = next((edit for edit in edits if edit.name == "call"), None)
    if whole is not None:
        new = whole.value(cut.keep)
        return Rewritten(node.target, node.args, dict(node.kwargs)) if new is UNCHANGED else _replaced(*new)
    bound = dict(bind_arguments(node))
    for edit in edits:
        _apply(bound, edit, cut)
    return _unbind(node, bound, {edit.name for edit in edits})


def _replaced(name: str, args: tuple[Any, ...]) -> Rewritten:
    return Rewritten(_operator(name), args, {})


def _is_touched(node: fx.Node, facts: Facts, cut: Cut) -> bool:
    """Whether any axis of the operands or of the result loses positions."""
    for value in (node, *node.all_input_nodes):
        axes = facts.axes.get(value.name)
        for part in axes if isinstance(axes, list) else [axes or ()]:
            if any(cut.changes(axis) for axis in part):
                return True
    return False


def _apply(bound: dict[str, Any], edit: Edit, cut: Cut) -> None:
    value = edit.value(cut.keep)
    if value is UNCHANGED:
        return
    old = bound[edit.name] if edit.index is None else bound[edit.name][edit.index]
    if isinstance(value, Scaled):
        value = _ScaledNode(old, value) if value.old != value.new else old
    if edit.index is None:
        bound[edit.name] = value
    else:
        items = list(bound[edit.name])
        items[edit.index] = value
        bound[edit.name] = items


def _unbind(node: fx.Node, bound: dict[str, Any], edited: set[str]) -> Rewritten:
    """Arguments by name back into positions and keywords; defaults that nobody gave stay away."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    needed = [i for i, a in enumerate(arguments) if not a.kwarg_only and (i < len(node.args) or a.name in edited)]
    args = tuple(bound[a.name] for a in arguments[: max(needed, default=-1) + 1])
    rest = arguments[len(args) :]
    kwargs = {a.name: bound[a.name] for a in rest if a.name in node.kwargs or a.name in edited}
    return Rewritten(node.target, args, kwargs)


def _operator(name: str) -> Target:
    namespace, operator_name, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), operator_name), overload)


def changed_integers(graph: fx.Graph, facts: Facts, cut: Cut) -> list[Change]:
    """All integer arguments that the cut changes, and channels of norms, with the calls that they belong to."""
    changes: list[Change] = []
    for node in graph.nodes:
        for edit in facts.edits.get(node.name, []) if _is_touched(node, facts, cut) else []:
            if edit.name == "call":
                changes += _changed_parts(node, facts, cut)
                continue
            given = bind_arguments(node)[edit.name]
            old = given if edit.index is None else given[edit.index]
            new = edit.value(cut.keep)
            if isinstance(new, Scaled):
                old, new = new.old, new.new
            if isinstance(old, int) and isinstance(new, int) and old != new:
                changes.append(Change(node, old, new))
        changes += _changed_channels(node, facts, cut)
    return changes


def _changed_channels(node: fx.Node, facts: Facts, cut: Cut) -> list[Change]:
    """Channels of a norm by its input's statistics, a number that modules keep though no argument tells it."""
    axes = facts.axes.get(node.name)
    if operator_name(node) not in _CHANNEL_NORMS or not isinstance(axes, tuple) or not cut.changes(axes[1]):
        return []
    return [Change(node, axes[1].size, int(cut.keep(axes[1]).sum()))]


def implied_arguments(graph: fx.Graph, facts: Facts, cut: Cut) -> list[tuple[fx.Node, str]]:
    """Calls that were not given an argument which they need after the cut, to compute as before; with its name."""
    return [
        (node, edit.name)
        for node in graph.nodes
        for edit in (facts.edits.get(node.name, []) if _is_touched(node, facts, cut) else [])
        if edit.name != "call"
        and edit.index is None
        and bind_arguments(node)[edit.name] is None
        and edit.value(cut.keep) is not UNCHANGED
    ]


def _changed_parts(node: fx.Node, facts: Facts, cut: Cut) -> list[Change]:
    """Sizes of the parts of a split, and of what is split."""
    results = facts.axes.get(node.name)
    parts: Sequence[Sequence[Axis]] = results if isinstance(results, list) else []
    pairs = {(axis.size, int(cut.keep(axis).sum())) for part in parts for axis in part}
    return [Change(node, old, new) for old, new in sorted(pairs) if old != new]
