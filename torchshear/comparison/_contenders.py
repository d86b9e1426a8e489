"""The criteria and controls of a comparison, and their budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor

from torchshear._arguments import check_kind, is_whole, quote
from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.errors import ArgumentError
from torchshear.options import CalibrationOptions
from torchshear.pruners import Criterion, random_criterion, registered_criteria
from torchshear.pruners.selection._request import Request

_CONTROLS: Final = ("uniform", "random")


@dataclass(frozen=True, slots=True)
class Contender:
    """A criterion or control: its name, the functions it stands for, and what it lacks, or ""."""

    name: str
    criteria: tuple[str | Criterion, ...]
    is_control: bool = False
    lacks: str = ""


@dataclass(frozen=True, slots=True)
class ComparedTarget:
    """One number of one word that says how much may be left."""

    word: str
    value: float

    @property
    def text(self) -> str:
        """ComparedTarget in words."""
        if self.word == "ratio":
            return f"ratio {self.value:g}"
        of = "MACs" if self.word == "target_macs" else "parameters"
        return f"at most {100 * self.value:.4g}% of the {of}" if self.value <= 1 else f"at most {self.value:,.0f} {of}"


def _first_units(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Scores that keep the first units of a group, shape (C,), positive."""
    return torch.arange(group.width, 0, -1, dtype=torch.float64)


def random_criteria(seeds: Sequence[int]) -> tuple[Criterion, ...]:
    """Make the random control's criteria, one for each seed.

    Raises:
        ArgumentError: there are none, or one is no integer or stands twice.
    """
    if not isinstance(seeds, Sequence) or not all(map(is_whole, seeds)) or not 0 < len(seeds) == len(set(seeds)):
        raise ArgumentError(f"seeds={quote(seeds)}; expected one or more integers, each once.")
    return tuple(random_criterion(seed) for seed in seeds)


def contenders_of(
    criteria: Sequence[str | Criterion] | None, random: tuple[Criterion, ...], data: CalibrationOptions
) -> tuple[list[Contender], dict[str, str]]:
    """List the controls and criteria to compare; and those of all criteria that lack data, with what they lack.

    Raises:
        ArgumentError: a criterion is unknown, or two have one name.
    """
    controls = [Contender("uniform", (_first_units,), True), Contender("random", random, True)]
    if isinstance(criteria, str) or callable(criteria):
        raise ArgumentError(f"criteria={criteria!r}; expected several, as in [{criteria!r}].")
    if criteria is not None:
        check_kind("criteria", criteria, Sequence, "names of criteria, or functions")
        if not all(isinstance(one, str) or callable(one) for one in criteria):
            raise ArgumentError(f"criteria={quote(criteria)}; expected names of criteria, or functions.")
    names = dict.fromkeys(registered_criteria() if criteria is None else criteria)
    chosen = [name for name in names if name not in _CONTROLS]
    lacks = {name: data.missing_for(name) for name in chosen}
    left_out = {str(name): why for name, why in lacks.items() if why} if criteria is None else {}
    found = [Contender(_name(one), (one,), lacks=lacks[one]) for one in chosen if str(one) not in left_out]
    named = [one.name for one in found]
    for name in named:
        if named.count(name) > 1:
            raise ArgumentError(f"criteria: two have the name {name!r}; give functions different __name__s.")
    return [*controls, *found], left_out


def _name(criterion: str | Criterion) -> str:
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)


def budgets_of(amounts: Mapping[str, Any]) -> list[ComparedTarget]:
    """Return the budgets to compare at; half of the MACs if none is given.

    Args:
        amounts: "target_macs", "target_params" and "ratio" -> a number, several, or None.

    Raises:
        ArgumentError: two kinds are given, or something else than different numbers.
    """
    given = {word: amount for word, amount in amounts.items() if amount is not None} or {"target_macs": 0.5}
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(f'{word}={given[word]}' for word in given)}: expected one kind of budget.")
    ((word, value),) = given.items()
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    is_number = [isinstance(one, Real) and not isinstance(one, bool) for one in values]
    budgets = (
        [ComparedTarget(word, float(one) if isinstance(one, Fraction) else one) for one in values]
        if all(is_number)
        else []
    )
    if not budgets or len({budget.text for budget in budgets}) < len(budgets):
        raise ArgumentError(f"{word}={quote(value)}; expected a number, or several different ones.")
    return budgets


def request_of(
    one: Contender,
    criterion: str | Criterion,
    budget: ComparedTarget,
    limits: Mapping[str, Any],
    ranking: Mapping[str, Any],
) -> Request:
    """Make the request of one criterion at one budget; the uniform control takes the same share of all groups.

    Args:
        one: the contender.
        criterion: one of its criteria.
        budget: what may be left.
        limits: keywords of `Request` that hold for all.
        ranking: keywords of `Request` on how units are ranked, which the uniform control does without.

    Raises:
        ArgumentError: a value is outside what it may be.
    """
    ranking = {} if one.name == "uniform" else ranking
    return Request(criterion=criterion, **{budget.word: budget.value}, **limits, **ranking)  # type: ignore[arg-type]
