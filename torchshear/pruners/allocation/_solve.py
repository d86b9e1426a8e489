"""The allocation of widths as a mixed integer program, solved by HiGHS with a bound on what any other could lose."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from torchshear.errors import PlanError
from torchshear.pruners.allocation._problem import (
    CostBudget,
    Floats,
    Levels,
    check_budgets,
    merge_terms,
)

GAP: Final = 0.001
TIME_LIMIT: Final = 30.0

_SCALE = 1e3  # of the losses of all groups together, so that the solver's absolute tolerance of 1e-6 is none
_SLACK = 1e-9  # by which rounding may exceed a limit
_ROUNDS = 4  # of a tighter limit, where the solver's tolerance exceeded one
_TIME_LIMIT_STATUS, _INFEASIBLE_STATUS = 1, 2  # of scipy.optimize.milp

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Solution:
    """A width for each group.

    Attributes:
        widths: name of a group -> its width.
        loss: sum of the losses of these widths.
        bound: no choice within the budgets loses less.
        costs: name of a budget -> cost at these widths.
        seconds: how long the solver took.
    """

    widths: Mapping[str, int]
    loss: float
    bound: float
    costs: Mapping[str, float]
    seconds: float

    @property
    def gap(self) -> float:
        """Share of the loss that another choice might save: 0 if none does."""
        excess = max(self.loss - self.bound, 0.0)
        return excess / abs(self.loss) if excess else 0.0


def allocate(
    levels: Sequence[Levels], budgets: Sequence[CostBudget], *, gap: float = GAP, time_limit: float = TIME_LIMIT
) -> Solution:
    """Choose a width for each group, so that the sum of losses is least and every budget holds.

        min  sum_g sum_l loss_g(l) w_gl    s.t.  sum_l w_gl = 1,    sum over terms of  sum_c T[c] z_c <= limit

    One binary w for each level of each group; one z in [0, 1] for each combination c of levels of the groups of a term,
    whose sums over all groups but one are that group's w (the local marginal polytope). Where w is whole, z is 1 at the
    combination that was chosen and 0 elsewhere, so that the costs are exact.

    Args:
        levels: the widths that each group may have, and what they lose.
        budgets: upper bounds on costs, all of which hold.
        gap: the search ends when no choice can lose less than the best one found by more than this share.
        time_limit: seconds after which it ends with the best one found.

    Returns:
        The widths, with the bound that the solver proved.

    Raises:
        ArgumentError: a term does not fit the groups.
        PlanError: no choice is within the budgets, with the least that is possible; or none was found in time.

    Example:
        >>> from torchshear.pruners.allocation._problem import CostBudget, CostTerm, Levels
        >>> table = CostTerm(("a", "b"), np.array([[1.0, 2.0], [2.0, 4.0]]))
        >>> levels = [Levels("a", (8, 16), (1.0, 0.0)), Levels("b", (8, 16), (3.0, 0.0))]
        >>> dict(allocate(levels, [CostBudget("latency_ms", 2.5, (table,))]).widths)
        {'a': 8, 'b': 16}

    Reference: HALP (arXiv:2110.10811) puts latency under a budget, MDP (arXiv:2504.02168) makes it depend on widths in
    pairs; the polytope is that of Schlesinger's relaxation, see Wainwright and Jordan, 2008, section 4.1.
    """
    check_budgets(levels, budgets)
    start = time.perf_counter()
    losses = np.concatenate([one.losses for one in levels]) if levels else np.zeros(0)
    tightened = list(budgets)
    for _ in range(_ROUNDS):
        program = _Program.of(levels, tightened)
        found = program.solve(losses, gap, time_limit)
        if found.status == _INFEASIBLE_STATUS:
            raise PlanError(_explain_infeasible(levels, budgets, time_limit))
        if found.x is None:
            raise PlanError(
                f"no widths within the budgets were found in {time_limit:g} s, for {len(levels)} groups with "
                f"{len(losses)} levels. Allow more time, fewer levels, or ask for less."
            )
        chosen = program.chosen(found.x)
        costs = {budget.name: budget.cost(levels, chosen) for budget in budgets}
        excess = [max(costs[budget.name] - budget.limit, 0.0) for budget in budgets]
        if all(over <= _SLACK * abs(budget.limit) for over, budget in zip(excess, budgets, strict=True)):
            break
        tightened = [replace(one, limit=one.limit - 2 * over) for one, over in zip(tightened, excess, strict=True)]
    loss = float(sum(one.losses[level] for one, level in zip(levels, chosen, strict=True)))
    widths = {one.name: one.widths[level] for one, level in zip(levels, chosen, strict=True)}
    bound = min(program.bound(found, losses), loss)
    seconds = time.perf_counter() - start
    return Solution(MappingProxyType(widths), loss, bound, MappingProxyType(costs), seconds)


def least_cost(
    levels: Sequence[Levels],
    budget: CostBudget,
    within: Sequence[CostBudget] = (),
    *,
    time_limit: float = TIME_LIMIT,
) -> float:
    """Return the least that a budget's cost can be at any widths.

    Args:
        levels: the widths that each group may have.
        budget: the cost; its limit does not count.
        within: budgets that hold; there are widths within them.
        time_limit: seconds after which the search ends with the least that it proved.

    Raises:
        ArgumentError: a term does not fit the groups.
    """
    check_budgets(levels, [*within, budget])
    merged, constant = merge_terms(levels, budget)
    program = _Program.of(levels, [*within, replace(budget, limit=0.0)])
    costs = program.row(merged)
    found = replace(program, constraints=program.constraints[:-1]).solve(costs, 0.0, time_limit)
    return constant + program.bound(found, costs)


@dataclass(frozen=True, slots=True, eq=False)
class _Program:
    """Variables and constraints of the program.

    Attributes:
        sizes: number of levels of each group; the first variables are theirs, one group after another.
        first: number of the first variable of each set of groups that stands in a term of several.
        n_variables: how many variables there are.
        constraints: what holds of them; those of the budgets are the last, one each.
    """

    sizes: tuple[int, ...]
    first: Mapping[tuple[int, ...], int]
    n_variables: int
    constraints: tuple[LinearConstraint, ...]

    @classmethod
    def of(cls, levels: Sequence[Levels], budgets: Sequence[CostBudget]) -> "_Program":
        """Write down the variables and constraints."""
        sizes = tuple(len(one.widths) for one in levels)
        merged = [merge_terms(levels, budget) for budget in budgets]
        first, n_variables = {}, sum(sizes)
        for groups in sorted({groups for terms, _ in merged for groups in terms if len(groups) > 1}):
            first[groups] = n_variables
            n_variables += int(np.prod([sizes[group] for group in groups]))
        program = cls(sizes, first, n_variables, ())
        constraints = [program._one_level_each(), *(program._marginals(groups) for groups in first)]
        for budget, (terms, constant) in zip(budgets, merged, strict=True):
            scale = abs(budget.limit) or 1.0
            row = program.row(terms) / scale
            constraints.append(LinearConstraint(row[None], -np.inf, (budget.limit - constant) / scale))
        return replace(program, constraints=tuple(constraints))

    @property
    def starts(self) -> Indices:
        """Number of the first variable of each group."""
        return np.cumsum([0, *self.sizes])[:-1]

    def row(self, terms: Mapping[tuple[int, ...], Floats]) -> Floats:
        """Return the coefficients of merged terms, shape (n_variables,)."""
        row = np.zeros(self.n_variables)
        for groups, table in terms.items():
            start = self.first[groups] if len(groups) > 1 else self.starts[groups[0]]
            row[start : start + table.size] += table.ravel()
        return row

    def _one_level_each(self) -> LinearConstraint:
        rows = np.repeat(np.arange(len(self.sizes)), self.sizes)
        ones = coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), (len(self.sizes), self.n_variables))
        return LinearConstraint(ones.tocsc(), 1, 1)

    def _marginals(self, groups: tuple[int, ...]) -> LinearConstraint:
        """Tie the combinations of some groups to the levels of each of them."""
        shape = [self.sizes[group] for group in groups]
        cells = self.first[groups] + np.arange(int(np.prod(shape)))
        numbers = np.indices(shape).reshape(len(shape), -1)
        offsets = np.cumsum([0, *shape])
        n_rows = int(offsets[-1])
        levels = np.concatenate([self.starts[group] + np.arange(self.sizes[group]) for group in groups])
        rows = np.concatenate([*(numbers[axis] + offsets[axis] for axis in range(len(shape))), np.arange(n_rows)])
        columns = np.concatenate([np.tile(cells, len(shape)), levels])
        values = np.concatenate([np.ones(cells.size * len(shape)), -np.ones(n_rows)])
        return LinearConstraint(coo_array((values, (rows, columns)), (n_rows, self.n_variables)).tocsc(), 0, 0)

    def solve(self, weights: Floats, gap: float, time_limit: float) -> OptimizeResult:
        """Minimise a weighted sum of variables; weights may be given of the first ones alone."""
        padded = np.zeros(self.n_variables)
        padded[: len(weights)] = weights * self._scale(weights)
        is_whole = np.arange(self.n_variables) < sum(self.sizes)
        options: dict[str, Any] = {"mip_rel_gap": gap, "time_limit": time_limit}
        return milp(
            padded, integrality=is_whole.astype(int), bounds=Bounds(0, 1), constraints=self.constraints, options=options
        )

    def bound(self, found: OptimizeResult, weights: Floats) -> float:
        """Return the least that the weighted sum can be, as far as it was proved."""
        return float(found.mip_dual_bound) / self._scale(weights)

    @staticmethod
    def _scale(weights: Floats) -> float:
        largest = float(np.abs(weights).sum())
        return _SCALE / largest if largest else 1.0

    def chosen(self, values: Floats) -> list[int]:
        """Return the number of the chosen level of each group."""
        return [int(np.argmax(part)) for part in np.split(values[: sum(self.sizes)], self.starts[1:])]


def _explain_infeasible(levels: Sequence[Levels], budgets: Sequence[CostBudget], time_limit: float) -> str:
    """Say what the least possible costs are."""
    least = {budget.name: least_cost(levels, budget, time_limit=time_limit) for budget in budgets}
    missed = [
        f"{budget.name}: at most {budget.limit:.6g} was asked for, and the least possible is {least[budget.name]:.6g}"
        for budget in budgets
        if least[budget.name] > budget.limit
    ]
    if missed:
        return f"{'; '.join(missed)}, with the {len(levels)} groups that may shrink. Ask for less, or loosen a limit."
    asked = " and ".join(f"{budget.name} of at most {budget.limit:.6g}" for budget in budgets)
    return f"{asked} cannot be met together, though each can alone. Loosen one of them."
