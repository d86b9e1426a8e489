"""Interface of a method of search, which proposes widths and learns how they scored."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from torchshear.searching._space import SearchSpace, WidthVector


@dataclass(frozen=True, slots=True)
class Proposal:
    """Widths that a method wants to know the score of.

    Attributes:
        widths: width of each searched group.
        path: widths that the model has had before, one after another: with fine-tuning, that of the last of them is
            where this one starts. Empty for the dense model.
        label: what the method has in mind with it, for the table.
        is_tuned: whether `finetune` runs before it is scored; it never does where none is given.
    """

    widths: WidthVector
    path: tuple[WidthVector, ...] = ()
    label: str = ""
    is_tuned: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """Score of a proposal.

    Attributes:
        widths: its widths.
        score: what `evaluate` gave, the higher the better; minus infinity where that failed or was stopped early.
        load: by what factor these widths use the budget; at most 1 within it.
    """

    widths: WidthVector
    score: float
    load: float

    @property
    def has_failed(self) -> bool:
        """Return True if there is no score."""
        return self.score == -math.inf


Proposals = Generator[Sequence[Proposal], Sequence[Outcome], None]
"""Yields proposals that may be evaluated side by side, and is sent their outcomes in the same order."""


@runtime_checkable
class SearchMethod(Protocol):
    """Method of search; what it proposes depends on the seed and the outcomes alone, so that it can be resumed."""

    def propose(self, space: SearchSpace, random: np.random.Generator) -> Proposals:
        """Propose widths until there is nothing more to try."""
