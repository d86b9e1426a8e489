"""Problem of an allocation: the widths that groups may have, and budgets as sums of small tables."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchshear._arguments import quote
from torchshear.errors import ArgumentError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Levels:
    """Widths that a group may have.

    Attributes:
        name: name of the group.
        widths: the widths, each once.
        losses: what the model loses at each of them; finite, on one scale for all groups.

    Raises:
        ArgumentError: there is no width, one stands twice, or not every width has a finite loss.
    """

    name: str
    widths: tuple[int, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse levels that cannot be told apart or have no loss."""
        is_whole = len(self.losses) == len(self.widths) > 0 and bool(np.isfinite(self.losses).all())
        if not is_whole or len(set(self.widths)) < len(self.widths):
            raise ArgumentError(
                f"group {self.name!r} has the widths {self.widths} and the losses {self.losses}; expected different "
                f"widths, at least one, and a finite loss for each."
            )


@dataclass(frozen=True, slots=True, eq=False)
class CostTerm:
    """A part of a cost that depends on the widths of some groups together, as the time of a kernel does.

    What depends on a sum of widths, as behind a concatenation, and is linear in it, is one term for each summand.

    Attributes:
        groups: names of the groups, each once.
        table: the cost at each combination of their levels; its shape is the number of levels of each.
    """

    groups: tuple[str, ...]
    table: Floats


@dataclass(frozen=True, slots=True, eq=False)
class CostBudget:
    """Upper bound on a cost.

    Attributes:
        name: what is bounded, with its unit, as "latency_ms".
        limit: the most that it may be.
        terms: what it is the sum of.
        constant: the part that no width changes.
    """

    name: str
    limit: float
    terms: tuple[CostTerm, ...]
    constant: float = 0.0

    def cost(self, levels: Sequence[Levels], chosen: Sequence[int]) -> float:
        """Return the cost at a choice of levels.

        Args:
            levels: the levels of each group.
            chosen: the number of the level that each of these groups has.
        """
        number = {one.name: level for one, level in zip(levels, chosen, strict=True)}
        return self.constant + sum(
            float(term.table[tuple(number[name] for name in term.groups)]) for term in self.terms
        )


def check_budgets(levels: Sequence[Levels], budgets: Sequence[CostBudget]) -> None:
    """Refuse groups that stand twice, and terms that do not fit the groups.

    Raises:
        ArgumentError: a group stands twice; a term has an unknown group, one of them twice, or a table of another shape
            or with numbers that are not finite; or a limit is not finite.
    """
    counts = {one.name: len(one.widths) for one in levels}
    if len(counts) < len(levels):
        raise ArgumentError("two groups have the same name; expected levels of different groups.")
    for budget in budgets:
        if not np.isfinite([budget.limit, budget.constant]).all():
            raise ArgumentError(f"the budget {budget.name!r} has the limit {budget.limit}; expected a finite number.")
        for term in budget.terms:
            shape = tuple(counts.get(name, -1) for name in term.groups)
            is_finite = bool(np.isfinite(term.table).all())
            if shape != term.table.shape or len(set(term.groups)) < len(term.groups) or not is_finite:
                raise ArgumentError(
                    f"a term of {budget.name!r} has a table of shape {term.table.shape} for {quote(term.groups)}; "
                    f"expected finite costs, one for each combination of the levels of known groups: {shape}."
                )


def merge_terms(levels: Sequence[Levels], budget: CostBudget) -> tuple[dict[tuple[int, ...], Floats], float]:
    """Add up the terms of a budget that are over the same groups.

    Args:
        levels: the levels of each group.
        budget: the budget.

    Returns:
        Numbers of groups, ascending -> the sum of their tables; groups with one level are left out of both. And the
        constant part.
    """
    number = {one.name: place for place, one in enumerate(levels)}
    merged: dict[tuple[int, ...], Floats] = defaultdict(lambda: np.zeros(()))
    for term in budget.terms:
        places = [number[name] for name in term.groups]
        table = term.table.transpose(np.argsort(places))
        free = tuple(place for place in sorted(places) if len(levels[place].widths) > 1)
        merged[free] = merged[free] + table.reshape([len(levels[place].widths) for place in free])
    constant = budget.constant + float(merged.pop((), np.zeros(())))
    return dict(merged), constant
