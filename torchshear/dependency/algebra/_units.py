"""Units and the relations between them: equal units, products of others, units that cannot be cut.

A *unit* is the smallest thing that can be cut. A *row* is a set of units, written as the row of an integer matrix; the
position that it describes is kept if and only if all of its units are kept. Three relations hold between units:

- two units are the same (union-find);
- a unit is *composite*: the position it stands for is kept if and only if all units of another row are;
- a unit is *fixed*: it cannot be cut, for a reason that is kept.

Everything works on whole arrays; there is no loop over positions.
"""

from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
_Small = npt.NDArray[np.int32]  # what is kept for each unit beside its class: there are millions of units
Reason = Hashable  # why something is fixed; `str` of it is what people read
PAD = 0  # fills the shorter rows of a matrix; as a fixed unit it restricts nothing


class UnitStore:
    """All units of a network. Grows during analysis and is only read afterwards."""

    def __init__(self) -> None:
        self._size = 1
        self._parent: Ids = np.zeros(1024, np.int64)
        self._composite: _Small = np.full(1024, -1, np.int32)  # row of _sets, or -1 for an atom
        self._reason: _Small = np.full(1024, -1, np.int32)  # index into reasons, or -1 for a unit that can be cut
        self._family: _Small = np.zeros(1024, np.int32)
        self._family_parent: list[int] = [0]
        self._sets: Ids = np.zeros((256, 2), np.int64)
        self._n_sets = 0
        self._reasons: list[Reason] = [""]
        self._reason_units: dict[Reason, int] = {"": PAD}
        self._reason[PAD] = 0

    def __len__(self) -> int:
        return self._size

    def copy(self) -> "UnitStore":
        """Return a copy, to which more can be added."""
        twin = UnitStore()
        for name, value in vars(self).items():
            setattr(twin, name, value.copy() if isinstance(value, np.ndarray | list | dict) else value)
        return twin

    def fresh(self, count: int) -> Ids:
        """Make `count` new units, of a family of their own. Shape of the result: (count,)."""
        start, stop = self._size, self._size + count
        capacity = len(self._parent)
        if stop > capacity:  # room for twice as many, so that making units one by one takes linear time
            for name, fill in (("_parent", 0), ("_composite", -1), ("_reason", -1), ("_family", 0)):
                known = getattr(self, name)
                grown = np.full(max(stop, 2 * capacity), fill, known.dtype)
                grown[:capacity] = known
                setattr(self, name, grown)
        ids = np.arange(start, stop)
        self._parent[start:stop] = ids
        self._family[start:stop] = len(self._family_parent)
        self._family_parent.append(len(self._family_parent))
        self._size = stop
        return ids

    def fixed_unit(self, reason: Reason) -> int:
        """Return the unit that stands for everything that is fixed for a reason; there is one for each reason."""
        known = self._reason_units.get(reason)
        if known is None:
            known = int(self.fresh(1)[0])
            self._reason_units[reason] = known
            self._reasons.append(reason)
            self._reason[known] = len(self._reasons) - 1
        return known

    def find(self, ids: Ids) -> Ids:
        """Return the representatives of the classes of `ids`; any shape."""
        roots = self._parent[ids]
        above = self._parent[roots]
        if (above == roots).all():
            return roots
        while not (above == roots).all():
            roots, above = above, self._parent[above]
        self._parent[ids] = roots
        return roots

    def is_fixed(self, roots: Ids) -> npt.NDArray[np.bool_]:
        """Return a mask of the units that are fixed; they are given by representative."""
        return self._reason[roots] >= 0

    def reason(self, unit: int) -> str | None:
        """Return the reason why a unit cannot be cut, or None if it can."""
        index = int(self._reason[self.find(np.array([unit]))[0]])
        return None if index < 0 else str(self._reasons[index])

    def resolve(self, rows: Ids) -> Ids:
        """Write rows in atoms: representatives of units that are neither composite nor fixed, PAD elsewhere.

        Args:
            rows: matrix (positions, k) of units.

        Returns:
            Matrix (positions, k'), no unit twice in a row, no column of PAD alone; k' may be 0.
        """
        rows = self.find(rows)
        while True:
            sets = self._composite[rows]
            if not (sets >= 0).any():
                break
            rows = self._expand(rows, sets)
        rows = _drop_empty_columns(np.where(self._reason[rows] >= 0, PAD, rows))
        for j in range(1, rows.shape[1]):  # blank the second mention of a unit in a row
            for i in range(j):
                rows[:, j] = np.where(rows[:, i] == rows[:, j], PAD, rows[:, j])
        return _drop_empty_columns(rows) if rows.shape[1] > 1 else rows

    def _expand(self, rows: Ids, sets: _Small) -> Ids:
        parts = np.zeros((*rows.shape, self._sets.shape[1]), np.int64)
        parts[:, :, 0] = rows
        inside = sets >= 0
        parts[inside] = self._sets[sets[inside]]
        return _drop_empty_columns(self.find(parts.reshape(len(rows), -1)))

    def families(self, roots: Ids) -> Ids:
        """Return the family of each unit; units that were made together, or tied to such, are of one family."""
        found, inverse = np.unique(self._family[roots], return_inverse=True)
        return np.array([self._find_family(int(family)) for family in found], np.int64)[inverse]

    def _find_family(self, family: int) -> int:
        while self._family_parent[family] != family:
            family = self._family_parent[family]
        return family

    def fix(self, rows: Ids, reason: Reason) -> None:
        """Fix every unit of the rows, and with a composite one all that it is made of."""
        atoms = self.resolve(rows)
        atoms = atoms[atoms != PAD]
        if atoms.size:
            self._reason[atoms] = self._reason[self.fixed_unit(reason)]

    def first_reason(self, rows: Ids) -> Reason | None:
        """Return the reason of the first fixed unit in the rows, also inside composite ones; None if there is none."""
        rows = self.find(rows)
        while True:
            reasons = self._reason[rows]
            known = reasons[reasons > 0]
            if known.size:
                return self._reasons[int(known[0])]
            sets = self._composite[rows]
            if not (sets >= 0).any():
                return None
            rows = self._expand(rows, sets)

    def union(self, left: Ids, right: Ids) -> None:
        """Make atoms equal, pair by pair. Both: (n,), representatives of atoms."""
        of_left, of_right, n_families = self._family[left], self._family[right], len(self._family_parent)
        apart = of_left != of_right
        for code in np.unique(of_left[apart].astype(np.int64) * n_families + of_right[apart]):  # each pair once
            one, other = (self._find_family(int(family)) for family in divmod(code, n_families))
            self._family_parent[max(one, other)] = min(one, other)
        while True:
            differ = left != right
            if not differ.any():
                return
            left, right = left[differ], right[differ]
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))
            left, right = self.find(left), self.find(right)

    def equate(self, left: Ids, right: Ids, reason: Reason) -> None:
        """Demand that position i of `left` is kept exactly when position i of `right` is.

        Single units become one. A single unit against a set becomes composite. Two sets are matched column by column
        where the columns repeat in the same pattern. What matches in no way is fixed for `reason`.

        Args:
            left: matrix (n, k) of units.
            right: matrix (n, k') of units.
            reason: why both sides belong together, kept with what becomes fixed by it.
        """
        if left is right or self._union_if_plain(left, right):
            return
        while True:
            a, b = self.resolve(left), self.resolve(right)
            differ = ~_same_rows(a, b)
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            left, right = left[differ], right[differ]
            n_a, n_b = (a != PAD).sum(1), (b != PAD).sum(1)
            if (n_a == 0).any() or (n_b == 0).any():
                # The partner of a fixed row is fixed, for the same reason if there is one.
                for source, rows, is_fixed in ((left, b, n_a == 0), (right, a, n_b == 0)):
                    self.fix(rows[is_fixed], self.first_reason(source[is_fixed]) or reason)
                continue
            single = (n_a == 1) & (n_b == 1)
            if single.any():
                self.union(a[single].max(1), b[single].max(1))
            elif (n_a == 1).any():
                self._compose(a, b, n_a == 1, reason)
            elif (n_b == 1).any():
                self._compose(b, a, n_b == 1, reason)
            else:
                self._match_columns(a, b, reason)

    def _union_if_plain(self, left: Ids, right: Ids) -> bool:
        """Relate two columns of single units, the usual case, at once; return False in any other case."""
        if left.shape[1] != 1 or right.shape[1] != 1:
            return False
        a, b = self.find(left[:, 0]), self.find(right[:, 0])
        is_fixed = self._reason[a] >= 0
        is_other_fixed = self._reason[b] >= 0
        open_pairs = (a != b) & ~(is_fixed & is_other_fixed)
        if not open_pairs.any():
            return True
        a, b = a[open_pairs], b[open_pairs]
        if (is_fixed | is_other_fixed)[open_pairs].any() or (self._composite[np.concatenate([a, b])] >= 0).any():
            return False
        self.union(a, b)
        return True

    def _compose(self, single: Ids, sets: Ids, where: npt.NDArray[np.bool_], reason: Reason) -> None:
        """Replace atoms by sets of atoms, the first set of each; the caller comes back for the others."""
        atoms, first = np.unique(single[where].max(1), return_index=True)
        rows = sets[where][first]
        inside = (rows == atoms[:, None]).any(1)
        if inside.any():
            self._absorb(atoms[inside], rows[inside], reason)
        atoms, rows = atoms[~inside], rows[~inside]
        # Substituting several atoms at once is safe only while none of them stands in a set of this very batch.
        safe = ~np.isin(atoms, rows)
        if not safe.any():
            safe[:1] = True
        self._substitute(atoms[safe], rows[safe])

    def _absorb(self, atoms: Ids, rows: Ids, reason: Reason) -> None:
        """Make y and x one where x is to be kept exactly if x and y are: y is then cut no more often than x.

        Unless y stands with several x, which would all become one; then y is fixed. Such are the copies of a repeated
        axis where the axis itself is meant.
        """
        others = np.where(rows == atoms[:, None], PAD, rows)
        known, counts = np.unique(others[others != PAD], return_counts=True)
        shared = known[counts > 1]
        self.fix(shared[:, None], reason)
        for atom, row in zip(atoms, np.where(np.isin(others, shared), PAD, others), strict=True):
            self.union(np.full(len(row), atom), np.where(row == PAD, atom, row))

    def _substitute(self, atoms: Ids, rows: Ids) -> None:
        start, stop = self._n_sets, self._n_sets + len(atoms)
        width = max(rows.shape[1], self._sets.shape[1])
        if stop > len(self._sets) or width > self._sets.shape[1]:
            grown = np.zeros((max(stop, 2 * len(self._sets)), width), np.int64)
            grown[: len(self._sets), : self._sets.shape[1]] = self._sets
            self._sets = grown
        self._sets[start:stop, : rows.shape[1]] = rows
        self._composite[atoms] = np.arange(start, stop)
        self._n_sets = stop

    def _match_columns(self, a: Ids, b: Ids, reason: Reason) -> None:
        """Relate rows of two or more units each, for the largest run of rows with the same columns in use."""
        used = np.concatenate([a != PAD, b != PAD], 1)
        _, inverse = np.unique(used, axis=0, return_inverse=True)
        rows = inverse.reshape(-1) == inverse.reshape(-1)[0]
        a, b = a[rows][:, (a[rows] != PAD).any(0)], b[rows][:, (b[rows] != PAD).any(0)]
        labels_a = [_pattern(a[:, j]) for j in range(a.shape[1])]
        labels_b = [_pattern(b[:, j]) for j in range(b.shape[1])]
        matched = False
        free_a, free_b = [], list(range(b.shape[1]))
        for i, label in enumerate(labels_a):
            twin = next((j for j in free_b if np.array_equal(labels_b[j], label)), None)
            if twin is None:
                free_a.append(i)
                continue
            free_b.remove(twin)
            if not np.array_equal(a[:, i], b[:, twin]):
                self.union(a[:, i], b[:, twin])
                matched = True
        if matched or self._refine(a, b, labels_a, labels_b, reason) or self._refine(b, a, labels_b, labels_a, reason):
            return
        self.fix(np.concatenate([a[:, free_a], b[:, free_b]], 1), reason)  # the other columns are both sides' own

    def _refine(self, a: Ids, b: Ids, labels_a: list[Ids], labels_b: list[Ids], reason: Reason) -> bool:
        """Make a column of `a` composite of several of `b` that vary together as it does; return False if none does."""
        for i, label in enumerate(labels_a):
            if any(np.array_equal(label, other) for other in labels_b):
                continue
            inside = [j for j, other in enumerate(labels_b) if _determines(label, other)]
            if len(inside) > 1 and np.array_equal(_pattern_of_rows(b[:, inside]), label):
                _, first = np.unique(label, return_index=True)
                self._compose(a[first][:, [i]], b[first][:, inside], np.ones(len(first), bool), reason)
                return True
        return False


def _drop_empty_columns(rows: Ids) -> Ids:
    used = (rows != PAD).any(0)
    return rows if used.all() else rows[:, used]


def _same_rows(a: Ids, b: Ids) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows that hold the same units in any order. Both: (n, any)."""
    if a.shape == b.shape and a.shape[1] == 1:
        return np.asarray(a[:, 0] == b[:, 0])
    width = max(a.shape[1], b.shape[1])
    padded = [np.sort(pad_columns(x, width), 1) for x in (a, b)]
    return np.asarray((padded[0] == padded[1]).all(1))


def pad_columns(rows: Ids, width: int) -> Ids:
    """Return rows with PAD columns added up to `width`."""
    if rows.shape[1] == width:
        return rows
    wide = np.zeros((len(rows), width), np.int64)
    wide[:, : rows.shape[1]] = rows
    return wide


def _pattern(column: Ids) -> Ids:
    """Number the values of a column by first appearance, so that equal patterns of repetition are equal arrays."""
    _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse]


def _pattern_of_rows(rows: Ids) -> Ids:
    _, inverse = np.unique(rows, axis=0, return_inverse=True)
    return _pattern(inverse.reshape(-1))


def _determines(fine: Ids, coarse: Ids) -> bool:
    """Return True if equal values of `fine` imply equal values of `coarse`."""
    _, first = np.unique(fine, return_index=True)
    return bool(np.array_equal(coarse[first][fine], coarse))
