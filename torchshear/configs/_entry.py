"""One entry of a config list, whatever its dialect: what it selects, and what is to happen to that."""

from dataclasses import dataclass
from typing import Literal

CHANNEL_PATTERNS = frozenset({"out_channel", "in_channel", "heads"})
DEFAULT_PATTERN = "default"

Dialect = Literal["nni", "nni v3", "neural_compressor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Filter of layers: those that fit (names or partials or patterns) and types, and no exclusion.

    Attributes:
        types: words for classes of modules, as "Conv2d"; empty: any.
        are_types_given: whether the types were written in the entry, and so must each fit a layer.
        names: exact names of layers.
        partials: texts that are part of a name.
        patterns: regular expressions that the whole name fits, or exact names.
        not_types: words for classes of modules that are left out.
        not_names: exact names that are left out.
        not_patterns: regular expressions, or exact names, that are left out.
    """

    types: tuple[str, ...] = ()
    are_types_given: bool = True
    names: tuple[str, ...] = ()
    partials: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    not_types: tuple[str, ...] = ()
    not_names: tuple[str, ...] = ()
    not_patterns: tuple[str, ...] = ()

    @property
    def selects_by_name(self) -> bool:
        """True if there is any word for names; without one every name fits."""
        return bool(self.names or self.partials or self.patterns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry in the common form of all dialects.

    Attributes:
        label: where it stands, as "config_list[1]".
        dialect: whose words it was written in.
        where: which layers it selects.
        excludes: whether these are to keep their outputs; all that follows then means nothing.
        ratio: fraction of the units of each layer to remove, or of those of the pool together; in [0, 1).
        pool: name of the pool whose layers are ranked together; None where each layer is ranked on its own.
        min_ratio: in a pool, the least fraction that a layer loses.
        max_ratio: in a pool, the greatest fraction that a layer loses.
        criterion: name of the criterion, None where the pruner says it.
        pattern: what a unit is: "out_channel", "in_channel", "heads", or of single weights "1x1", "NxM" (N outputs by
            M inputs) and "N:M" (N of M consecutive inputs go); "default" where the pruner says it.
        reduce: how scores inside a block become one: "mean", "sum" or "max".
        notes: what was read in another way than written, or has no effect.
    """

    label: str
    dialect: Dialect
    where: Where
    excludes: bool = False
    ratio: float = 0.0
    pool: str | None = None
    min_ratio: float = 0.0
    max_ratio: float = 1.0
    criterion: str | None = None
    pattern: str = DEFAULT_PATTERN
    reduce: str = "mean"
    notes: tuple[str, ...] = ()

    @property
    def scope(self) -> Literal["local", "global"]:
        """Scope: "local" if each of its layers is ranked on its own, "global" if they are ranked together."""
        return "local" if self.pool is None else "global"

    @property
    def removes_channels(self) -> bool:
        """True if its units are channels or heads, which are really removed, and not single weights."""
        return self.pattern in CHANNEL_PATTERNS

    def asks_the_same(self, other: "Entry") -> bool:
        """Return whether another entry asks the same of its layers."""
        own, others = (
            (e.ratio, e.pool, e.min_ratio, e.max_ratio, e.criterion, e.pattern, e.reduce) for e in (self, other)
        )
        return own == others
