"""Comparing a captured graph with its model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear.graph import Graph
from torchshear.graph._run import run_graph
from torchshear.graph.capture._dynamic_batch import _are_close, agrees_with_model
from torchshear.graph.capture._trace import outputs_differ_in_training


def traced(model: nn.Module, *args: Tensor) -> Graph:
    graph = torchshear.trace(model.eval(), args)
    assert graph.batch_hint is not None
    return graph


def changed(model: nn.Module, *args: Tensor, by: float) -> bool:
    """Return whether the graph still agrees with its model when one weight has changed by a share of itself."""
    graph = traced(model, *args)
    twin = type(model)()
    twin.load_state_dict(model.state_dict())
    next(twin.parameters()).data.flatten()[0].mul_(1 + by)
    return agrees_with_model(graph, twin.eval())


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
        difference = (run_graph(graph, graph.inputs)[0] - model(x)).abs().max()
    assert difference > 1e-3, "float32 does not reorder anything; the test needs more tokens"


class Tied(nn.Module):
    """Picks rows by scores that are equal but for rounding, which is another when it is captured."""

    spread = 1e-13

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Linear(8, 16).double(), nn.Linear(16, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.arange(x.shape[1], dtype=x.dtype) * self.spread
        score = 1 + (noise if torch.compiler.is_exporting() else -noise)
        best = score.expand(x.shape[0], -1).topk(3, 1).indices
        y: Tensor = self.out(self.one(x).gather(1, best[..., None].expand(-1, -1, 16)))
        return y


def test_ties_are_no_difference() -> None:
    assert traced(Tied(), torch.randn(2, 6, 8, dtype=torch.float64)).batch_hint is not None


def test_another_choice_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tied, "spread", 1e-3)
    assert torchshear.trace(Tied().eval(), (torch.randn(2, 6, 8, dtype=torch.float64),)).batch_hint is None


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
    assert _are_close([one], [two], 1e-9) == is_equal
    wide = [value.to(torch.complex128) for value in (one, two)]
    assert _are_close(wide[:1], wide[1:], 1e-9) == is_equal


def test_numbers_that_count_are_compared_exactly() -> None:
    one = torch.tensor([1_000_000, 2])
    assert _are_close([one], [one.clone()], 1e-3)
    assert not _are_close([one], [torch.tensor([1_000_001, 2])], 1e-3)
    assert not _are_close([one > 5], [one > 1], 1e-3)
    assert not _are_close([one], [one, one], 1e-3)
    assert not _are_close([one], [one[:1]], 1e-3)


class Auxiliary(nn.Module):
    """Pools to one value a channel before a batch norm, and gives more, or other sizes, in train mode."""

    def __init__(self, more: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.more = more

    def forward(self, x: Tensor) -> Any:
        h: Tensor = self.two(self.norm(self.one(x).mean((2, 3), keepdim=True)))
        return self.more(h) if self.training else h


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        (lambda h: h, False),
        (lambda h: 2 * h, False),
        (lambda h: (h, h), True),
        (lambda h: {"out": h}, True),
        (lambda h: h.flatten(1), True),
        (lambda h: h[..., 0], True),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("is_free", [True, False])
def test_other_outputs_in_train_mode_are_captured_too(
    monkeypatch: pytest.MonkeyPatch, more: Callable[[Tensor], Any], differs: bool, batch: int, is_free: bool
) -> None:
    if not is_free:
        monkeypatch.setattr("torchshear.graph.capture._trace.probe_prime", lambda *_: None)
    graph = torchshear.trace(Auxiliary(more), (torch.randn(batch, 3, 8, 8),))
    assert (graph.batch_hint is not None) == is_free
    assert outputs_differ_in_training(graph, Auxiliary(more)) == differs
    assert (graph.training is not None) == (differs and (is_free or batch > 1))


class Reading(nn.Module):
    """Has a second layer that is read in train mode alone, if at all; the outputs are of one shape."""

    def __init__(self, is_read: bool) -> None:
        super().__init__()
        self.one, self.two, self.is_read = nn.Linear(6, 8), nn.Linear(6, 8), is_read

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(x)
        return y + self.two(x) if self.training and self.is_read else y


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_only_training_reads_is_captured(is_read: bool, batch: int) -> None:
    graph = torchshear.trace(Reading(is_read), (torch.randn(batch, 6),))
    assert (graph.training is not None) == is_read
