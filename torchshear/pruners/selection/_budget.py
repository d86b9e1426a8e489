"""Budgets of MACs, parameters and bytes, and the fewest steps that meet them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.errors import PlanError
from torchshear.graph import Cost
from torchshear.pruners.selection._pools import Steps, WidthSteps
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._size import FileOverhead, most_bytes

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

TARGETS: Final = {"macs": "target_macs", "n_params": "target_params", "size_bytes": "target_size"}
"""Attribute of `Cost` -> the argument that bounds it."""

_ROUNDS = 20  # of a tighter budget, each below the excess of the one before


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper bounds on the cost of a network.

    Attributes:
        limits: attribute of `Cost` -> the most that it may be.
        file: sizes of files; the bound of "size_bytes" leaves room for what they have beside tensors.
    """

    limits: Mapping[str, float]
    file: FileOverhead = field(default_factory=lambda: FileOverhead(0, 0))

    @classmethod
    def of(cls, dense: Cost, request: Request) -> "Budget":
        """Return the bounds of a request on a network whose dense cost is given."""
        limits = {}
        for name, target in (("macs", request.target_macs), ("n_params", request.target_params)):
            if target is not None:
                limits[name] = target * getattr(dense, name) if target <= 1 else target
        if request.target_size is None:
            return cls(limits)
        file = request.file or FileOverhead(dense.size_bytes, 0)
        most = most_bytes(request.target_size, file.dense_bytes)
        return cls(limits | {"size_bytes": most - file.beside_tensors}, file)

    def holds(self, cost: Cost) -> bool:
        """Return True if a network of this cost is within the budget."""
        return all(getattr(cost, name) <= most for name, most in self.limits.items())

    def excess(self, cost: Cost) -> float:
        """Return the factor by which a cost is above the budget; at most 1 if it is within."""
        return max(float(getattr(cost, name) / most) for name, most in self.limits.items())

    def divided_by(self, factor: float) -> "Budget":
        """Return the budget divided by a factor."""
        return replace(self, limits={name: most / factor for name, most in self.limits.items()})


class BudgetSolver:
    """Search for the numbers of steps, of each group, that meet a budget.

    Args:
        groups: the analysed network.
        width_steps: one of each group that may shrink.
    """

    def __init__(self, groups: ChannelGroups, width_steps: Sequence[WidthSteps]) -> None:
        self._cost = WidthCost(groups)
        self._width_steps = width_steps
        self._widths = np.array([group.width for group in groups])
        numbers = {group.name: number for number, group in enumerate(groups)}
        self._numbers = np.array([numbers[one.group.name] for one in width_steps], np.int64)

    def cost(self, taken: Indices) -> Cost:
        """Return the cost after some steps of each group."""
        widths = self._widths.copy()
        widths[self._numbers] = [one.widths[n] for one, n in zip(self._width_steps, taken, strict=True)]
        return self._cost(widths)

    def unit_costs(self, budget: Budget) -> Floats:
        """Return what a unit of each group costs while the others are whole, as a share of the budget's dense costs.

        That is the mean over an eighth of its units; with budgets of several kinds the sum of the shares.
        """
        whole = self._cost(self._widths)
        found = []
        for number in self._numbers:
            widths = self._widths.copy()
            n_gone = max(1, int(widths[number]) // 8)
            widths[number] -= n_gone
            less = self._cost(widths)
            shares = (1 - getattr(less, name) / max(getattr(whole, name), 1) for name in budget.limits)
            found.append(sum(shares) / n_gone)
        return np.array(found)

    def smallest(self) -> Cost:
        """Return the cost with every group at its narrowest."""
        return self.cost(np.array([len(one.widths) - 1 for one in self._width_steps]))

    def solve(self, steps: Steps, budget: Budget) -> Indices:
        """Take the fewest steps in order that meet a budget, and undo those that the budget leaves room for.

        Args:
            steps: the steps of all groups in order.
            budget: what may be left; steps can meet it.

        Returns:
            Number of steps taken in each group, shape (n_groups,).
        """
        low, high = int(steps.is_forced.sum()), len(steps.group)
        while low < high:
            middle = (low + high) // 2
            if budget.holds(self.cost(self._prefix(steps, middle))):
                high = middle
            else:
                low = middle + 1
        return self._give_back(steps, self._prefix(steps, low), low, budget)

    def _prefix(self, steps: Steps, length: int) -> Indices:
        return np.bincount(steps.group[:length], minlength=len(self._width_steps))

    def _give_back(self, steps: Steps, taken: Indices, length: int, budget: Budget) -> Indices:
        """Undo steps, the latest first, where the budget allows; a group is left alone after one that must stay."""
        taken, is_open = taken.copy(), np.ones(len(self._width_steps), bool)
        for group, is_forced in zip(steps.group[:length][::-1], steps.is_forced[:length][::-1], strict=True):
            if is_forced or not is_open.any():
                break
            if not is_open[group]:
                continue
            taken[group] -= 1
            if not budget.holds(self.cost(taken)):
                taken[group] += 1
                is_open[group] = False
        return taken


def check_feasible(solver: BudgetSolver, budget: Budget, dense: Cost, limits: str) -> None:
    """Raise PlanError, with the best that there is, where a budget cannot be met.

    Args:
        solver: knows the narrowest network.
        budget: what may be left.
        dense: cost of the network as it is.
        limits: the limits that hold, for the message.
    """
    smallest = solver.smallest()
    if budget.holds(smallest):
        return
    missed = []
    for name, asked in budget.limits.items():
        most, best, whole = asked, getattr(smallest, name), getattr(dense, name)
        if best <= most:
            continue
        unit = ""
        if name == "size_bytes":
            beside, whole, unit = budget.file.beside_tensors, budget.file.dense_bytes, " bytes"
            most, best = most + beside, best + beside
        missed.append(
            f"{TARGETS[name]}: at most {most:,.0f}{unit} ({most / whole:.3g} of the dense model's) were asked for, and "
            f"the best possible is {best:,} ({best / whole:.3g})"
        )
    raise PlanError(f"{'; '.join(missed)}, under {limits}. Ask for less, or loosen a limit.")


def solve_exactly(solve: Callable[[Budget], Indices], exact: Callable[[Indices], Cost], budget: Budget) -> Indices:
    """Solve again with a tighter budget where the exact cost of what was found is above it.

    Args:
        solve: gives the steps of each group for a budget.
        exact: cost of the network with those units really cut.
        budget: what may be left.

    Raises:
        PlanError: that does not end within some rounds.
    """
    factor = 1.0
    for _ in range(_ROUNDS):
        taken = solve(budget.divided_by(factor))
        excess = budget.excess(exact(taken))
        if excess <= 1:
            return taken
        factor *= excess
    raise PlanError(f"no widths within the target were found in {_ROUNDS} rounds; ask for a little less.")
