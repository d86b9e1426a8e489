"""Budgets of a solver from polynomials in widths."""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._width_form import WidthForm
from torchshear.pruners.allocation._problem import CostBudget, CostTerm, Levels

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
