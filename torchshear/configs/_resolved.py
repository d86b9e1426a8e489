"""A config as it applies to one model: a row a layer, a target a channel group, and the table of it."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from torchshear._tables import Cell
from torchshear.configs._entry import Entry


@dataclass(frozen=True, slots=True)
class GroupTarget:
    """Target of one channel group in a config.

    Attributes:
        group: name of the group.
        ratio: fraction of its units to remove; in a pool, of the pool's units together.
        entry: the entry that says so: of those of all coupled layers, the one that asks least.
        reason: why it is less than a layer was asked, or "".
    """

    group: str
    ratio: float
    entry: Entry
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ConfigRow:
    """Row of one layer in a config.

    Attributes:
        layer: name of the layer.
        type_name: name of its class.
        groups: names of the channel groups that are cut for it.
        entry: where the entry stands that has it, or "".
        criterion: name of the criterion, or "".
        pattern: what a unit is, or "".
        ratio: fraction that is asked for; None if no entry asks anything of it.
        removed: fraction that can really go, in common with all coupled layers; None if nothing is asked.
        masked: fraction of single weights that are set to zero.
        parameter: the weight of which single weights are set to zero, or "".
        reason: why less is removed than asked, or nothing is; "" if all is.
    """

    layer: str
    type_name: str
    groups: tuple[str, ...] = ()
    entry: str = ""
    criterion: str = ""
    pattern: str = ""
    ratio: float | None = None
    removed: float | None = None
    masked: float = 0.0
    parameter: str = ""
    reason: str = ""

    @property
    def only_masked(self) -> float:
        """Fraction of channels that was asked for and cannot go: the part beyond what coupled layers have in common."""
        return max(0.0, (self.ratio or 0.0) - (self.removed or 0.0)) if not self.parameter else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedConfig:
    """A config list as it applies to a model.

    Attributes:
        entries: the entries, in order.
        rows: a row for each layer with a weight, and for others that an entry selects.
        targets: name of a channel group -> its share and where that comes from.
    """

    entries: tuple[Entry, ...]
    rows: tuple[ConfigRow, ...]
    targets: Mapping[str, GroupTarget] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", MappingProxyType(dict(self.targets)))

    @property
    def ratios(self) -> dict[str, float]:
        """Name of a channel group -> fraction of its units to remove, for `torchshear.plan`; without those at 0."""
        return {name: target.ratio for name, target in self.targets.items() if target.ratio > 0}

    @property
    def layer_ratios(self) -> dict[str, float]:
        """Name of a layer -> fraction of its channels that was asked for."""
        return {row.layer: row.ratio for row in self.rows if row.ratio is not None and not row.parameter}

    @property
    def weight_ratios(self) -> dict[str, float]:
        """Name of a weight -> fraction of its single weights (or blocks of them) to set to zero."""
        return {row.parameter: row.masked for row in self.rows if row.parameter and row.masked > 0}

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on what was read in another way than written, entry by entry."""
        return tuple(f"{entry.label}: {note}" for entry in self.entries for note in entry.notes)

    def to_dict(self) -> dict[str, Any]:
        """The rows and notes as plain data for JSON."""
        return {
            "rows": [
                {name: getattr(row, name) for name in row.__dataclass_fields__} | {"groups": list(row.groups)}
                for row in self.rows
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """A table for people."""
        return render_config(self)


_WIDE = 110  # columns from which each word has a column of its own


def _beside(words: tuple[str, ...], together: str | None) -> list[str]:
    """Words one by one, or two by two as one text each."""
    if together is None:
        return list(words)
    return [together.join(pair) for pair in zip(words[::2], words[1::2], strict=True)]


def render_config(resolved: ResolvedConfig, width: int = 140) -> str:
    """A resolved config as text.

    Args:
        resolved: the config.
        width: columns of the terminal.
    """
    together = "\n" if width < _WIDE else None
    table = Table(title="Config", title_justify="left")
    for headings in _beside(("layer", "type", "group", "entry", "criterion", "unit"), together):
        table.add_column(headings)
    for heading in ("asked", "removed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why less")
    for row in resolved.rows:
        asked = "" if row.ratio is None else f"{row.ratio:.1%}"
        removed = "" if row.removed is None else f"{row.removed:.1%}"
        groups = "\n".join(row.groups) or row.parameter
        said = (row.layer or "(model)", row.type_name, groups, row.entry, row.criterion, row.pattern)
        table.add_row(*map(Cell, _beside(said, together)), asked, removed, Cell(row.reason))
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, highlight=False)
    console.print(table)
    for entry in resolved.entries:
        if entry.pool is not None and not entry.excludes:
            bounds = f"each layer {entry.min_ratio:.1%} to {entry.max_ratio:.1%}"
            console.print(f"{entry.label}: {entry.ratio:.1%} of all its layers together, {bounds}", soft_wrap=True)
    for note in resolved.notes:
        console.print(note, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())
