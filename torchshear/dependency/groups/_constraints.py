"""Constraints of groups: blocks that must lose equally many positions, and the number of units that must stay.

Balances are settled before groups are formed.
"""

from collections.abc import Iterable, Mapping
from math import comb, prod

import numpy as np

from torchshear.dependency.algebra._axis import Algebra, Axis
from torchshear.dependency.algebra._units import PAD, Ids
from torchshear.dependency.rules._findings import Balance, Facts, FixReason

Factor = tuple[int, int]  # number of a group, and how many of its units


def settle_balances(algebra: Algebra, facts: Facts) -> None:
    """Make every balanced axis one of two simple kinds.

    Either all of its positions are single units, each standing there once: then its group carries block labels and
    a selection keeps the balance. Or its blocks repeat the same units: then the balance holds by itself. What is in
    between is tied block by block, which is sound though stricter than needed; a unit that would empty a whole block
    is fixed. Tying may change other axes, so this is repeated until nothing changes.
    """
    changed = True
    while changed:
        changed = False
        for balance in facts.balances:
            changed |= _settle(algebra, balance)


def _settle(algebra: Algebra, balance: Balance) -> bool:
    store, n_blocks = algebra.store, balance.n_blocks
    rows = store.resolve(balance.axis.units)
    if rows.shape[1] == 0:
        return False
    if blocks_repeat(rows, n_blocks):
        return False
    grid = rows.reshape(n_blocks, len(rows) // n_blocks, -1)
    periodic = (grid == grid[:1]).all((0, 1))
    whole = (grid == grid[:, :1]).all((0, 1)) & ~periodic
    if whole.any():
        store.fix(rows[:, whole], FixReason("a whole block would go", balance.node))
        return True
    if not is_plain(rows):
        tie_blocks(algebra, balance)
    elif (grid != PAD).any((1, 2)).all():
        return False
    else:  # one block can lose nothing, so none can
        store.fix(rows, FixReason("another block of it cannot be cut", balance.node))
    return True


def blocks_repeat(rows: Ids, n_blocks: int) -> bool:
    """Return True if every block holds the same units in the same order, so that all lose equally many."""
    grid = np.sort(rows, 1).reshape(n_blocks, len(rows) // n_blocks, -1)
    return bool((grid == grid[:1]).all())


def is_plain(rows: Ids) -> bool:
    """Return True if each position is a single unit of its own, or fixed."""
    if rows.shape[1] != 1:
        return False
    units = rows[rows != PAD]
    return len(np.unique(units)) == len(units)


def tie_blocks(algebra: Algebra, balance: Balance) -> None:
    """Tie the blocks of an axis, so that all lose the same positions."""
    rows = algebra.store.resolve(balance.axis.units)
    grid = rows.reshape(balance.n_blocks, len(rows) // balance.n_blocks, -1)
    for block in range(1, balance.n_blocks):
        algebra.store.equate(grid[0], grid[block], FixReason("blocks lose equally many", balance.node))


def refine_labels(known: Ids, labels: Ids) -> Ids:
    """Return blocks so fine that equal cuts in each are equal cuts in each block of two partitions.

    The common refinement may have parts of several sizes; each is cut into runs of their greatest common divisor.

    Args:
        known: (width,) block label of each unit.
        labels: (width,) block label of each unit in another partition.
    """
    _, parts, sizes = np.unique(np.stack([known, labels]), axis=1, return_inverse=True, return_counts=True)
    parts = parts.reshape(-1)
    run = int(np.gcd.reduce(sizes))
    order = np.argsort(parts, kind="stable")
    rank = np.empty(len(parts), np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank[order] = np.arange(len(parts)) - starts[parts[order]]
    _, refined = np.unique(np.stack([parts, rank // run]), axis=1, return_inverse=True)
    return np.asarray(refined.reshape(-1), np.int64)


def fix_unclear_minimums(algebra: Algebra, facts: Facts, group_of: Ids) -> bool:
    """Fix axes with a minimum that selection inside single groups cannot keep; return True if there were any."""
    done = False
    for minimum in facts.minimums:
        rows = algebra.store.resolve(minimum.axis.units)
        if rows.shape[1] and not _factors(rows, group_of):
            algebra.fix([minimum.axis], FixReason(f"at least {minimum.count} positions of it must stay", minimum.node))
            done = True
    return done


def minimum_units(algebra: Algebra, facts: Facts, group_of: Ids) -> dict[int, int]:
    """Count the units that must stay in each of a group's dimensions of equal width, where they are more than one.

    Of an axis that is a product, as experts in groups of experts are, the innermost factor keeps so many that the
    others may go down to what they must keep anyway.
    """
    min_units: dict[int, int] = {}
    products: list[tuple[list[Factor], int]] = []
    for minimum in facts.minimums:
        rows = algebra.store.resolve(minimum.axis.units)
        factors = _factors(rows, group_of) if rows.shape[1] else []
        if len(factors) == 1:
            group = factors[0][0]
            min_units[group] = max(min_units.get(group, 1), minimum.count - int((rows == PAD).sum()))
        elif factors:
            products.append((factors, minimum.count))
    for factors, count in products:
        for group, width in reversed(factors):
            others = prod(min_units.get(other, 1) for other, _ in factors if other != group)
            min_units[group] = max(min_units.get(group, 1), min(width, -(-count // others)))
    return min_units


def keep_crossings(
    algebra: Algebra, axes: Iterable[Axis], group_of: Ids, min_units: dict[int, int], joint: Mapping[int, int]
) -> None:
    """Raise minimums so that something is left of axes whose positions go with a unit of any of several groups.

    Of an axis that is a product of whole groups something is left if something is left of each. Where groups cross in
    another way, as channels and the blocks that they are shuffled in, each may take a share of the positions only.
    Where positions are pairs of units of one group, so many stay that two of them are a pair.

    Args:
        algebra: the units.
        axes: axes of parameters and buffers.
        group_of: number of the group of each unit, -1 for none.
        min_units: number of a group -> units that must stay in each of its dimensions; raised in place.
        joint: number of a group -> number of dimensions that its units are shared out among, where that is not one.
    """
    widths = np.bincount(group_of[group_of >= 0])
    for units in {id(axis.units): axis.units for axis in axes}.values():
        rows = algebra.store.resolve(units)
        if rows.shape[1] < 2 or is_plain(rows):
            continue
        groups = np.where(rows == PAD, -1, group_of[rows])
        if (groups.max(1) < 0).any() or _holds_product(rows, groups, group_of, widths):
            continue
        known = (int(group) for group in np.unique(groups) if group >= 0)
        share = {group: int(np.unique(rows[groups == group], return_counts=True)[1].max()) for group in known}
        crossing = sorted(share, key=lambda group: -share[group])  # those whose units take most positions first
        left = len(rows) - 1  # positions that may go
        for number, group in enumerate(crossing):
            others = sum(share[other] for other in crossing[number + 1 :])
            fair = left // (len(crossing) - number) // share[group]
            cut = max(fair, int(share[group] + others <= left), _cut_beside_pairs(rows, int(widths[group]), len(share)))
            peers = joint.get(group, 1)
            cut = min(cut, int(widths[group]) - peers * min_units.get(group, 1))
            min_units[group] = -(-(int(widths[group]) - cut) // peers)
            left -= cut * share[group]


def _cut_beside_pairs(rows: Ids, width: int, n_groups: int) -> int:
    """Count the units of a group, any of them, that may go and leave a pair of the others; 0 if that is unclear.

    Of k units that stay, at most as many pairs are missing as are missing of all.
    """
    if n_groups > 1 or rows.shape[1] > 2:
        return 0
    n_pairs = len(np.unique(np.sort(rows[(rows != PAD).all(1)], 1), axis=0))
    return width - next((k for k in range(width) if comb(k, 2) > comb(width, 2) - n_pairs), width)


def _holds_product(rows: Ids, groups: Ids, group_of: Ids, widths: Ids) -> bool:
    """Return True if some positions are a product of whole groups, or all units of one, once or more often."""
    kinds, kind_of = np.unique(np.sort(groups, 1), axis=0, return_inverse=True)
    for kind in range(len(kinds)):
        here = kind_of.reshape(-1) == kind
        factors = _factors(_by_group(rows[here], groups[here]), group_of)
        if factors and all(width == widths[group] for group, width in factors):
            return True
    return False


def _by_group(rows: Ids, groups: Ids) -> Ids:
    """Return the different rows, each in the order of its groups, without columns of PAD."""
    ordered = np.unique(np.take_along_axis(rows, np.argsort(groups, 1, kind="stable"), 1), axis=0)
    return ordered[:, (ordered != PAD).any(0)]


def _factors(rows: Ids, group_of: Ids) -> list[Factor]:
    """Return the groups of which an axis is the product, outermost first; [] if it is no product of whole groups."""
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
