"""Evolution of shares: parents are crossed and changed a little, and the best stay."""

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from torchshear._arguments import check_count, check_number, quote
from torchshear.errors import ArgumentError
from torchshear.searching._method import Outcome, Proposal, Proposals
from torchshear.searching._space import Floats, SearchSpace, WidthVector
from torchshear.searching.methods._controls import random_shares

_RIVALS: Final = 2  # of which the better one becomes a parent
_TRIES: Final = 20  # of children that are no widths seen before


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """Evolution with as many children as parents; the best of both are the next parents.

    The first parents are the uniform network and random ones. A child takes each share from either of two parents, each
    the better of two; then normal noise is added, and one factor brings it within the budget. All children of a
    generation are proposed together, so that several processes give the same result as one.

    Attributes:
        population: number of parents, and of children.
        noise: standard deviation of what is added to a share.

    Reference: (mu + lambda) selection with tournaments, as in Real et al., ICML 2017, arXiv:1703.01041, without their
        asynchronous order, which depends on the number of workers.
    """

    default_trials: ClassVar[int | None] = 50
    population: int = 8
    noise: float = 0.08

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_number("noise", self.noise)
        check_count("population", self.population, least=2)
        if not 0 < self.noise < 1:
            raise ArgumentError(f"noise={quote(self.noise)}; expected a number between 0 and 1.")

    def propose(self, space: SearchSpace, random: np.random.Generator) -> Proposals:
        """Propose one generation after another, without end."""
        first = [space.uniform(), *(space.at(random_shares(space, random)) for _ in range(self.population - 1))]
        seen = set(first)
        parents: list[Outcome] = list((yield [Proposal(widths, label="generation 0") for widths in first]))
        generation = 0
        while True:
            generation += 1
            parents.sort(key=lambda one: -one.score)  # stable: of equal ones the older stays
            parents = parents[: self.population]
            children = [self._child(space, random, parents, seen) for _ in range(self.population)]
            label = f"generation {generation}"
            parents += yield [Proposal(widths, label=label) for widths in children]

    def _child(
        self, space: SearchSpace, random: np.random.Generator, parents: list[Outcome], seen: set[WidthVector]
    ) -> WidthVector:
        for _ in range(_TRIES):
            one, other = (self._parent(space, random, parents) for _ in range(2))
            mixed = np.where(random.uniform(size=len(one)) < 0.5, one, other)
            changed = np.maximum(0.0, mixed + random.normal(0.0, self.noise, len(mixed)))
            shares = space.rescale(changed)
            if shares is not None and (widths := space.at(shares)) not in seen:
                seen.add(widths)
                return widths
        return space.at(random_shares(space, random))

    def _parent(self, space: SearchSpace, random: np.random.Generator, parents: list[Outcome]) -> Floats:
        """Return the shares of the better of some parents; they are sorted, so that the lower number is better."""
        return space.shares_of(parents[int(random.integers(len(parents), size=_RIVALS).min())].widths)
