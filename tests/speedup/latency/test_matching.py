"""Kernels of two versions of a network of equal layers, of which one has some kernels more."""

import numpy as np

from torchshear.speedup.latency._kernels import KernelTime
from torchshear.speedup.latency._matching import match_kernels


def kernel(operator: str, *shape: int, name: str = "") -> KernelTime:
    return KernelTime(name, operator, (("float", shape),), (("float", shape),), 1.0)


def layer(number: int, width: int) -> list[KernelTime]:
    """A layer like every other one but for its width."""
    return [
        kernel("MatMul", 8, width, name=f"{number} in"),
        kernel("Gelu", 8, width, name=f"{number} gelu"),
        kernel("MatMul", 8, 32, name=f"{number} out"),
        kernel("Add", 8, 32, name=f"{number} add"),
    ]


def test_a_layer_is_not_taken_for_the_next_one_where_kernels_are_missing() -> None:
    dense = [kernel("Gather", 8), *(one for number in range(12) for one in layer(number, 64))]
    widths = np.random.default_rng(0).integers(8, 64, 12)
    layers = [layer(number, int(width)) for number, width in enumerate(widths)]
    layers[3].insert(1, kernel("Reshape", 8, 4))
    layers[7] = layers[7][:1] + layers[7][2:]  # fused
    narrow = [kernel("Slice", 8), kernel("Gather", 8), *(one for each in layers for one in each)]
    pairs = match_kernels(dense, narrow)
    assert len(pairs) == len(dense) - 1
    assert all(dense[first].name == narrow[second].name for first, second in pairs)
    assert pairs == sorted(pairs)


def test_equal_sizes_decide_between_matches_that_are_as_good() -> None:
    first = [kernel("Add", 8, 4, name="a"), kernel("Add", 8, 6, name="b")]
    second = [kernel("Add", 8, 6, name="b")]
    assert match_kernels(first, second) == [(1, 0)]
    assert match_kernels(second, first) == [(0, 1)]
    assert match_kernels(first, first[:1]) == [(0, 0)]  # one kernel is matched once


def test_kernels_of_other_types_or_ranks_do_not_match() -> None:
    assert match_kernels([kernel("Add", 8, 4)], [kernel("Add", 8)]) == []
    assert match_kernels([kernel("Add", 8)], [kernel("Mul", 8)]) == []
    assert match_kernels([], [kernel("Mul", 8)]) == []
