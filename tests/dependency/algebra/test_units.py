"""The algebra of units against a reading of its definition: a position goes if and only if any of its units is cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchshear.dependency import Algebra, Axis
from torchshear.dependency.algebra._units import PAD, UnitStore


def kept(store: UnitStore, rows: np.ndarray, cut: set[int]) -> np.ndarray:
    """Which rows are kept when the given atoms are cut."""
    resolved = store.resolve(rows)
    return np.array([not any(int(unit) in cut for unit in row if unit != PAD) for row in resolved])


def atoms_of(store: UnitStore, *matrices: np.ndarray) -> list[int]:
    found = [store.resolve(rows) for rows in matrices]
    return sorted({int(unit) for rows in found for unit in rows.reshape(-1) if unit != PAD})


def test_fresh_units_are_all_different() -> None:
    store = UnitStore()
    assert len(set(store.fresh(5)) | set(store.fresh(3))) == 8


def test_union_makes_one_and_is_transitive() -> None:
    store = UnitStore()
    a, b, c = store.fresh(4), store.fresh(4), store.fresh(4)
    store.equate(a[:, None], b[:, None], "first")
    store.equate(b[:, None], c[:, None], "second")
    assert (store.find(a) == store.find(c)).all()
    assert len(set(store.find(a))) == 4


def test_reversed_row_ties_mirror_positions() -> None:
    store = UnitStore()
    a = store.fresh(4)
    store.equate(a[:, None], a[::-1, None], "flip")
    roots = store.find(a)
    assert roots[0] == roots[3]
    assert roots[1] == roots[2]
    assert roots[0] != roots[1]


def test_fixing_passes_on_the_reason() -> None:
    store = UnitStore()
    a, b = store.fresh(2), store.fresh(2)
    store.fix(a[:1, None], "an input")
    store.equate(a[:, None], b[:, None], "tied")
    assert store.reason(int(b[0])) == "an input"
    assert store.reason(int(b[1])) is None


def test_factor_separates_rows_and_columns_of_one_axis() -> None:
    algebra = Algebra()
    axis = algebra.fresh(6)
    heads, inside = algebra.factor(axis, (2, 3))
    cut = {int(algebra.store.resolve(heads.units)[0, 0])}
    assert kept(algebra.store, axis.units, cut).tolist() == [False] * 3 + [True] * 3
    cut = {int(algebra.store.resolve(inside.units)[1, 0])}
    assert kept(algebra.store, axis.units, cut).tolist() == [True, False, True] * 2


def test_factors_of_one_axis_are_the_same_however_often_it_is_split() -> None:
    algebra = Algebra()
    axis = algebra.fresh(12)
    first = algebra.factor(axis, (3, 4))
    again = algebra.factor(axis, (3, 4))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(algebra.store.resolve(a.units), algebra.store.resolve(b.units))


def test_merge_undoes_factor() -> None:
    algebra = Algebra()
    axis = algebra.fresh(12)
    merged = algebra.merge(algebra.factor(axis, (2, 3, 2)))
    assert np.array_equal(
        np.sort(algebra.store.resolve(merged.units), 1), np.sort(algebra.store.resolve(axis.units), 1)
    )


def test_two_products_of_one_shape_tie_factor_by_factor() -> None:
    algebra = Algebra()
    left, right = algebra.fresh(6), algebra.fresh(6)
    left_factors, right_factors = algebra.factor(left, (2, 3)), algebra.factor(right, (2, 3))
    algebra.equate(left, right, "added")
    for a, b in zip(left_factors, right_factors, strict=True):
        assert np.array_equal(algebra.store.resolve(a.units), algebra.store.resolve(b.units))
    assert len(atoms_of(algebra.store, left.units)) == 5


def test_finer_factors_refine_coarser_ones() -> None:
    algebra = Algebra()
    coarse, fine = algebra.fresh(12), algebra.fresh(12)
    algebra.factor(coarse, (6, 2))
    algebra.factor(fine, (2, 3, 2))
    algebra.equate(coarse, fine, "added")
    assert len(atoms_of(algebra.store, coarse.units)) == 2 + 3 + 2


def test_factors_that_do_not_line_up_are_fixed_with_the_reason() -> None:
    algebra = Algebra()
    left, right = algebra.fresh(6), algebra.fresh(6)
    algebra.factor(left, (2, 3))
    algebra.factor(right, (3, 2))
    algebra.equate(left, right, "2 x 3 against 3 x 2")
    rows = algebra.store.resolve(left.units)
    assert np.array_equal(np.sort(rows, 1), np.sort(algebra.store.resolve(right.units), 1))


def test_a_unit_that_would_make_several_others_one_is_fixed() -> None:
    algebra = Algebra()
    axis, copies = algebra.fresh(4), algebra.virtual(2)
    algebra.equate(algebra.take(axis, np.repeat(np.arange(4), 2)), algebra.merge((axis, copies)), "times its copies")
    assert len(atoms_of(algebra.store, axis.units)) == 4
    assert algebra.is_fixed(copies)
    assert algebra.store.reason(int(copies.units[0, 0])) == "times its copies"


def test_a_unit_that_stands_with_one_other_becomes_it() -> None:
    algebra = Algebra()
    axis, other = algebra.fresh(3), algebra.fresh(3)
    both = Axis(np.concatenate([axis.units, other.units], 1))
    algebra.equate(axis, both, "tied")
    assert np.array_equal(algebra.store.resolve(axis.units), algebra.store.resolve(other.units))
    assert not algebra.is_fixed(axis)


@pytest.mark.parametrize("seed", range(3))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_equated_rows_are_kept_alike_whatever_is_cut(seed: int, data: st.DataObject) -> None:
    """Random relations in random order, then random cuts: every relation that was demanded must hold."""
    draw = np.random.default_rng([seed, data.draw(st.integers(0, 2**32 - 1))])
    algebra = Algebra()
    axes = [algebra.fresh(12) for _ in range(4)]
    products: list[tuple] = []
    equal: list[tuple] = []
    for _ in range(draw.integers(2, 9)):
        axis = axes[draw.integers(len(axes))]
        match draw.integers(6):
            case 0:
                sizes = [(2, 6), (3, 4), (4, 3), (6, 2), (2, 2, 3)][draw.integers(5)]
                products.append((axis, algebra.factor(axis, sizes)))
            case 1:
                axes.append(algebra.take(axis, draw.permutation(12)))
            case 2:
                algebra.store.fix(axis.units[draw.integers(12)][None], "fixed")
            case 3:
                axes.append(algebra.concat([algebra.take(axis, slice(0, 5)), algebra.fresh(7)]))
            case _:
                other = axes[draw.integers(len(axes))]
                algebra.equate(axis, other, "tied")
                equal.append((axis, other))
    store = algebra.store
    atoms = atoms_of(store, *(axis.units for axis in axes))
    for _ in range(8):
        cut = {atom for atom in atoms if draw.random() < 0.3}
        for a, b in equal:
            assert np.array_equal(kept(store, a.units, cut), kept(store, b.units, cut))
        for axis, factors in products:
            assert np.array_equal(kept(store, axis.units, cut), kept(store, algebra.merge(factors).units, cut))
