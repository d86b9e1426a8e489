"""Ties: choices among values that are equal up to rounding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchshear.graph.numerics._ties import TieBreaker

CHOOSING: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda x: x.topk(3, 1).indices,
    "sort": lambda x: x.sort(1, descending=True).indices,
    "sort of the first dimension": lambda x: x.sort(0).indices,
    "stable sort": lambda x: x.sort(dim=0, stable=True).indices,
    "argsort": lambda x: x.argsort(1),
    "argmax": lambda x: x.argmax(1),
    "argmax of all": lambda x: x.argmax(),
    "argmin": lambda x: x.argmin(1, keepdim=True),
    "max": lambda x: x.max(1).indices,
    "min": lambda x: x.min(0, keepdim=True).indices,
    "kthvalue": lambda x: x.kthvalue(2, 1).indices,
    "median": lambda x: x.median(1).indices,
}


def values(spread: float) -> Tensor:
    """Rows with pairs of values that are as far apart as is given, in an order of their own."""
    generator = torch.Generator().manual_seed(0)
    base = torch.arange(2, 10, dtype=torch.float64).div(2, rounding_mode="floor").repeat(8, 1)
    mixed = base.gather(1, torch.rand(8, 8, generator=generator).argsort(1))
    return mixed + spread * torch.rand(8, 8, generator=generator, dtype=torch.float64)


def noisy(x: Tensor, spread: float) -> Tensor:
    return x + spread * torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("choose", CHOOSING.values(), ids=CHOOSING)
def test_a_choice_among_ties_is_taken_over(choose: Callable[[Tensor], Tensor]) -> None:
    x, choices = values(1e-13), TieBreaker()
    with choices.record():
        expected = choose(x)
    assert not torch.equal(choose(noisy(x, 1e-12)), expected)
    with choices.replay(1e-9):
        assert torch.equal(choose(noisy(x, 1e-12)), expected)
    assert choices.n_replayed == 1


@pytest.mark.parametrize("choose", CHOOSING.values(), ids=CHOOSING)
def test_another_choice_is_not(choose: Callable[[Tensor], Tensor]) -> None:
    x, choices = values(1e-13), TieBreaker()
    with choices.record():
        choose(x)
    own = choose(noisy(x, 1e-2))
    with choices.replay(1e-9):
        assert torch.equal(choose(noisy(x, 1e-2)), own)
    assert choices.n_replayed == 0


def test_values_are_those_at_the_positions() -> None:
    choices = TieBreaker()
    with choices.record():
        torch.tensor([1.0, 3.0, 3.0 + 1e-12], dtype=torch.float64).max(0)
    x = torch.tensor([1.0, 3.0 + 1e-12, 3.0], dtype=torch.float64)
    with choices.replay(1e-9):
        value, index = x.max(0)
    assert (int(index), float(value)) == (2, 3.0)


def test_a_call_that_only_one_run_makes_is_passed_over() -> None:
    x, choices = values(1e-13), TieBreaker()
    with choices.record():
        x[:4].sort(0)
        expected = x.argmax(1)
    with choices.replay(1e-9):
        assert torch.equal(noisy(x, 1e-12).argmax(1), expected)


def test_infinite_values_are_equal_only_to_themselves() -> None:
    inf, choices = float("inf"), TieBreaker()
    with choices.record():
        torch.tensor([1.0, inf, 2.0, inf]).topk(2)
    with choices.replay(1e-3):
        assert torch.tensor([1.0, inf, 2.0, 5.0]).topk(2).indices.tolist() == [1, 3]
        assert choices.n_replayed == 0
