"""The choice of units against a naive one, and against the best choice found by trying all."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchshear.pruners.masks._selection import count_of, keep_highest, lowest, lowest_first

N = 192  # units of each of three layers; the first has the lowest scores, the last the highest
TOY = [torch.arange(N) + 1000.0 * layer for layer in range(3)]


def n_gone(kept: list[Tensor]) -> tuple[int, ...]:
    return tuple(int((~one).sum()) for one in kept)


def five_steps(scores: list[Tensor], target: float, final: float, least: float, most: float) -> tuple[int, ...]:
    """Neural Compressor's loop, with exact counts: pool, freeze layers above the maximum, pay back the minimum."""
    sizes = [len(one) for one in scores]
    frozen: dict[int, int] = {}
    while True:
        open_layers = [layer for layer in range(len(scores)) if layer not in frozen]
        pool = [(float(s), layer, -i) for layer in open_layers for i, s in enumerate(scores[layer])]
        gone = dict(frozen)
        k = count_of(sum(sizes), target) - sum(frozen.values())
        for layer in open_layers:
            gone[layer] = sum(
                1 for _, of, _ in sorted(pool, key=lambda e: (e[0], -e[1], e[2]))[: max(k, 0)] if of == layer
            )
        n_frozen = len(frozen)
        for layer in open_layers:
            if gone[layer] > count_of(sizes[layer], most):
                gone[layer] = frozen[layer] = count_of(sizes[layer], most)
        for layer in open_layers:
            if layer in frozen and gone[layer] < count_of(sizes[layer], most):
                continue
            if gone[layer] / sizes[layer] > final:
                gap = sum(max(0, count_of(n, least) - gone[i]) for i, n in enumerate(sizes))
                remaining = count_of(sum(sizes), final) - sum(gone.values())
                if remaining < gap and layer not in frozen:
                    gone[layer] = frozen[layer] = gone[layer] - (gap - remaining)
        if len(frozen) == n_frozen:
            return tuple(gone[layer] for layer in range(len(scores)))


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [
        (0.0, 0.98, (188, 157, 0)),  # .979 / .82 / .0
        (0.0, 0.8, (153, 153, 39)),  # .8 / .8 / .2
        (0.3, 0.98, (188, 100, 57)),  # .979 / .521 / .3
        (0.6, 0.6, (115, 115, 115)),  # .6 / .6 / .6
    ],
)
def test_toy_distribution(least: float, most: float, expected: tuple[int, ...]) -> None:
    now = count_of(3 * N, 0.6)
    kept = keep_highest(TOY, now, now, [count_of(N, least)] * 3, [count_of(N, most)] * 3)
    assert n_gone(kept) == expected
    if least == 0:
        assert five_steps(TOY, 0.6, 0.6, least, most) == expected
    for one, gone in zip(kept, expected, strict=True):
        assert one.tolist() == [False] * gone + [True] * (N - gone)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=4),
    st.floats(0, 0.95),
    st.floats(0, 0.95),
)
def test_maximum_as_in_the_five_steps(layers: list[list[int]], target: float, most: float) -> None:
    scores = [torch.tensor(layer, dtype=torch.float64) for layer in layers]
    now = count_of(sum(map(len, layers)), target)
    limits = [count_of(len(layer), most) for layer in layers]
    kept = keep_highest(scores, now, now, [0] * len(layers), limits)
    assert n_gone(kept) == five_steps(scores, target, target, 0.0, most)
    assert sum(n_gone(kept)) == min(now, sum(limits))


@given(st.data())
def test_no_other_choice_within_the_limits_is_lower(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    scores = [data.draw(st.lists(st.integers(-5, 9), min_size=n, max_size=n)) for n in sizes]
    most = [data.draw(st.integers(0, n)) for n in sizes]
    least = [data.draw(st.integers(0, n)) for n in most]
    final = data.draw(st.integers(sum(least), sum(sizes)))
    now = data.draw(st.integers(0, final))
    kept = keep_highest([torch.tensor(s, dtype=torch.float64) for s in scores], now, final, least, most)

    def is_allowed(gone: tuple[int, ...]) -> bool:
        beyond = sum(max(0, g - low) for g, low in zip(gone, least, strict=True))
        return beyond <= final - sum(least) and all(g <= high for g, high in zip(gone, most, strict=True))

    allowed = [g for g in itertools.product(*(range(n + 1) for n in sizes)) if is_allowed(g) and sum(g) <= now]
    n_most = max(map(sum, allowed))
    best = min(sum(sum(sorted(s)[:n]) for s, n in zip(scores, g, strict=True)) for g in allowed if sum(g) == n_most)
    gone = n_gone(kept)
    assert is_allowed(gone)
    assert sum(gone) == n_most
    assert (
        sum(v for s, k in zip(scores, kept, strict=True) for v, stays in zip(s, k.tolist(), strict=True) if not stays)
        == best
    )
    if now == final:
        assert all(g >= low for g, low in zip(gone, least, strict=True))


def test_of_equal_scores_the_later_goes_first() -> None:
    assert lowest_first(torch.tensor([1.0, 0.0, 1.0, 0.0])).tolist() == [3, 1, 2, 0]
    kept = keep_highest([torch.ones(3), torch.ones(3)], 4, 4, [0, 0], [3, 3])
    assert [one.tolist() for one in kept] == [[True, True, False], [False, False, False]]


@given(st.lists(st.one_of(st.integers(0, 3), st.just(float("-inf"))), min_size=1, max_size=12), st.integers(-1, 13))
def test_lowest_is_the_head_of_the_order(values: list[float], count: int) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    expected = sorted(lowest_first(scores)[: max(count, 0)].tolist())
    assert lowest(scores, count).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize(("n", "ratio", "count"), [(10, 0.35, 3), (10, 0.3, 3), (100, 0.29, 29), (384, 0.8, 307)])
def test_counts(n: int, ratio: float, count: int) -> None:
    assert count_of(n, ratio) == count
