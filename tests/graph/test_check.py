"""Comparing a captured graph with its model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear.graph import Graph, _check


def traced(model: nn.Module, *args: Tensor) -> Graph:
    graph = torchshear.trace(model.eval(), args)
    assert graph.batch_hint is not None
    return graph


def changed(model: nn.Module, *args: Tensor, by: float) -> bool:
    """Whether the graph still agrees with its model when one weight has changed by a share of itself."""
    graph = traced(model, *args)
    twin = type(model)()
    twin.load_state_dict(model.state_dict())
    next(twin.parameters()).data.flatten()[0].mul_(1 + by)
    return _check.agrees(graph, twin.eval())


class Filled(nn.Module):
    """Fills one half of its output with a huge number."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(x)
        return torch.cat([y, torch.full_like(y, -1e9)], 1)


def test_a_difference_beyond_rounding_is_one_also_beside_a_huge_filler() -> None:
    torch.manual_seed(0)
    model, x = Filled(), torch.rand(2, 6) + 1
    assert changed(model, x, by=0)
    assert not changed(model, x, by=1e-3)


class Fused(nn.Module):
    """A layer that runs as one kernel when it is run and as its parts when it is captured, which round differently."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.score = nn.Linear(8, 32), nn.Linear(32, 1)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.one(x).flatten(0, 1)).reshape(x.shape[0], -1, 32)
        best = self.score(h).squeeze(-1).topk(10000, 1).indices
        y: Tensor = self.out(h.gather(1, best[..., None].expand(-1, -1, 32)))
        return y


def test_top_k_is_compared_in_float64() -> None:
    torch.manual_seed(0)
    model, x = Fused().eval(), torch.randn(1, 2000, 16, 8)
    graph = traced(model, x)
    with torch.no_grad():
        difference = (_check.run_graph(graph, graph.inputs)[0] - model(x)).abs().max()
    assert difference > 1e-3, "float32 does not reorder anything; the test needs more tokens"


def test_ties_are_no_difference() -> None:
    class Tied(Fused):
        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(self.one(x).flatten(0, 1)).reshape(x.shape[0], -1, 32)
            score = 1 + 1e-13 * self.score(h).squeeze(-1)
            best = score.topk(20, 1).indices
            return self.out(h.gather(1, best[..., None].expand(-1, -1, 32)))

    torch.manual_seed(0)
    traced(Tied(), torch.randn(1, 20, 16, 8))


class Refusing(nn.Module):
    """Its own code refuses float64, and a layer of it rounds in another way when it is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError("expected float32")
        y: Tensor = self.layer(self.one(x))
        return y


def test_a_model_that_refuses_float64_is_compared_in_its_own_dtype() -> None:
    torch.manual_seed(0)
    model, x = Refusing(), torch.randn(2, 5, 8)
    traced(model, x)
    assert not changed(model, x, by=0.3)


@pytest.mark.parametrize(
    ("change", "is_equal"),
    [
        (lambda y: y, True),
        (lambda y: y * (1 + 1e-11), True),
        (lambda y: y * (1 + 1e-7), False),
        (lambda y: torch.where(y == y[0], y + 1e-7, y), False),
        (lambda y: torch.where(y == y[0], torch.nan, y), False),
        (lambda y: torch.where(y == y[1], torch.inf, y), False),
    ],
)
@pytest.mark.parametrize("filler", [0.0, -1e9, torch.inf, torch.nan])
def test_outputs_are_compared_one_by_one(change: Callable[[Tensor], Tensor], is_equal: bool, filler: float) -> None:
    values = torch.linspace(-2, 3, 100, dtype=torch.float64)
    one, two = (torch.cat([v, torch.full((50,), filler).double()]) for v in (values, change(values)))
    assert _check._are_close([one], [two], 1e-9) == is_equal
    wide = [value.to(torch.complex128) for value in (one, two)]
    assert _check._are_close(wide[:1], wide[1:], 1e-9) == is_equal


def test_numbers_that_count_are_compared_exactly() -> None:
    one = torch.tensor([1_000_000, 2])
    assert _check._are_close([one], [one.clone()], 1e-3)
    assert not _check._are_close([one], [torch.tensor([1_000_001, 2])], 1e-3)
    assert not _check._are_close([one > 5], [one > 1], 1e-3)
    assert not _check._are_close([one], [one, one], 1e-3)
    assert not _check._are_close([one], [one[:1]], 1e-3)
