"""The allocation against all choices, one after another."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchshear.errors import ArgumentError, PlanError
from torchshear.pruners.allocation._problem import CostBudget, CostTerm, Levels
from torchshear.pruners.allocation._solve import allocate, least_cost

Problem = tuple[list[Levels], list[CostBudget]]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to four groups of up to four levels, terms over one to three of them, and one to three budgets."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = [int(rng.integers(1, 5)) for _ in range(rng.integers(1, 5))]
    levels = []
    for number, count in enumerate(counts):
        widths = np.sort(rng.choice(np.arange(1, 65), count, replace=False))
        losses = np.sort(rng.exponential(1.0, count))[::-1] if rng.random() < 0.8 else rng.normal(0, 1, count)
        levels.append(Levels(f"g{number}", tuple(widths.tolist()), tuple(losses.tolist())))
    budgets = []
    for number in range(rng.integers(1, 4)):
        terms = []
        for _ in range(rng.integers(1, 6)):
            groups = rng.permutation(len(counts))[: rng.integers(1, min(3, len(counts)) + 1)]
            table = rng.exponential(1.0, [counts[g] for g in groups]) * 10.0 ** rng.integers(-2, 3)
            terms.append(CostTerm(tuple(f"g{g}" for g in groups), table))
        budget = CostBudget(f"budget {number}", 1.0, tuple(terms), float(rng.exponential(0.1)))
        costs = [naive_cost(levels, budget, choice) for choice in choices(levels)]
        share = rng.uniform(-0.1, 1.1)
        limit = min(costs) + share * (max(costs) - min(costs))
        budgets.append(CostBudget(budget.name, limit, budget.terms, budget.constant))
    return levels, budgets


def choices(levels: list[Levels]) -> list[tuple[int, ...]]:
    return list(product(*(range(len(one.widths)) for one in levels)))


def naive_cost(levels: list[Levels], budget: CostBudget, choice: tuple[int, ...]) -> float:
    """Sum of the cells of all terms, looked up one by one."""
    at = {one.name: level for one, level in zip(levels, choice, strict=True)}
    total = budget.constant
    for term in budget.terms:
        cell = term.table
        for name in term.groups:
            cell = cell[at[name]]
        total += float(cell)
    return total


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_it_finds_what_trying_all_choices_finds(problem: Problem) -> None:
    levels, budgets = problem
    costs = [[naive_cost(levels, budget, choice) for budget in budgets] for choice in choices(levels)]
    losses = [sum(one.losses[level] for one, level in zip(levels, choice, strict=True)) for choice in choices(levels)]
    limits = [budget.limit for budget in budgets]
    fits = [
        all(c <= limit * (1 + 1e-9 * np.sign(limit)) for c, limit in zip(row, limits, strict=True)) for row in costs
    ]
    for number, budget in enumerate(budgets):
        assert least_cost(levels, budget) == pytest.approx(min(row[number] for row in costs), rel=1e-6, abs=1e-9)
    if not any(fits):
        with pytest.raises(PlanError, match="the least possible is|cannot be met together"):
            allocate(levels, budgets, gap=0.0)
        return
    best = min(loss for loss, is_allowed in zip(losses, fits, strict=True) if is_allowed)
    found = allocate(levels, budgets, gap=0.0)
    chosen = tuple(one.widths.index(found.widths[one.name]) for one in levels)
    place = choices(levels).index(chosen)
    assert fits[place]
    assert found.loss == pytest.approx(losses[place])
    assert found.loss == pytest.approx(best, rel=1e-5, abs=1e-6)
    assert found.bound <= found.loss + 1e-9
    assert found.bound == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert [found.costs[budget.name] for budget in budgets] == pytest.approx(costs[place])


def chain(n_groups: int, n_levels: int, share: float) -> Problem:
    """Layers one behind another, each as costly as the product of the widths around it."""
    rng = np.random.default_rng(0)
    widths = np.arange(1, n_levels + 1) * 16
    levels = [
        Levels(f"g{n}", tuple(widths.tolist()), tuple((rng.uniform(0.5, 2) * (1 / widths - 1 / widths[-1])).tolist()))
        for n in range(n_groups)
    ]
    table = np.multiply.outer(widths, widths).astype(float)
    terms = tuple(CostTerm((f"g{n}", f"g{n + 1}"), table * rng.uniform(0.5, 2)) for n in range(n_groups - 1))
    dense = sum(float(term.table[-1, -1]) for term in terms)
    return levels, [CostBudget("macs", share * dense, terms)]


def test_a_deep_network_is_solved_in_seconds_within_its_gap() -> None:
    levels, budgets = chain(40, 16, 0.4)
    found = allocate(levels, budgets, gap=0.005)
    assert found.costs["macs"] <= budgets[0].limit * (1 + 1e-9)
    assert found.gap <= 0.005 + 1e-9
    assert found.loss > 0
    assert found.seconds < 30


def test_a_budget_that_nothing_meets_says_the_least_there_is() -> None:
    levels, budgets = chain(3, 4, 0.01)
    least = sum(float(term.table[0, 0]) for term in budgets[0].terms)
    with pytest.raises(PlanError, match=rf"macs: at most .* and the least possible is {least:.6g}"):
        allocate(levels, budgets)


def test_budgets_that_contradict_each_other_are_named() -> None:
    levels = [Levels("a", (1, 2), (1.0, 0.0))]
    falling, rising = CostTerm(("a",), np.array([2.0, 1.0])), CostTerm(("a",), np.array([1.0, 2.0]))
    with pytest.raises(PlanError, match="one of at most 1.5 and two of at most 1.5 cannot be met together"):
        allocate(levels, [CostBudget("one", 1.5, (falling,)), CostBudget("two", 1.5, (rising,))])


def test_terms_over_the_same_groups_add_up_whatever_their_order() -> None:
    levels = [Levels("a", (1, 2), (1.0, 0.0)), Levels("b", (1, 2, 3), (2.0, 1.0, 0.0))]
    table = np.arange(6.0).reshape(2, 3)
    both = CostBudget("ms", 11.0, (CostTerm(("a", "b"), table), CostTerm(("b", "a"), table.T)))
    found = allocate(levels, [both])
    assert dict(found.widths) == {"a": 2, "b": 3}
    assert found.costs["ms"] == 10.0
    assert found.gap == 0.0


@pytest.mark.parametrize(
    ("levels", "budget", "match"),
    [
        ([Levels("a", (1,), (0.0,))] * 2, CostBudget("ms", 1.0, ()), "two groups have the same name"),
        ([Levels("a", (1,), (0.0,))], CostBudget("ms", np.inf, ()), "limit inf; expected a finite number"),
        (
            [Levels("a", (1,), (0.0,))],
            CostBudget("ms", 1.0, (CostTerm(("b",), np.zeros(1)),)),
            "a term of 'ms' has a table of shape",
        ),
        (
            [Levels("a", (1,), (0.0,))],
            CostBudget("ms", 1.0, (CostTerm(("a",), np.full(1, np.nan)),)),
            "expected finite costs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(levels: list[Levels], budget: CostBudget, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        allocate(levels, [budget])


@pytest.mark.parametrize(
    ("widths", "losses"), [((), ()), ((1, 1), (0.0, 0.0)), ((1, 2), (0.0,)), ((1, 2), (0.0, float("inf")))]
)
def test_levels_are_different_widths_with_finite_losses(widths: tuple[int, ...], losses: tuple[float, ...]) -> None:
    with pytest.raises(ArgumentError, match="expected different widths"):
        Levels("a", widths, losses)
