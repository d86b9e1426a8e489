"""Rewriting a captured graph for fewer units: every size in it follows from its axis."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules._call import bind_arguments
from torchshear.dependency.rules._findings import UNCHANGED, Edit, Facts, SizeFactor
from torchshear.graph._operator_record import operator_of
from torchshear.speedup.rewriting._slicing import is_touched


@dataclass(frozen=True, slots=True)
class _NewCall:
    """A call after the cut. Arguments hold nodes of the original graph, and `_MultipliedSize` for computed sizes."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _MultipliedSize:
    """A size that the graph computes at `node`, to be multiplied with new / old."""

    node: fx.Node
    factor: SizeFactor


@dataclass(frozen=True, slots=True)
class Change:
    """An integer in the graph that the cut changes.

    Attributes:
        node: the call that has it as an argument, or as a number of channels.
        old: value before.
        new: value after.
    """

    node: fx.Node
    old: int
    new: int


def rewrite_graph(graph: fx.Graph, facts: Facts, cut: Cut) -> fx.Graph:
    """Copy a graph with all sizes after the cut. Node names are kept; metadata is not.

    All nodes are made before their arguments, so that a call which computes a size cannot take the name of one of them.

    Args:
        graph: the captured graph.
        facts: what the rules noted of this graph.
        cut: the checked choice of units.
    """
    copy = fx.Graph()
    calls = {node: _rewrite_call(node, facts, cut) for node in graph.nodes}
    copies = {node: copy.create_node(node.op, call.target, name=node.name) for node, call in calls.items()}
    for node, call in calls.items():
        with copy.inserting_before(copies[node]):
            copies[node].args = _copy_argument(copy, call.args, copies)
            copies[node].kwargs = _copy_argument(copy, call.kwargs, copies)
    return copy


def _copy_argument(copy: fx.Graph, value: Any, copies: dict[fx.Node, fx.Node]) -> Any:
    """Return an argument for the new graph; sizes that the graph computes get calls that scale them."""
    if isinstance(value, tuple | list):
        return type(value)(_copy_argument(copy, item, copies) for item in value)
    if isinstance(value, dict):
        return {key: _copy_argument(copy, item, copies) for key, item in value.items()}
    if isinstance(value, _MultipliedSize):
        product = copy.call_function(operator.mul, (copies[value.node], value.factor.new))
        return copy.call_function(operator.floordiv, (product, value.factor.old))
    return fx.map_arg(value, lambda node: copies[node])


def _rewrite_call(node: fx.Node, facts: Facts, cut: Cut) -> _NewCall:
    """Return the call of a node after the cut: with other arguments, or of another operator, or as it was."""
    edits = facts.edits.get(node.name, [])
    if not edits or not is_touched(node, facts, cut):
        return _NewCall(node.target, node.args, dict(node.kwargs))
    whole = next((edit for edit in edits if edit.name == "call"), None)
    if whole is None:
        return _edit_arguments(node, edits, cut)
    new = whole.value(cut.keep)
    if new is UNCHANGED:
        return _NewCall(node.target, node.args, dict(node.kwargs))
    name, args = new
    namespace, operator_name, overload = name.split(".")
    return _NewCall(getattr(getattr(getattr(torch.ops, namespace), operator_name), overload), args, {})


def _edit_arguments(node: fx.Node, edits: list[Edit], cut: Cut) -> _NewCall:
    bound = dict(bind_arguments(node))
    for edit in edits:
        value = edit.value(cut.keep)
        if value is UNCHANGED:
            continue
        if isinstance(value, SizeFactor):
            old = bound[edit.name] if edit.index is None else bound[edit.name][edit.index]
            value = _MultipliedSize(old, value) if value.old != value.new else old
        if edit.index is None:
            bound[edit.name] = value
        else:
            items = list(bound[edit.name])
            items[edit.index] = value
            bound[edit.name] = items
    # Back into positions and keywords; defaults that were not given and did not change stay away.
    edited = {edit.name for edit in edits}
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    needed = [i for i, a in enumerate(arguments) if not a.kwarg_only and (i < len(node.args) or a.name in edited)]
    args = tuple(bound[a.name] for a in arguments[: max(needed, default=-1) + 1])
    rest = arguments[len(args) :]
    kwargs = {a.name: bound[a.name] for a in rest if a.name in node.kwargs or a.name in edited}
    return _NewCall(node.target, args, kwargs)


def changed_integers(graph: fx.Graph, facts: Facts, cut: Cut) -> list[Change]:
    """Return the integer arguments that the cut changes, and the numbers of channels of norms, with their calls."""
    changes: list[Change] = []
    for node in graph.nodes:
        axes = facts.axes.get(node.name)
        for edit in facts.edits.get(node.name, []) if is_touched(node, facts, cut) else []:
            if edit.name == "call":  # a split: sizes of its results, and of what is split
                own = [axis for part in axes for axis in part] if isinstance(axes, list) else []
                sizes = sorted({(axis.size, int(cut.keep(axis).sum())) for axis in own})
                changes += [Change(node, old, new) for old, new in sizes]
                continue
            given = bind_arguments(node)[edit.name]
            old = given if edit.index is None else given[edit.index]
            new = edit.value(cut.keep)
            if isinstance(new, SizeFactor):
                old, new = new.old, new.new
            if isinstance(old, int) and isinstance(new, int):
                changes.append(Change(node, old, new))
        norm = operator_of(node).norm
        if norm is not None and norm.over in ("batch", "space") and isinstance(axes, tuple):
            channels = axes[norm.channels]  # a number that modules keep, and that no argument tells
            changes.append(Change(node, channels.size, int(cut.keep(channels).sum())))
    return [change for change in changes if change.old != change.new]


def implied_arguments(graph: fx.Graph, facts: Facts, cut: Cut) -> list[tuple[fx.Node, str]]:
    """Find calls that need, to compute as before the cut, an argument which they are not given; with its name."""
    return [
        (node, edit.name)
        for node in graph.nodes
        for edit in (facts.edits.get(node.name, []) if is_touched(node, facts, cut) else [])
        if edit.name != "call"
        and edit.index is None
        and bind_arguments(node)[edit.name] is None
        and edit.value(cut.keep) is not UNCHANGED
    ]
