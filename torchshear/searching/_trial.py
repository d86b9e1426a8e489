"""One trial of a search."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SearchTrial:
    """One candidate that was evaluated.

    Attributes:
        number: place in the sequence of the search, from 0.
        widths: name of each searched group -> width.
        score: what `evaluate` gave, the higher the better; None if it failed. The last score before it was given up.
        budget: what is left of each bounded resource, as a share of the dense model's.
        is_within: whether that keeps the budget.
        seconds: how long it took to make and to evaluate it.
        state: "complete", "failed" or, where it was given up for a low score on the way, "stopped".
        label: what the method had in mind with it.
        error: why it failed, else "".
    """

    number: int
    widths: Mapping[str, int]
    score: float | None
    budget: Mapping[str, float]
    is_within: bool
    seconds: float
    state: Literal["complete", "failed", "stopped"]
    label: str = ""
    error: str = ""
