"""Selection: exact numbers, ties, balance, alignment, and what cannot be met."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import torchshear
from tests.networks import Grouped, Residual, analyzed, image, randomise
from torchshear.dependency import ChannelGroup, ChannelGroups, Member
from torchshear.dependency._alignment import Alignment
from torchshear.errors import ArgumentError
from torchshear.pruners.selection._unit_selector import choose_units
from torchshear.pruners.selection._widths import Limits, choose_width


def group_of(width: int, balance: np.ndarray | None = None) -> ChannelGroup:
    units = np.arange(width)
    member = Member("w", 0, frozenset({"out"}), units, units, width)
    return ChannelGroup("w[0]", width, (member,), balance, False, units + 1, ())


@given(
    width=st.integers(2, 300),
    ratio=st.floats(0, 0.999),
    align=st.sampled_from([1, 2, 4, 8, 16]),
    seed=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_kept_is_exact_aligned_and_never_nothing(width: int, ratio: float, align: int, seed: int) -> None:
    group = group_of(width)
    chosen = choose_width(group, ratio, Alignment(align, align, str(align)))
    target = width - int(np.floor(width * ratio + 1e-9))
    assert 1 <= chosen.kept <= width
    assert chosen.kept % align == 0 or chosen.kept == width
    allowed = [k for k in range(1, width + 1) if k % align == 0 or k == width]
    assert abs(chosen.kept - target) == min(abs(k - target) for k in allowed)
    scores = np.random.default_rng(seed).integers(0, 5, width).astype(float)
    kept = choose_units(group, scores, chosen.kept)
    assert len(kept) == chosen.kept
    gone = np.setdiff1d(np.arange(width), kept)
    if gone.size:
        assert scores[gone].max() <= scores[kept].min()


@pytest.mark.parametrize(("width", "ratio", "kept"), [(100, 0.29, 71), (10, 0.3, 7), (10, 0.95, 1), (3, 0.3, 3)])
def test_a_share_is_rounded_down_without_floating_point_slips(width: int, ratio: float, kept: int) -> None:
    assert choose_width(group_of(width), ratio, Alignment.none()).kept == kept


def test_among_equal_scores_the_later_unit_goes() -> None:
    assert choose_units(group_of(6), np.zeros(6), 4).tolist() == [0, 1, 2, 3]


def test_no_more_go_than_asked_where_several_tie_with_the_lowest() -> None:
    assert choose_units(group_of(4), np.array([1.0, 1, 1, 2]), 3).tolist() == [0, 1, 3]


def test_balanced_blocks_lose_equally_many() -> None:
    balance = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    scores = np.array([9, 1, 8, 2, 7, 3, 6, 4], float)
    assert choose_units(group_of(8, balance), scores, 4).tolist() == [0, 2, 5, 7]
    assert choose_width(group_of(8, balance), 0.4, Alignment.none()).kept == 6
    assert choose_width(group_of(8, balance), 0.99, Alignment.none()).kept == 2


def test_minimum_width_holds() -> None:
    assert choose_width(group_of(20), 0.9, Alignment.none(), Limits(5)).kept == 5
    assert choose_width(group_of(4), 0.9, Alignment.none(), Limits(9)).kept == 4


def test_notes_say_what_moved_a_width() -> None:
    assert choose_width(group_of(40), 0.5, Alignment(16, 16, "16")).note == "20 rounded to 16 by alignment 16"
    assert choose_width(group_of(20), 0.5, Alignment.none()).note == ""


def test_alignment_and_balance_hold_together() -> None:
    groups = analyzed(randomise(Grouped()), image())
    plan = torchshear.plan(groups, ratio=0.4, align=6)
    assert all(len(kept) == 6 for kept in plan.kept.values())
    assert all(np.bincount(kept // 4).tolist() == [2, 2, 2] for kept in plan.kept.values())


@pytest.fixture(scope="module")
def groups() -> ChannelGroups:
    return analyzed(Residual(), image())


@pytest.mark.parametrize(
    ("word", "given", "expected"),
    [
        *(("ratio", given, r"a number in \[0, 1\)") for given in (-0.1, 1.0, 1.5, float("nan"), "half", True)),
        *(("min_width", given, "an integer of at least 1") for given in (0, -3, 1.5, True)),
    ],
)
def test_a_number_outside_the_range_is_refused(groups: ChannelGroups, word: str, given: object, expected: str) -> None:
    with pytest.raises(ArgumentError, match=f"{word}=.*; expected {expected}"):
        torchshear.plan(groups, **{word: given})  # type: ignore[arg-type]


def test_a_ratio_that_moves_nothing_says_which_would(groups: ChannelGroups) -> None:
    with pytest.raises(ArgumentError, match=r"ratio=0.01 .*'one.weight\[0\]' with 16 units.*ratio=0.07"):
        torchshear.plan(groups, ratio=0.01)
    with pytest.raises(ArgumentError, match="use a smaller alignment"):
        torchshear.plan(groups, ratio=0.5, align=64)
