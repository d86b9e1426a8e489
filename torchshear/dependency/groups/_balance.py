"""Balanced axes: each block must lose equally many positions. Settled before groups are formed."""

import numpy as np

from torchshear.dependency.algebra._axis import Algebra
from torchshear.dependency.algebra._units import PAD, Ids
from torchshear.dependency.rules._findings import Balance, Facts, FixReason


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
