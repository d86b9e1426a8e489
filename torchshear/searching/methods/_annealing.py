"""Simulated annealing over shares, guided by the sizes of groups."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from torchshear._arguments import check_number, quote
from torchshear.errors import ArgumentError
from torchshear.searching._method import Outcome, Proposal, Proposals
from torchshear.searching._space import Floats, SearchSpace
from torchshear.searching.methods._controls import random_shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Annealing:
    """Simulated annealing as NNI has it, with changes of the score measured by what they usually are.

    A state is a row of shares, ascending, given to the groups in the order of their sizes: a larger group loses at
    least as large a share. Each move adds U(-m, m) to every share, with m = perturbation * T / T0, sorts and rescales
    them to the budget, and is accepted if the score rises, else with probability

        exp(-(fall / usual change) / 2 * T0 / T)

    where NNI has exp(-fall / T): with accuracies in [0, 1] that accepts 95 % of all falls, even at the end. The usual
    change is the mean of all changes seen so far; a usual fall is accepted in 6 of 10 cases at the beginning, and in 1
    of 10 at the end. T becomes cooling * T with every accepted move, from `start` until
    it is at most `stop`: 16 accepted moves by default.

    Attributes:
        start: temperature at the beginning, T0.
        stop: temperature at the end.
        cooling: factor of each step, in (0, 1).
        perturbation: largest change of a share in the first move, in (0, 1].

    Reference: NNI `SimulatedAnnealingPruner`; Liu et al., AutoCompress, AAAI 2020, arXiv:1907.03141.
    """

    default_trials: ClassVar[int | None] = None
    start: float = 100.0
    stop: float = 20.0
    cooling: float = 0.9
    perturbation: float = 0.35

    def __post_init__(self) -> None:
        """Refuse temperatures that never end."""
        for name in ("start", "stop", "cooling", "perturbation"):
            check_number(name, getattr(self, name))
        is_right = 0 < self.stop < self.start < math.inf and 0 < self.cooling < 1 and 0 < self.perturbation <= 1
        if not is_right:
            raise ArgumentError(
                f"Annealing has start={quote(self.start)}, stop={quote(self.stop)}, cooling={quote(self.cooling)} and "
                f"perturbation={quote(self.perturbation)}; expected 0 < stop < start, a cooling between 0 and 1, and a "
                f"perturbation above 0 and at most 1."
            )

    def magnitudes(self) -> list[float]:
        """Return the largest change of a share in each accepted move."""
        temperature, found = self.start, []
        while temperature > self.stop:
            found.append(self.perturbation * temperature / self.start)
            temperature *= self.cooling
        return found

    def propose(self, space: SearchSpace, random: np.random.Generator) -> Proposals:
        """Propose one state after another."""
        order = np.argsort(space.sizes, kind="stable")  # groups from the smallest to the largest
        shares = np.sort(random_shares(space, random))
        shares = _rescaled(space, shares, order, shares)
        current: Outcome | None = None
        changes: list[float] = []
        for magnitude in self.magnitudes():
            is_accepted = False
            while not is_accepted:
                moved = self._move(space, random, shares, order, magnitude)
                label = f"magnitude {magnitude:.3f}"
                (outcome,) = yield [Proposal(space.at(_in_place(moved, order)), label=label)]
                is_accepted = self._accepts(random, current, outcome, changes, magnitude)
            shares, current = moved, outcome

    def _move(
        self, space: SearchSpace, random: np.random.Generator, shares: Floats, order: np.ndarray, magnitude: float
    ) -> Floats:
        """Perturb shares until they can be brought within the budget."""
        for _ in range(1000):
            moved = np.sort(np.maximum(0.0, shares + random.uniform(-magnitude, magnitude, len(shares))))
            found = space.rescale(_in_place(moved, order))
            if found is not None:
                return np.sort(found)
        return shares

    def _accepts(
        self,
        random: np.random.Generator,
        current: Outcome | None,
        outcome: Outcome,
        changes: list[float],
        magnitude: float,
    ) -> bool:
        """Decide on a move, and note how much the score changed. The first one that has a score is accepted."""
        if outcome.has_failed:
            return False
        if current is None:
            return True
        fall = current.score - outcome.score
        if fall:
            changes.append(abs(fall))
        if fall <= 0:
            return True
        usual = sum(changes) / len(changes)
        return bool(random.uniform() < math.exp(-fall / usual / 2 * self.perturbation / magnitude))


def _in_place(ascending: Floats, order: np.ndarray) -> Floats:
    """Give ascending shares to groups in the order of their sizes."""
    found = np.empty_like(ascending)
    found[order] = ascending
    return found


def _rescaled(space: SearchSpace, ascending: Floats, order: np.ndarray, otherwise: Floats) -> Floats:
    found = space.rescale(_in_place(ascending, order))
    return otherwise if found is None else np.sort(found)
