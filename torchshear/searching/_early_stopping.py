"""Scores that become better known while a candidate is trained or evaluated, and when it is given up for them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final

from torch import Tensor

from torchshear._arguments import quote
from torchshear.errors import ArgumentError
from torchshear.searching._storage import import_optuna

EARLY: Final = {"median": "MedianPruner", "halving": "SuccessiveHalvingPruner"}
IsHopeless = Callable[[int, float], bool]
"""Called with the number of a score of a candidate, from 0, and the score; returns whether to give it up."""


class HopelessError(Exception):
    """A candidate was given up, at a score."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.value = value


class ScoreError(Exception):
    """Error for what should be a score and is none; says what it is."""


@dataclass(slots=True)
class Watch:
    """Reader of the scores that a candidate has on the way.

    Attributes:
        is_hopeless: asked after each of them; None: nothing is given up.
        n_seen: how many there were.
    """

    is_hopeless: IsHopeless | None = None
    n_seen: int = 0

    def follow(self, scores: Iterator[Any]) -> tuple[float, Any]:
        """Read scores to their end.

        Returns:
            The last one, NaN without any, and what the generator returns.

        Raises:
            HopelessError: the candidate is to be given up.
            ScoreError: something is no finite number.
        """
        value = math.nan
        while True:
            try:
                given = next(scores)
            except StopIteration as end:
                return value, end.value
            value = number_of(given)
            number, self.n_seen = self.n_seen, self.n_seen + 1
            if self.is_hopeless is not None and self.is_hopeless(number, value):
                if hasattr(scores, "close"):
                    scores.close()
                raise HopelessError(value)


def number_of(given: object) -> float:
    """Return a score as a number.

    Raises:
        ScoreError: it is none, or not finite.
    """
    if isinstance(given, Tensor) and given.numel() == 1:
        given = given.item()
    if isinstance(given, bool) or not isinstance(given, Real):
        raise ScoreError(f"gave {given!r:.60} of type {type(given).__name__}; expected a number")
    value = float(given)
    if not math.isfinite(value):
        raise ScoreError(f"gave {value}")
    return value


def find_early(given: object) -> Any:
    """Return the pruner of Optuna that decides which candidates are given up.

    Raises:
        ArgumentError: it is neither a name nor such a pruner, or Optuna is not installed.
    """
    optuna = import_optuna("stop_early")
    if isinstance(given, str) and given in EARLY:
        return getattr(optuna.pruners, EARLY[given])()
    if not isinstance(given, optuna.pruners.BasePruner):
        raise ArgumentError(
            f"stop_early={quote(given)}; expected one of {', '.join(map(repr, EARLY))}, or a pruner of Optuna, as "
            f"optuna.pruners.PercentilePruner(25.0)."
        )
    return given


def name_of_early(given: object) -> str | None:
    """Return what decides which candidates are given up, with its settings, as text; None without."""
    if given is None or isinstance(given, str):
        return given
    return f"{type(given).__name__}({', '.join(f'{name}={value!r}' for name, value in sorted(vars(given).items()))})"
