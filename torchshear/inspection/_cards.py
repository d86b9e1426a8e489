"""Operators and their tensors as cards, at several levels of detail.

A level of detail cuts the names of modules at some depth. Operators that follow one another in execution order in the
same module, so cut, are one card. Runs of an order of execution have no cycles among them, whatever the modules call.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

from torchshear.dependency.groups._network import Value

_MAX_LEVELS = 6


@dataclass(frozen=True, slots=True)
class Card:
    """A box of the picture.

    Attributes:
        title: name of the module, or of the operator.
        subtitle: where the module lies, or which module calls the operator.
        nodes: numbers of the values that it stands for, in order of execution.
        chips: numbers of the tensors of the model that are drawn inside; of a single operator only.
        module: qualified name of the module that all of it lies in.
    """

    title: str
    subtitle: str
    nodes: tuple[int, ...]
    chips: tuple[int, ...]
    module: str


@dataclass(frozen=True, slots=True)
class Level:
    """The network at one level of detail.

    Attributes:
        depth: components of module names that are kept; 0 for single operators.
        cards: the boxes, in order of execution.
        edges: (source card, target card) -> numbers of the groups that run along, of all values between the two.
        shared: those of the edges along which tensors of the model run alone, which the source reads as well.
    """

    depth: int
    cards: tuple[Card, ...]
    edges: dict[tuple[int, int], tuple[int, ...]]
    shared: frozenset[tuple[int, int]]


def make_levels(values: Sequence[Value]) -> tuple[Level, ...]:
    """Describe the network at several levels of detail, coarsest first, single operators last.

    Levels that show no more than the one before are left out. Numbers that operators compute sizes from are not drawn,
    nor is a tensor of the model apart from the first operator that reads it.

    Args:
        values: the network's nodes in order of execution.
    """
    used = {name for value in values for name in value.operands}
    shown = [_is_drawn(value, used) for value in values]
    owner = _owners(values, shown)
    drawn = [number for number, value in enumerate(values) if shown[number] and not value.state]
    chips: dict[int, list[int]] = defaultdict(list)
    for chip, reader in owner.items():
        chips[reader].append(chip)
    deepest = max((len(_path(values[number].module)) for number in drawn), default=0)
    levels: list[Level] = []
    for depth in range(1, deepest + 1):
        level = _level(values, drawn, chips, depth)
        if not levels or len(level.cards) > 1.25 * len(levels[-1].cards):
            levels.append(level)
    full = _level(values, drawn, chips, 0)
    levels = [level for level in levels if 1 < len(level.cards) < 0.8 * len(full.cards)]
    return (*levels[-_MAX_LEVELS + 1 :], full)


def _path(module: str) -> list[str]:
    return module.split(".") if module else []


def _is_drawn(value: Value, used: Set[str]) -> bool:
    """Return False for a computation of sizes, and for a counter that nothing reads."""
    return value.kind in {"input", "output"} or any(dims or value.name in used for dims in value.tensors)


def _owners(values: Sequence[Value], shown: Sequence[bool]) -> dict[int, int]:
    """For each tensor of the model the first operator that reads it, in whose card it is drawn."""
    numbers = {value.name: number for number, value in enumerate(values)}
    found: dict[int, int] = {}
    for reader, value in enumerate(values):
        for name in value.operands:
            if values[numbers[name]].state and shown[reader]:
                found.setdefault(numbers[name], reader)
    return found


def _level(values: Sequence[Value], drawn: Sequence[int], chips: dict[int, list[int]], depth: int) -> Level:
    cards = tuple(_card(values, run, chips, depth) for run in _runs(values, drawn, depth))
    card_of = {number: i for i, card in enumerate(cards) for number in (*card.nodes, *card.chips)}
    if depth:
        card_of |= {chip: card_of[reader] for reader, inside in chips.items() for chip in inside}
    operators = {number: card for number, card in card_of.items() if not values[number].state}
    edges = _edges(values, card_of)
    return Level(depth, cards, edges, frozenset(edges.keys() - _edges(values, operators).keys()))


def _runs(values: Sequence[Value], drawn: Sequence[int], depth: int) -> Iterator[list[int]]:
    """Operators that make up one card each time."""

    def key(number: int) -> tuple[str, int]:
        path = _path(values[number].module)
        alone = not depth or len(path) < depth or values[number].kind != "operator"
        return (".".join(path[:depth]), number if alone else -1)

    return (list(run) for _, run in groupby(drawn, key))


def _card(values: Sequence[Value], run: list[int], chips: dict[int, list[int]], depth: int) -> Card:
    if len(run) == 1:
        value = values[run[0]]
        return Card(_title(value), value.module or value.source, tuple(run), tuple(chips.get(run[0], ())), value.module)
    path = _path(values[run[0]].module)[:depth]
    counted = Counter(_title(values[number]) for number in run)
    inside = ", ".join(f"{count} {name}" if count > 1 else name for name, count in counted.most_common(3))
    return Card(".".join(path), inside + (", ..." if len(counted) > 3 else ""), tuple(run), (), ".".join(path))


def _title(value: Value) -> str:
    """Short name of an operator: "conv2d" of "aten.conv2d.default"."""
    if value.kind == "operator":
        parts = value.operator.split(".")
        return parts[1] if len(parts) > 1 else value.operator
    return value.state or (value.name if value.kind == "input" else value.kind)


def _edges(values: Sequence[Value], card_of: dict[int, int]) -> dict[tuple[int, int], tuple[int, ...]]:
    """Edges between different cards; what goes through nodes that are not drawn, as sizes do, is left out."""
    numbers = {value.name: number for number, value in enumerate(values)}
    found: dict[tuple[int, int], dict[int, None]] = defaultdict(dict)
    for number, value in enumerate(values):
        for name in value.operands:
            source, target = card_of.get(numbers[name]), card_of.get(number)
            if source is not None and target is not None and source != target:
                found[source, target].update(dict.fromkeys(values[numbers[name]].groups))
    return {ends: tuple(groups) for ends, groups in found.items()}
