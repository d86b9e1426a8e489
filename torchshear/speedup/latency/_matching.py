"""Matching the kernels of two versions of a model, of which some have a few kernels more than others."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from torchshear.speedup.latency._kernels import KernelTime

_SAME_SIZE: Final = 0.5  # what equal sizes may add to the worth of a match, beside 1 for the match


def match_kernels(first: Sequence[KernelTime], second: Sequence[KernelTime]) -> list[tuple[int, int]]:
    """Match kernels in the order in which they run, so that as many as possible have one of their kind.

    Matches never cross. Two kernels may match if operators, types and numbers of dimensions are equal; of several ways
    with as many matches the one with most equal sizes is taken. Greedy matching of the longest common run fails here:
    in a network of equal layers, one kernel more is enough for a layer to be taken for the next one.

    Args:
        first: kernels of one version.
        second: those of the other.

    Returns:
        Positions in both, ascending.

    Reference: Needleman and Wunsch, Journal of Molecular Biology 48, 1970.
    """
    places: dict[object, tuple[list[int], list[int]]] = {}
    for side, kernels in enumerate((first, second)):
        for number, kernel in enumerate(kernels):
            places.setdefault((kernel.operator, _layout(kernel)), ([], []))[side].append(number)
    worth = np.full((len(first), len(second)), -np.inf)
    for rows, columns in places.values():
        if not rows or not columns:
            continue
        here, there = np.array([_sizes(first[n]) for n in rows]), np.array([_sizes(second[n]) for n in columns])
        same = (here[:, None] == there).mean(2) if here.size else 1.0
        worth[np.ix_(rows, columns)] = 1 + _SAME_SIZE * same / (len(first) + 1)
    best = np.zeros((len(first) + 1, len(second) + 1))  # of what stands before a row and a column
    for row in range(len(first)):
        matched = np.maximum(best[row, 1:], best[row, :-1] + worth[row])
        best[row + 1, 1:] = np.maximum.accumulate(matched)
    pairs: list[tuple[int, int]] = []
    row, column = len(first), len(second)
    while row and column:
        if best[row, column] == best[row, column - 1]:
            column -= 1
        elif best[row, column] == best[row - 1, column]:
            row -= 1
        else:
            row, column = row - 1, column - 1
            pairs.append((row, column))
    return pairs[::-1]


def _layout(kernel: KernelTime) -> tuple[tuple[tuple[str, int], ...], ...]:
    return tuple(tuple((kind, len(shape)) for kind, shape in tensors) for tensors in (kernel.inputs, kernel.outputs))


def _sizes(kernel: KernelTime) -> tuple[int, ...]:
    return tuple(size for tensors in (kernel.inputs, kernel.outputs) for _, shape in tensors for size in shape)
