"""Controls of a search: the same share of all groups, and shares at random."""

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from torchshear._arguments import check_count
from torchshear.searching._method import Proposal, Proposals
from torchshear.searching._space import Floats, SearchSpace, WidthVector

_TRIES: Final = 1000  # of shares that no factor brings within the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """The same share of every group, just within the budget: one trial."""

    default_trials: ClassVar[int | None] = None

    def propose(self, space: SearchSpace, random: np.random.Generator) -> Proposals:
        """Propose the widths."""
        yield [Proposal(space.uniform(), label="the same share")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomSearch:
    """Shares drawn from a seed, brought within the budget by one factor; any number of processes give the same.

    Attributes:
        batch: how many are proposed together.
    """

    default_trials: ClassVar[int | None] = 50
    batch: int = 8

    def __post_init__(self) -> None:
        """Check the number."""
        check_count("batch", self.batch)

    def propose(self, space: SearchSpace, random: np.random.Generator) -> Proposals:
        """Propose widths without end."""
        while True:
            yield [Proposal(random_widths(space, random)) for _ in range(self.batch)]


def random_shares(space: SearchSpace, random: np.random.Generator) -> Floats:
    """Draw shares between 0 and 1 for all groups, brought within the budget by one factor.

    A budget that hardly any shares meet is met by drawing from higher up: the lower bound rises by a twentieth of what
    is left with every try that fails, as in NNI's simulated annealing.
    """
    low = 0.0
    for _ in range(_TRIES):
        found = space.rescale(random.uniform(low, 1.0, len(space.names)))
        if found is not None:
            return found
        low += (1 - low) / 20
    return space.shares_of(space.uniform())


def random_widths(space: SearchSpace, random: np.random.Generator) -> WidthVector:
    """Draw widths within the budget."""
    return space.at(random_shares(space, random))
