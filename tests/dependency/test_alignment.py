import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchshear.dependency._alignment import Alignment
from torchshear.errors import ArgumentError

AVX512 = Alignment(block=16, granule=16, name="cpu-avx512", linear=4)


@pytest.mark.parametrize(
    ("width", "multiplicity", "expected"),
    [
        (80, 1, [16, 32, 48, 64, 80]),
        (64, 1, list(range(4, 65, 4))),
        (40, 1, list(range(4, 41, 4))),
        (16, 1, [4, 8, 12, 16]),
        (18, 1, [4, 8, 12, 16, 18]),
        (12, 1, [4, 8, 12]),
        (7, 1, [4, 7]),
        (3, 1, [3]),
        (1, 1, [1]),
        (12, 64, list(range(1, 13))),
        (6, 8, [1, 2, 3, 4, 5, 6]),
        (9, 8, [2, 4, 6, 8, 9]),
        (5, 3, [4, 5]),
        (10, 3, [4, 8, 10]),
        (20, 3, [4, 8, 12, 16, 20]),
        (24, 3, [16, 24]),
        (6, 49, [4, 6]),
    ],
)
def test_allowed_widths_of_matrix_products(width, multiplicity, expected):
    widths = AVX512.allowed_widths(width, multiplicity, is_convolved=False)
    assert widths.dtype == np.int64
    assert widths.tolist() == expected


@pytest.mark.parametrize(
    ("alignment", "width", "expected"),
    [
        (AVX512, 64, [16, 32, 48, 64]),
        (AVX512, 40, [16, 32, 40]),
        (AVX512, 16, [16]),  # a convolution that reads 12 reads them in the plain layout
        (AVX512, 12, [12]),
        (Alignment(16, 8, "cpu-avx2", 4), 40, [16, 32, 40]),
        (Alignment(16, 8, "cpu-avx2", 4), 24, [16, 24]),
        (Alignment(16, 8, "cpu-avx2", 4), 16, [8, 16]),
        (Alignment(16, 8, "cpu-avx2", 4), 8, [8]),
        (Alignment(16, 8, "no other for products"), 16, [8, 16]),
    ],
)
def test_allowed_widths_of_convolutions(alignment, width, expected):
    assert alignment.allowed_widths(width).tolist() == expected


def test_none_allows_every_width():
    assert Alignment.none() == Alignment(1, 1, "none")
    assert Alignment.none().allowed_widths(5).tolist() == [1, 2, 3, 4, 5]


@given(
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 4)),
    width=st.integers(1, 300),
    multiplicity=st.integers(1, 64),
    is_convolved=st.booleans(),
)
def test_widths_follow_the_definition(sizes, width, multiplicity, is_convolved):
    granule, factor, times = sizes
    alignment = Alignment(granule * factor * times, granule * times, "any", granule)
    own, most = (granule * times, 1) if is_convolved else (granule, 4)
    whole = {k for k in range(1, width) if k * multiplicity % alignment.block == 0}
    partial = {k for k in range(1, width) if k * multiplicity % own == 0}
    expected = whole | {width}
    if width * multiplicity <= most * alignment.block or not whole:
        expected |= partial
    assert alignment.allowed_widths(width, multiplicity, is_convolved).tolist() == sorted(expected)


def test_alignment_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        AVX512.block = 8


@pytest.mark.parametrize(
    ("block", "granule", "name", "message"),
    [
        (0, 1, "x", "block must be a whole number of at least 1, but got block=0"),
        (-8, 1, "x", "got block=-8"),
        (True, 1, "x", "got block=True"),
        (8.0, 1, "x", "got block=8.0"),
        (8, 0, "x", "granule must be a whole number of at least 1"),
        (8, 3, "x", "block=8 is not a multiple of granule=3"),
        (8, 4, "", "needs a name"),
        (8, 4, None, "needs a name"),
    ],
)
def test_bad_alignments_are_refused(block, granule, name, message):
    with pytest.raises(ArgumentError, match=message):
        Alignment(block, granule, name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AVX512.allowed_widths(0), "width must be a whole number of at least 1, but got width=0"),
        (lambda: AVX512.allowed_widths(8, 0), "multiplicity must be"),
        (lambda: AVX512.allowed_widths("8"), "got width='8'"),
    ],
)
def test_bad_questions_are_refused(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (3, "block=16 is not a multiple of linear=3"),
        (0, "linear must be a whole number of at least 1, but got linear=0"),
        ("4", "got linear='4'"),
    ],
)
def test_bad_granules_of_products_are_refused(linear, message):
    with pytest.raises(ArgumentError, match=message):
        Alignment(16, 8, "x", linear)
