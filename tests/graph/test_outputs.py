"""Outputs of a model: objects of its own kinds are omitted, dataclasses are taken apart, wrappers refused."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchshear
from torchshear.errors import ArgumentError, CaptureError
from torchshear.graph._outputs import output_names
from torchshear.speedup import shrink_to_form


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
    assert graph.omitted_outputs == ("1 (Cache)",)
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


class Named(OrderedDict[str, Any]):
    """A dictionary as diffusers returns it: torch may take it apart, but was not told what the parts are called."""


class Pair:
    """A class of the user's with two parts."""

    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right


pytree.register_pytree_node(
    Named,
    lambda d: (list(d.values()), list(d)),
    lambda v, k: Named(zip(k, v, strict=True)),
    serialized_type_name="Named",
)
pytree.register_pytree_node(
    Pair, lambda p: ([p.left, p.right], None), lambda v, _: Pair(*v), serialized_type_name="Pair"
)


@pytest.mark.parametrize(
    ("make", "names", "left_out"),
    [
        (lambda y, h: Named(sample=y), ("sample",), ()),
        (lambda y, h: Named(sample=y, cache=Cache(h)), ("sample", "cache"), ("cache (Cache)",)),
        (lambda y, h: [Named(sample=y), Pair(y.tanh(), None)], ("0.sample", "1.0", "1.1"), ()),
        (lambda y, h: Pair(y, Cache(h)), ("0", "1"), ("1 (Cache)",)),
    ],
)
@pytest.mark.parametrize("form", ["native", "traced"])
def test_classes_without_names_of_their_parts_go_out(
    make: Callable[[Tensor, Tensor], Any], names: tuple[str, ...], left_out: tuple[str, ...], form: str
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            h = self.first(x).relu()
            return make(self.last(h), h)

    model, x = Net().eval(), torch.randn(3, 6)
    graph = torchshear.trace(model, (x,))
    assert (output_names(graph.out_spec), graph.omitted_outputs) == (names, left_out)
    small = shrink_to_form(model, torchshear.plan(torchshear.analyze(graph), ratio=0.5), form=form).model
    given, expected = pytree.tree_flatten(small(x)), pytree.tree_flatten(model(x))
    assert type(small(x)) is type(model(x))
    assert small.get_parameter("first.weight").shape == (4, 6)
    assert form == "traced" or given[1] == expected[1]
    assert [type(one) for one in given[0][:1]] == [Tensor]


def test_wrappers_are_refused_with_what_to_give_instead() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ArgumentError, match="Give model._orig_mod"):
        torchshear.trace(torch.compile(model, backend="eager"), (torch.randn(2, 3),))
    with pytest.raises(ArgumentError, match="Give model.module"):
        torchshear.trace(nn.DataParallel(model), (torch.randn(2, 3),))
