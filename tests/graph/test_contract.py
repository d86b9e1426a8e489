"""What a model is held to: objects of its own kinds are left out, dataclasses are taken apart, wrappers refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear.errors import ArgumentError, CaptureError


class Cache:
    """An object that torch knows nothing of."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
        keys = self.key(x)
        return self.last(keys * self.value(x)), Cache(keys)


def test_a_cache_is_left_out_and_what_it_holds_may_shrink() -> None:
    model, x = Caching().eval(), torch.randn(3, 6)
    graph = torchshear.trace(model, (x,))
    assert graph.left_out == ("1 (Cache)",)
    result = torchshear.prune(model, (x,), ratio=0.5)
    assert result.form == "native"
    output, cache = result.model(x)
    assert output.shape == (3, 2)
    assert isinstance(cache, Cache)
    assert cache.keys.shape == (3, 4)
    assert not model._forward_hooks


def test_a_model_that_returns_nothing_else_is_refused() -> None:
    class Only(Caching):
        def forward(self, x: Tensor) -> Cache:  # type: ignore[override]
            return Cache(self.key(x))

    with pytest.raises(CaptureError, match="returns no tensor that torch can see: output \\(Cache\\)"):
        torchshear.trace(Only(), (torch.randn(3, 6),))


@dataclass
class Batch:
    left: Tensor
    right: Tensor


@dataclass
class Answer:
    sum: Tensor
    product: Tensor


class OnDataclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, batch: Batch) -> Answer:
        left, right = self.first(batch.left), self.first(batch.right)
        return Answer(self.last(left + right), self.last(left * right))


def test_dataclasses_come_in_and_go_out() -> None:
    model, batch = OnDataclasses().eval(), Batch(torch.randn(3, 6), torch.randn(3, 6))
    result = torchshear.prune(model, (batch,), ratio=0.5)
    answer = result.model(batch)
    assert isinstance(answer, Answer)
    assert answer.sum.shape == answer.product.shape == (3, 2)
    assert result.report.after.n_params < result.report.before.n_params


def test_wrappers_are_refused_with_what_to_give_instead() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ArgumentError, match="Give model._orig_mod"):
        torchshear.trace(torch.compile(model, backend="eager"), (torch.randn(2, 3),))
    with pytest.raises(ArgumentError, match="Give model.module"):
        torchshear.trace(nn.DataParallel(model), (torch.randn(2, 3),))
