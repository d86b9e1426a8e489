"""Wrong rules on purpose: what a rule returns or demands is changed at one call of a network, from outside the library.

Of everything that a rule says about a call, one thing is made wrong: a row of positions is mirrored, rolled or has two
of its positions exchanged, two rows change places, a row is made of units that nothing else knows, or a demand is
forgotten. The proof of `torchshear.prune` has to notice.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from torchshear.dependency import ChannelGroups
from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules._call import Call
from torchshear.dependency.rules._findings import UNCHANGED, Result, SizeFactor
from torchshear.dependency.rules._registry import _POSITION_RULES, _RULES
from torchshear.graph._operator_record import operator_name

DEMANDS = (
    "tie", "fix", "mix", "balance", "equally_wide", "at_least", "keep_some", "block", "renumber", "gives_positions",
)  # fmt: skip
EDITS = ("edit", "edit_call")


@dataclass(frozen=True)
class Mutation:
    """One thing that is made wrong at one call.

    Attributes:
        node: name of the call in the captured graph.
        kind: "mirror", "shift", "swap", "exchange" or "fresh" of what is returned; "forget" a demand; "no edit", "edit
            off by one".
        result: which of several results.
        dim: which of its dimensions.
        places: the two positions of a swap, or the two dimensions of an exchange.
        demand: what is forgotten, a method of `Call`.
        number: which of the edits of the call.
    """

    node: str
    kind: str
    result: int = 0
    dim: int = 0
    places: tuple[int, int] = (0, 0)
    demand: str = ""
    number: int = 0

    def __str__(self) -> str:
        """The change in a few words, without the call."""
        if self.kind == "forget":
            return f"forget {self.demand}"
        if "edit" in self.kind:
            return f"{self.kind} ({self.number})"
        return f"{self.kind} (result {self.result}, dimension {self.dim})"


@dataclass
class Watched:
    """What rules demanded of each call when nothing was wrong: name of the call -> how often each method was used."""

    demands: dict[str, dict[str, int]] = field(default_factory=dict)


@contextmanager
def wrapped_rules(around: Callable[[Call, Callable[[], Result]], Result]) -> Iterator[None]:
    """Have every rule of the registry run inside `around(call, run)`, once a call even where a rule runs another."""
    rules, position_rules = dict(_RULES), dict(_POSITION_RULES)

    def once(call: Call, run: Callable[[], Result]) -> Result:
        if getattr(call, "is_wrapped", False):
            return run()
        call.is_wrapped = True  # type: ignore[attr-defined]
        return around(call, run)

    def wrap(rule: Callable[..., Result]) -> Callable[..., Result]:
        return lambda call, *rest: once(call, lambda: rule(call, *rest))

    wrapped = {rule: wrap(rule) for rule in (*rules.values(), *position_rules.values())}
    _RULES.update({name: wrapped[rule] for name, rule in rules.items()})
    _POSITION_RULES.update({name: wrapped[rule] for name, rule in position_rules.items()})
    try:
        yield
    finally:
        _RULES.update(rules)
        _POSITION_RULES.update(position_rules)


@contextmanager
def watched() -> Iterator[Watched]:
    """Note what each rule demands; nothing is changed."""
    seen = Watched()

    def around(call: Call, run: Callable[[], Result]) -> Result:
        counts = seen.demands[call.node.name] = {}  # in the graph for train mode, too, which has the same demands

        def counting(name: str) -> None:
            method = getattr(call, name)

            def counted(*args: Any, **kwargs: Any) -> Any:
                counts[name] = counts.get(name, 0) + 1
                return method(*args, **kwargs)

            setattr(call, name, counted)

        for name in (*DEMANDS, *EDITS):
            counting(name)
        return run()

    with wrapped_rules(around):
        yield seen


@contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    """Make the rules of the library wrong in one way at the call that the mutation names."""

    def around(call: Call, run: Callable[[], Result]) -> Result:
        if call.node.name != mutation.node:
            return run()
        if mutation.kind == "forget":
            setattr(call, mutation.demand, lambda first=None, *_, **__: first)
        elif "edit" in mutation.kind:
            _change_edit(call, mutation)
        result = run()
        if isinstance(result, list):
            return [_changed(call, axes, mutation) if i == mutation.result else axes for i, axes in enumerate(result)]
        return result if result is None else _changed(call, result, mutation)

    with wrapped_rules(around):
        yield


def _change_edit(call: Call, mutation: Mutation) -> None:
    """Leave out one of the edits of a call, or have it give a number that is off by one."""
    seen = 0

    def changing(method: Callable[..., None]) -> Callable[..., None]:
        def changed(*args: Any, **kwargs: Any) -> None:
            nonlocal seen
            number, seen = seen, seen + 1
            if number != mutation.number:
                method(*args, **kwargs)
            elif mutation.kind != "no edit":
                method(*(_off_by_one(value) if callable(value) else value for value in args), **kwargs)

        return changed

    for name in EDITS:
        setattr(call, name, changing(getattr(call, name)))


def _off_by_one(value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrong(keep: Any) -> Any:
        return _wrong_value(value(keep))

    return wrong


def _wrong_value(value: Any) -> Any:
    """One more where an edit gives a number; the numbers of a list in another order."""
    if value is UNCHANGED or isinstance(value, bool | str | fx.Node):
        return value
    if isinstance(value, SizeFactor):
        return SizeFactor(value.old, value.new + 1)
    if isinstance(value, int):
        return value + 1
    if isinstance(value, list) and len(value) > 1 and all(isinstance(item, int) for item in value):
        return [value[-1], *value[:-1]]
    return tuple(_wrong_value(item) for item in value) if isinstance(value, tuple) else value


def _changed(call: Call, axes: Axes, mutation: Mutation) -> Axes:
    change = _CHANGES.get(mutation.kind)
    if mutation.kind == "exchange":
        order = list(range(len(axes)))
        first, second = mutation.places
        order[first], order[second] = second, first
        return tuple(axes[dim] for dim in order)
    if change is None:
        return axes
    return tuple(change(call, axis, mutation) if dim == mutation.dim else axis for dim, axis in enumerate(axes))


def _reordered(axis: Axis, order: Callable[[int], list[int]]) -> Axis:
    return Axis(axis.units[order(axis.size)], tuple(_reordered(row, order) for row in axis.rows))


def _mirror(_: Call, axis: Axis, __: Mutation) -> Axis:
    return _reordered(axis, lambda size: list(range(size))[::-1])


def _shift(_: Call, axis: Axis, __: Mutation) -> Axis:
    return _reordered(axis, lambda size: [size - 1, *range(size - 1)])


def _swap(_: Call, axis: Axis, mutation: Mutation) -> Axis:
    def order(size: int) -> list[int]:
        places = list(range(size))
        first, second = mutation.places
        places[first], places[second] = second, first
        return places

    return _reordered(axis, order)


def _fresh(call: Call, axis: Axis, _: Mutation) -> Axis:
    rows = tuple(call.algebra.fresh(axis.size) for _ in axis.rows)
    return Axis(rows[0].units, rows) if rows else call.algebra.fresh(axis.size)


_CHANGES: dict[str, Callable[[Call, Axis, Mutation], Axis]] = {
    "mirror": _mirror,
    "shift": _shift,
    "swap": _swap,
    "fresh": _fresh,
}


def mutations_of(groups: ChannelGroups, cut: Cut, node: fx.Node, seen: Watched) -> list[Mutation]:
    """All that can be made wrong at a call, as far as something that its result has is cut, or it demands something.

    Args:
        groups: the network, analysed with the right rules.
        cut: what was cut of it, from which the positions of swaps are chosen.
        node: the call.
        seen: what its rule demanded.
    """
    found = []
    result = groups.facts.axes.get(node.name)
    for number, axes in enumerate(result if isinstance(result, list) else [result or ()]):
        if isinstance(result, list) and number not in _read_results(node):
            continue
        for dim, axis in enumerate(axes):
            if cut.changes(axis):
                found += _of_axis(node, number, dim, cut.keep(axis))
                found += _exchanges(node, number, dim, axes)
    demands = seen.demands.get(node.name, {})
    found += [Mutation(node.name, "forget", demand=name) for name in DEMANDS if demands.get(name)]
    n_edits = demands.get("edit", 0) + demands.get("edit_call", 0)
    found += [Mutation(node.name, kind, number=n) for n in range(n_edits) for kind in ("no edit", "edit off by one")]
    return found


def _read_results(node: fx.Node) -> set[Any]:
    """Which of several results of a call anything uses."""
    return {user.args[1] for user in node.users if user.target is operator.getitem and user.users}


def _of_axis(node: fx.Node, result: int, dim: int, keep: Any) -> list[Mutation]:
    kept, gone = np.flatnonzero(keep), np.flatnonzero(~keep)
    places = (int(kept[0]), int(gone[-1]))
    return [Mutation(node.name, kind, result, dim, places) for kind in _CHANGES]


def _exchanges(node: fx.Node, result: int, dim: int, axes: Axes) -> list[Mutation]:
    """Two rows of one size change places."""
    others = [at for at, axis in enumerate(axes) if at != dim and axis.size == axes[dim].size > 1]
    return [Mutation(node.name, "exchange", result, dim, (dim, at)) for at in others[:1]]


def calls_of(groups: ChannelGroups, name: str) -> list[fx.Node]:
    """Calls of an operator in a captured network, by a name with or without overload."""
    return [
        node
        for node in groups.graph
        if node.op == "call_function" and name in (operator_name(node), ".".join(operator_name(node).split(".")[:2]))
    ]


def reads_positions(groups: ChannelGroups, node: fx.Node) -> bool:
    """Whether an operand's values are positions along an axis, so that another rule speaks for the call."""
    return any(operand.name in groups.facts.index_axes for operand in node.all_input_nodes)
