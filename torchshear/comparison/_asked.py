"""What a comparison is asked: which criteria and controls, at which budgets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor

from torchshear._arguments import check_kind, is_whole, shown
from torchshear._asking import Data, missing_data
from torchshear._words import Shares
from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.errors import ArgumentError
from torchshear.pruners import Criterion, Request, random_criterion, registered_criteria
from torchshear.speedup import resolve_alignment

_CONTROLS: Final = ("uniform", "random")
_BUDGETS: Final = ("target_macs", "target_params", "ratio")
_OF_THE_REQUEST: Final = (*Shares.__annotations__, "axes", "exclude", "min_width")


@dataclass(frozen=True, slots=True)
class Contender:
    """A criterion or control: its name, the functions it stands for, and what it lacks, or ""."""

    name: str
    criteria: tuple[str | Criterion, ...]
    is_control: bool = False
    lacks: str = ""


@dataclass(frozen=True, slots=True)
class Budget:
    """One number of one word that says how much may be left."""

    word: str
    value: float

    @property
    def text(self) -> str:
        """The budget in words."""
        if self.word == "ratio":
            return f"ratio {self.value:g}"
        of = "MACs" if self.word == "target_macs" else "parameters"
        return f"at most {100 * self.value:.4g}% of the {of}" if self.value <= 1 else f"at most {self.value:,.0f} {of}"


def _first_units(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Scores that keep the first units of a group, shape (C,), positive."""
    return torch.arange(group.width, 0, -1, dtype=torch.float64)


def random_criteria(seeds: Sequence[int]) -> tuple[Criterion, ...]:
    """The random control's criteria, one a seed.

    Raises:
        ArgumentError: there are none, or one is no integer or stands twice.
    """
    if not isinstance(seeds, Sequence) or not all(map(is_whole, seeds)) or not 0 < len(seeds) == len(set(seeds)):
        raise ArgumentError(f"seeds={shown(seeds)}; expected one or more integers, each once.")
    return tuple(random_criterion(seed) for seed in seeds)


def contenders_of(
    criteria: Sequence[str | Criterion] | None, random: tuple[Criterion, ...], data: Data
) -> tuple[list[Contender], dict[str, str]]:
    """What is compared, controls first, and what of all criteria is not, with what it lacks.

    Raises:
        ArgumentError: a criterion is unknown, or two have one name.
    """
    controls = [Contender("uniform", (_first_units,), True), Contender("random", random, True)]
    if isinstance(criteria, str) or callable(criteria):
        raise ArgumentError(f"criteria={criteria!r}; expected several, as in [{criteria!r}].")
    if criteria is not None:
        check_kind("criteria", criteria, Sequence, "names of criteria, or functions")
        if not all(isinstance(one, str) or callable(one) for one in criteria):
            raise ArgumentError(f"criteria={shown(criteria)}; expected names of criteria, or functions.")
    names = dict.fromkeys(registered_criteria() if criteria is None else criteria)
    chosen = [name for name in names if name not in _CONTROLS]
    lacks = {name: missing_data(name, data) for name in chosen}
    left_out = {str(name): why for name, why in lacks.items() if why} if criteria is None else {}
    found = [Contender(_name(one), (one,), lacks=lacks[one]) for one in chosen if str(one) not in left_out]
    named = [one.name for one in found]
    for name in named:
        if named.count(name) > 1:
            raise ArgumentError(f"criteria: two have the name {name!r}; give functions different __name__s.")
    return [*controls, *found], left_out


def _name(criterion: str | Criterion) -> str:
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)


def budgets_of(words: Mapping[str, Any]) -> list[Budget]:
    """The budgets that words ask for; half of the MACs if they ask for none.

    Raises:
        ArgumentError: words of two kinds are given, or something else than different numbers.
    """
    given = {word: words[word] for word in _BUDGETS if words.get(word) is not None} or {"target_macs": 0.5}
    if len(given) > 1:
        raise ArgumentError(f"{' and '.join(f'{word}={given[word]}' for word in given)}: expected one kind of budget.")
    ((word, value),) = given.items()
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    is_number = [isinstance(one, Real) and not isinstance(one, bool) for one in values]
    budgets = (
        [Budget(word, float(one) if isinstance(one, Fraction) else one) for one in values] if all(is_number) else []
    )
    if not budgets or len({budget.text for budget in budgets}) < len(budgets):
        raise ArgumentError(f"{word}={shown(value)}; expected a number, or several different ones.")
    return budgets


def request_of(one: Contender, criterion: str | Criterion, budget: Budget, words: Mapping[str, Any]) -> Request:
    """What a contender is asked; groups of the uniform control lose the same share, whatever the scope.

    Raises:
        ArgumentError: a word is outside what it may be.
    """
    asked: dict[str, Any] = {budget.word: budget.value}
    asked |= {word: words[word] for word in _OF_THE_REQUEST if word in words}
    if one.name == "uniform":
        asked |= {"scope": "local", "combine": "sum"}
    alignment = resolve_alignment(words.get("align"))
    return Request(criterion=criterion, alignment=alignment, **asked)
