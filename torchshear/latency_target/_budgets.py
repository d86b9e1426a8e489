"""Budgets of a solver from polynomials in widths: of time by a table, of operations, parameters and bytes."""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from torchshear.configs import ResolvedConfig
from torchshear.configs._beside_options import pool_budgets
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.dependency.groups._width_form import WidthForm
from torchshear.dependency.plans._cut import dense_cost
from torchshear.pruners.allocation._problem import CostBudget, CostTerm, Levels
from torchshear.pruners.allocation._solve import Solution, allocate
from torchshear.pruners.selection._budget import Budget
from torchshear.pruners.selection._request import Request
from torchshear.speedup.latency import LatencyTable
from torchshear.speedup.latency._table import share_at

ShareAt = Callable[[int, int], float]  # number of a group and its width -> the share that enters the polynomial


def budget_of(
    name: str, limit: float, form: WidthForm, groups: ChannelGroups, levels: Sequence[Levels], share: ShareAt
) -> CostBudget:
    """Write a polynomial in shares as tables over the levels of groups.

    Args:
        name: what is bounded, with its unit.
        limit: the most that it may be.
        form: the polynomial.
        groups: the analysed network; those without levels are dense.
        levels: the widths that groups may have.
        share: the share of a group at a width.
    """
    numbers = {group.name: number for number, group in enumerate(groups)}
    choices = {numbers[one.name]: one for one in levels}
    at = {
        number: np.array([share(number, width) for width in (choices[number].widths if number in choices else dense)])
        for number, dense in enumerate((group.width,) for group in groups)
    }
    constant, terms = 0.0, []
    for factors, value in form.terms.items():
        free = sorted({number for number in factors if number in choices})
        fixed = [at[number][0] for number in factors if number not in choices]
        powers = [at[number] ** factors.count(number) for number in free]
        scaled = value * float(np.prod(fixed))
        if not free:
            constant += scaled
            continue
        table = reduce(np.multiply.outer, powers) * scaled
        terms.append(CostTerm(tuple(choices[number].name for number in free), table))
    return CostBudget(name, limit, tuple(terms), constant)


def latency_budget(groups: ChannelGroups, levels: list[Levels], table: LatencyTable, budget_share: float) -> CostBudget:
    """Return the budget of a share of the dense model's time by a table."""

    def share(number: int, width: int) -> float:
        return share_at(table, table.groups[number], width)

    return budget_of("latency_ms", budget_share * table.dense_ms, table.form, groups, levels, share)


def other_budgets(groups: ChannelGroups, levels: list[Levels], request: Request) -> list[CostBudget]:
    """Return budgets of operations, parameters and bytes, where the request has them."""
    if not request.has_budget:
        return []

    def share(number: int, width: int) -> float:
        return float(width / groups[number].width)

    limits, forms = Budget.of(dense_cost(groups.graph), request).limits, WidthCost(groups).forms()
    return [budget_of(name, limit, forms[name], groups, levels, share) for name, limit in limits.items()]


def solve_widths(
    groups: ChannelGroups,
    table: LatencyTable,
    levels: list[Levels],
    request: Request,
    budget_share: float,
    resolved: ResolvedConfig | None = None,
) -> Solution:
    """Choose widths within a share of the dense model's time, and within the other budgets of a request or a config."""
    budgets = [latency_budget(groups, levels, table, budget_share)]
    pools = [] if resolved is None else pool_budgets(resolved, groups, levels)
    return allocate(levels, [*budgets, *other_budgets(groups, levels, request), *pools])
