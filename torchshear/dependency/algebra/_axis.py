"""Axes: a dimension of a value as a row of positions, each with the set of units that it depends on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from torchshear.dependency.algebra._units import Ids, Reason, UnitStore, pad_columns


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """One dimension of one tensor value.

    Attributes:
        units: matrix (positions, k); a position is kept if and only if all units of its row are.
        rows: where the dimension has other positions in each row of dimension 0 of its value, equally many in each (the
            final states of several recurrent layers): the axis of each row, the first of which `units` repeats.
    """

    units: Ids
    rows: tuple["Axis", ...] = ()

    @property
    def size(self) -> int:
        """Number of positions."""
        return len(self.units)


Axes = tuple[Axis, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Algebra:
    """The operations on axes: join, cut, repeat, tie, split into factors and merge again.

    Attributes:
        store: the units, to which operations add.
    """

    store: UnitStore = field(default_factory=UnitStore)

    def copy(self) -> "Algebra":
        """Return a copy of all relations, to which more can be added."""
        return Algebra(self.store.copy())

    def fresh(self, size: int, reason: Reason = "a dimension of size 1 cannot shrink") -> Axis:
        """Return an axis of new units; one of a single position is fixed, since nothing would be left."""
        if size <= 1:
            return self.fixed_axis(size, reason)
        return Axis(self.store.fresh(size)[:, None])

    def virtual(self, size: int) -> Axis:
        """Return an axis of new units that stand in no weight, even for a single position: constants or copies."""
        return Axis(self.store.fresh(size)[:, None])

    def fixed_axis(self, size: int, reason: Reason) -> Axis:
        """Return an axis of which no position can be cut."""
        return Axis(np.broadcast_to(np.int64(self.store.fixed_unit(reason)), (size, 1)))

    def is_fixed(self, axis: Axis) -> bool:
        """Return True if no position of the axis can be cut."""
        return bool(self.store.resolve(axis.units).shape[1] == 0)

    def fix(self, axes: Sequence[Axis], reason: Reason) -> None:
        """Fix every position of the axes."""
        for axis in axes:
            for row in axis.rows or (axis,):
                self.store.fix(row.units, reason)

    def equate(self, left: Axis, right: Axis, reason: Reason) -> Axis:
        """Tie two axes of one size position by position, and return the first."""
        if left is not right:
            assert left.size == right.size, f"{reason}: {left.size} against {right.size} positions"
            self.store.equate(left.units, right.units, reason)
        return left

    def take(self, axis: Axis, index: Ids | slice) -> Axis:
        """Return the axis of the positions that `index` names, in that order."""
        return Axis(axis.units[index])

    def concat(self, axes: Sequence[Axis]) -> Axis:
        """Return the axis of the positions of all axes, one after another."""
        if len(axes) == 1:
            return axes[0]
        width = max(axis.units.shape[1] for axis in axes)
        return Axis(np.concatenate([pad_columns(axis.units, width) for axis in axes]))

    def any_of(self, axes: Sequence[Axis]) -> Axis:
        """Return one axis for several of one size: its position i goes if position i of any of them does."""
        return Axis(np.concatenate([axis.units for axis in axes], 1))

    def merge(self, axes: Sequence[Axis]) -> Axis:
        """Return the product of axes, the first outermost: its position (i, j) goes if i or j does."""
        total = prod(axis.size for axis in axes)
        columns, before = [], 1
        for axis in axes:
            after = total // max(1, before * axis.size)
            columns.append((axis, np.tile(np.repeat(np.arange(axis.size), after), before)))
            before *= axis.size
        free = [(axis, index) for axis, index in columns if not self.is_fixed(axis)] or columns[:1]
        return Axis(np.concatenate([axis.units[index] for axis, index in free], 1))

    def factor(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Split an axis into factors, outermost first: the inverse of `merge`.

        Units that already are products of such factors are taken apart; other units become products of new ones.

        Args:
            axis: the axis, of prod(sizes) positions.
            sizes: size of each factor.
        """
        factors, rest = [], axis
        for size in sizes[:-1]:
            head, rest = self._factor_two(rest, size, rest.size // size)
            factors.append(head)
        return [*factors, rest]

    def _factor_two(self, axis: Axis, outer: int, inner: int) -> tuple[Axis, Axis]:
        reason = self.store.first_reason(axis.units) or "a factor of a fixed dimension"
        if outer == 1 or inner == 1:
            one = self.fixed_axis(1, "a dimension of size 1 cannot shrink")
            return (one, axis) if outer == 1 else (axis, one)
        rows = self.store.resolve(axis.units)
        if rows.shape[1] == 0:
            return self.fixed_axis(outer, reason), self.fixed_axis(inner, reason)
        grid = rows.reshape(outer, inner, -1)
        constant_inside = (grid == grid[:, :1]).all((0, 1))
        periodic = (grid == grid[:1]).all((0, 1))
        mixed = ~constant_inside & ~periodic
        if not mixed.any():
            return self._columns(grid[:, 0][:, constant_inside], reason), self._columns(
                grid[0][:, periodic & ~constant_inside], reason
            )
        if mixed.sum() > 1:
            return self._alike_blocks(grid)
        head, tail = self.fresh(outer), self.fresh(inner)
        product = self.merge((head, tail)).units
        for column in np.flatnonzero(mixed):
            self.store.equate(rows[:, [column]], product, "split into factors by a reshape")
        return self._factor_two(axis, outer, inner)

    def _alike_blocks(self, grid: Ids) -> tuple[Axis, Axis]:
        """Tie all blocks, where positions depend on several units that repeat irregularly, and return the factors."""
        reason = "blocks of a reshape whose positions are made of several units"
        for block in grid[1:]:
            self.store.equate(grid[0], block, reason)
        return self.fixed_axis(len(grid), reason), Axis(np.ascontiguousarray(grid[0]))

    def _columns(self, units: Ids, reason: Reason) -> Axis:
        return Axis(units) if units.shape[1] else self.fixed_axis(len(units), reason)

    def tile(self, axis: Axis, copies: int) -> tuple[Axis, Axis]:
        """Repeat the whole axis `copies` times, one after another; return the result and the axis of copies."""
        repeats = self.virtual(copies)
        return self.merge((repeats, axis)), repeats
