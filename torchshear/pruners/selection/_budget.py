"""Budgets of MACs and parameters: how far along the order of steps a network has to go to meet them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchshear.dependency import ChannelGroups, WidthCost
from torchshear.errors import PlanError
from torchshear.graph import Cost
from torchshear.pruners.selection._pools import Ladder, Steps

Indices = npt.NDArray[np.int64]

_ROUNDS = 20  # of a tighter budget, each below the excess of the one before


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be left of a network.

    Attributes:
        macs: multiply-accumulate operations of a sample, or None.
        n_params: parameters, or None.
    """

    macs: float | None
    n_params: float | None

    @classmethod
    def of(cls, dense: Cost, target_macs: float | None, target_params: float | None) -> "Budget":
        """A budget from shares of the dense network in (0, 1], or from numbers above 1."""
        return cls(_absolute(target_macs, dense.macs), _absolute(target_params, dense.n_params))

    def holds(self, cost: Cost) -> bool:
        """Whether a network keeps within it."""
        return (self.macs is None or cost.macs <= self.macs) and (
            self.n_params is None or cost.n_params <= self.n_params
        )

    def excess(self, cost: Cost) -> float:
        """How far a network is above it, as a factor: at most 1 where it holds."""
        return max(
            cost.macs / self.macs if self.macs is not None else 0.0,
            cost.n_params / self.n_params if self.n_params is not None else 0.0,
        )

    def tightened(self, factor: float) -> "Budget":
        """The budget divided by a factor."""
        return Budget(
            None if self.macs is None else self.macs / factor,
            None if self.n_params is None else self.n_params / factor,
        )


def _absolute(target: float | None, dense: int) -> float | None:
    return None if target is None else target * dense if target <= 1 else target


class Solver:
    """Finds how many steps of each ladder meet a budget.

    Args:
        groups: the analysed network.
        ladders: one of each group that may shrink.
    """

    def __init__(self, groups: ChannelGroups, ladders: Sequence[Ladder]) -> None:
        self._cost = WidthCost(groups)
        self._ladders = ladders
        self._widths = np.array([group.width for group in groups])
        numbers = {group.name: number for number, group in enumerate(groups)}
        self._numbers = np.array([numbers[one.group.name] for one in ladders], np.int64)

    def cost(self, taken: Indices) -> Cost:
        """Cost after some steps of each ladder."""
        widths = self._widths.copy()
        widths[self._numbers] = [one.widths[n] for one, n in zip(self._ladders, taken, strict=True)]
        return self._cost(widths)

    def least(self) -> Cost:
        """Cost with every group at its narrowest."""
        return self.cost(np.array([len(one.widths) - 1 for one in self._ladders]))

    def solve(self, steps: Steps, budget: Budget) -> Indices:
        """The fewest steps in order that meet a budget, and of these given back what the budget leaves room for.

        Args:
            steps: the steps of all ladders in order.
            budget: what may be left; steps can meet it.

        Returns:
            How many steps of each ladder are taken, shape (n_ladders,).
        """
        low, high = int(steps.is_forced.sum()), len(steps.ladder)
        while low < high:
            middle = (low + high) // 2
            if budget.holds(self.cost(self._prefix(steps, middle))):
                high = middle
            else:
                low = middle + 1
        return self._given_back(steps, self._prefix(steps, low), low, budget)

    def _prefix(self, steps: Steps, length: int) -> Indices:
        return np.bincount(steps.ladder[:length], minlength=len(self._ladders))

    def _given_back(self, steps: Steps, taken: Indices, length: int, budget: Budget) -> Indices:
        """Undo steps, the latest first, where the budget allows; what does not fit back ends its ladder."""
        taken, is_open = taken.copy(), np.ones(len(self._ladders), bool)
        for ladder, is_forced in zip(steps.ladder[:length][::-1], steps.is_forced[:length][::-1], strict=True):
            if is_forced or not is_open.any():
                break
            if not is_open[ladder]:
                continue
            taken[ladder] -= 1
            if not budget.holds(self.cost(taken)):
                taken[ladder] += 1
                is_open[ladder] = False
        return taken


def check_feasible(solver: Solver, budget: Budget, dense: Cost, limits: str) -> None:
    """Raise PlanError, with the best that there is, where a budget cannot be met.

    Args:
        solver: knows the narrowest network.
        budget: what may be left.
        dense: cost of the network as it is.
        limits: the limits that hold, for the message.
    """
    least = solver.least()
    if budget.holds(least):
        return
    missed = [
        f"{name}: at most {asked:,.0f} ({asked / whole:.3g} of the dense model's) were asked for, and the best "
        f"possible is {best:,} ({best / whole:.3g})"
        for name, asked, best, whole in (
            ("target_macs", budget.macs, least.macs, dense.macs),
            ("target_params", budget.n_params, least.n_params, dense.n_params),
        )
        if asked is not None and best > asked
    ]
    raise PlanError(f"{'; '.join(missed)}, under {limits}. Ask for less, or loosen a limit.")


def refined(solve: Callable[[Budget], Indices], exact: Callable[[Indices], Cost], budget: Budget) -> Indices:
    """Solve again with a tighter budget where the exact cost of what was found is above it.

    Args:
        solve: steps of each ladder for a budget.
        exact: cost of the network with those units really cut.
        budget: what may be left.

    Raises:
        PlanError: that does not end within some rounds.
    """
    factor = 1.0
    for _ in range(_ROUNDS):
        taken = solve(budget.tightened(factor))
        excess = budget.excess(exact(taken))
        if excess <= 1:
            return taken
        factor *= excess
    raise PlanError(f"no widths within the target were found in {_ROUNDS} rounds; ask for a little less.")
