"""Space of a search: the groups whose widths are sought, the widths that each may have, and what they cost."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.errors import PlanError
from torchshear.pruners._planning import RankedGroups
from torchshear.pruners.allocation._problem import Levels
from torchshear.searching._budget import SearchBudget

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
WidthVector = tuple[int, ...]

_HALVINGS = 32  # of the interval in which a factor lies


@dataclass(frozen=True, slots=True, eq=False)
class SearchSpace:
    """Widths that are searched.

    Attributes:
        names: name of each searched group; every vector of widths or shares is in this order.
        dense: width of each in the dense model, shape (n_groups,).
        allowed: widths that each may have, ascending: aligned, balanced, within limits.
        sizes: weights that depend on the units of each group, shape (n_groups,).
        budget: what the result has to keep.
        ranked: the groups with their units in the order in which they go.
    """

    names: tuple[str, ...]
    dense: Indices
    allowed: tuple[tuple[int, ...], ...]
    sizes: Floats
    budget: SearchBudget
    ranked: RankedGroups

    @classmethod
    def of(cls, ranked: RankedGroups, budget: SearchBudget) -> "SearchSpace":
        """Make the space of ranked groups."""
        steps = ranked.steps
        return cls(
            tuple(one.group.name for one in steps),
            np.array([one.group.width for one in steps], np.int64),
            tuple(tuple(sorted(one.widths[one.n_forced :].tolist())) for one in steps),
            _sizes(budget),
            budget,
            ranked,
        )

    @property
    def widest(self) -> WidthVector:
        """The widest that groups may be: those of the dense model, unless a minimum ratio forbids them."""
        return tuple(allowed[-1] for allowed in self.allowed)

    @property
    def narrowest(self) -> WidthVector:
        """The narrowest that groups may be."""
        return tuple(allowed[0] for allowed in self.allowed)

    def check_reachable(self, limits: str) -> None:
        """Raise PlanError, with the best that is possible, if the narrowest widths are above the budget.

        Args:
            limits: the limits that hold, for the message.
        """
        best = self.budget.shares(self.narrowest)
        missed = [
            f"at most {limit.share:.3g} of the {limit.resource} were asked for, and the best possible is "
            f"{best[limit.resource]:.3g}"
            for limit in self.budget.limits
            if best[limit.resource] > limit.share * (1 + 1e-9)
        ]
        if missed:
            raise PlanError(f"{'; '.join(missed)}, under {limits}. Ask for less, or loosen a limit.")

    def at(self, shares: Sequence[float] | Floats) -> WidthVector:
        """Return the allowed widths nearest to those that are left when a share of each group goes.

        floor(width * share) units go, as everywhere; of two allowed widths equally near the wider one is taken.

        Args:
            shares: share of each group that is to go, shape (n_groups,); beyond [0, 1] they count as 0 or 1.
        """
        found = []
        for width, allowed, share in zip(self.dense.tolist(), self.allowed, np.asarray(shares).tolist(), strict=True):
            target = width - int(width * min(max(share, 0.0), 1.0) + 1e-9)
            place = bisect_left(allowed, target)
            below, above = allowed[max(place - 1, 0)], allowed[min(place, len(allowed) - 1)]
            found.append(above if abs(above - target) <= abs(target - below) else below)
        return tuple(found)

    def shares_of(self, widths: Sequence[int]) -> Floats:
        """Return the share of each group that is gone at some widths, shape (n_groups,)."""
        return np.asarray(1 - np.asarray(widths) / self.dense, np.float64)

    def rescale(self, shares: Floats, load: float = 1.0) -> Floats | None:
        """Multiply shares by the factor with which the network is just within a budget.

        Of NNI's simulated annealing: v becomes v * P / (sum of N_l v_l / sum of N_l), where P is the share that is to
        go; here with the cost of the widths that come out, so that rounding and any budget are counted.

        Args:
            shares: relative shares of the groups to go, shape (n_groups,), none negative.
            load: by what factor the budget may be used; 1: just within it.

        Returns:
            The shares; None if one of them would have to be 1 or more, or if none is above 0.
        """
        largest = float(np.max(shares, initial=0.0))
        if largest <= 0:
            return None
        low, high = 0.0, 1.0 / largest
        if not self._is_within(shares * high, load):
            return None
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._is_within(shares * middle, load) else (middle, high)
        found = np.asarray(shares * high, np.float64)
        return found if float(found.max()) < 1 else None

    def uniform(self, load: float = 1.0) -> WidthVector:
        """Return the widths at which every group has lost the same share, as far as it may, just within a budget."""
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._is_within(np.full(len(self.names), middle), load) else (middle, high)
        return self.at(np.full(len(self.names), high))

    def narrowed(self, widths: WidthVector, number: int, load: float) -> WidthVector | None:
        """Narrow one group as little as brings the network within a budget.

        Args:
            widths: the widths before.
            number: number of the group.
            load: by what factor the budget may be used.

        Returns:
            The widths; where not even the narrowest of the group is enough, with that; None if it is that already.
        """
        narrower = [width for width in self.allowed[number] if width < widths[number]]
        if not narrower:
            return None

        def at(place: int) -> WidthVector:
            return (*widths[:number], narrower[place], *widths[number + 1 :])

        low, high = 0, len(narrower) - 1  # the largest place that is within; 0 if none is
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.budget.load(at(middle)) <= load + 1e-9 else (low, middle - 1)
        return at(low)

    def levels(self) -> list[Levels]:
        """Return the widths that each group may have, and what it loses at each, for the exact solver."""
        return self.ranked.levels()

    def _is_within(self, shares: Floats, load: float) -> bool:
        return self.budget.load(self.at(shares)) <= load + 1e-9


def _sizes(budget: SearchBudget) -> Floats:
    """Count the weights that depend on the units of each searched group."""
    cost, found = WidthCost(budget.groups), []
    every = np.array([group.width for group in budget.groups], np.int64)
    whole = cost(every).n_params
    for number in budget.free:
        without = every.copy()
        without[number] = 0
        found.append(whole - cost(without).n_params)
    return np.array(found, np.float64)
