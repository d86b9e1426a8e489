"""Minimums: how many units of each group must stay, so that enough positions of an axis do."""

from math import prod

import numpy as np

from torchshear.dependency._axis import Algebra
from torchshear.dependency._balance import is_plain
from torchshear.dependency._call import Because, Facts
from torchshear.dependency._units import PAD, Ids

Factor = tuple[int, int]  # number of a group, and how many of its units


def fix_unclear_minimums(algebra: Algebra, facts: Facts, group_of: Ids) -> bool:
    """Fix axes with a minimum that selection inside single groups cannot keep; gives whether there were any."""
    done = False
    for minimum in facts.minimums:
        rows = algebra.store.resolve(minimum.axis.units)
        if rows.shape[1] and not _factors(rows, group_of):
            algebra.fix([minimum.axis], Because(f"at least {minimum.count} positions of it must stay", minimum.node))
            done = True
    return done


def least_units(algebra: Algebra, facts: Facts, group_of: Ids) -> dict[int, int]:
    """Units that must stay in each of a group's dimensions of equal width, where that is more than one.

    Of an axis that is a product, as experts in groups of experts are, the innermost factor keeps so many that the
    others may go down to what they must keep anyway.
    """
    least: dict[int, int] = {}
    products: list[tuple[list[Factor], int]] = []
    for minimum in facts.minimums:
        rows = algebra.store.resolve(minimum.axis.units)
        factors = _factors(rows, group_of) if rows.shape[1] else []
        if len(factors) == 1:
            group = factors[0][0]
            least[group] = max(least.get(group, 1), minimum.count - int((rows == PAD).sum()))
        elif factors:
            products.append((factors, minimum.count))
    for factors, count in products:
        for group, width in reversed(factors):
            others = prod(least.get(other, 1) for other, _ in factors if other != group)
            least[group] = max(least.get(group, 1), min(width, -(-count // others)))
    return least


def _factors(rows: Ids, group_of: Ids) -> list[Factor]:
    """The groups of which an axis is the product, outermost first; none if it is not a product of whole groups."""
    if is_plain(rows):
        groups = np.unique(group_of[rows[rows != PAD]])
        return [(int(groups[0]), len(rows))] if len(groups) == 1 and groups[0] >= 0 else []
    found: list[Factor] = []
    for column in np.argsort((rows[1:] != rows[:-1]).sum(0), kind="stable"):
        atoms = np.unique(rows[:, column])
        groups = np.unique(group_of[atoms])
        if PAD in atoms or len(groups) > 1 or groups[0] < 0:
            return []
        found.append((int(groups[0]), len(atoms)))
    is_product = prod(width for _, width in found) == len(rows) == len(np.unique(rows, axis=0))
    return found if is_product and len({group for group, _ in found}) == len(found) else []
