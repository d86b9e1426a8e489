"""Refit of weights that are parts of one tensor: packed projections of attention, and parts in any other form."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import noise
from torchshear.pruners import plan_from_kept
from torchshear.speedup import Refit, refit
from torchshear.speedup.compensation._least_squares import RIDGES

Parts = Callable[[Tensor], list[Tensor]]
PARTS: dict[str, tuple[tuple[int, ...], Parts]] = {
    "chunk": ((12, 16), lambda w: list(w.chunk(3))),
    "split": ((12, 16), lambda w: list(w.split([3, 8, 1]))),
    "slices": ((12, 16), lambda w: [w[:4], w[4:8], w[8:]]),
    "narrow": ((12, 16), lambda w: [w.narrow(0, 0, 6), w.narrow(0, 6, 6)]),
    "every second": ((12, 16), lambda w: [w[::2], w[1::2]]),
    "select": ((3, 4, 16), lambda w: [w[0], w[1], w[2]]),
    "unbind": ((3, 4, 16), lambda w: list(w.unbind())),
    "columns": ((16, 12), lambda w: [part.t() for part in w.chunk(3, 1)]),
    "by head": ((12, 16), lambda w: [w.view(2, 3, 2, -1)[:, part].reshape(4, -1) for part in range(3)]),
    "reshape": ((192,), lambda w: [w.reshape(12, -1)]),
    "some rows are not read": ((12, 16), lambda w: [w[:4], w[9:]]),
}


class Packed(nn.Module):
    """Layers behind a cut one, with weights that are parts of one tensor, and biases of another."""

    def __init__(self, shape: tuple[int, ...], parts: Parts) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.weight, self.bias = nn.Parameter(noise(*shape, seed=1)), nn.Parameter(noise(12, seed=2))
        self.parts = parts

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.first(x).relu()
        weights = self.parts(self.weight)
        biases = self.bias.split([len(weight) for weight in weights] + [12 - sum(map(len, weights))])
        return [functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=False)]


def fitted(model: nn.Module, data: list[Any], ratio: float = 0.5, **words: Any) -> tuple[Any, Any, Refit]:
    """Return the model after the cut and after the refit, with the record."""
    args = data[0]
    result = torchshear.prune(model, args, ratio=ratio, **words)
    return result.model, *refit(model, result.model, result.plan, data, batches=len(data), progress=False)


def half_of_the_first(model: nn.Module) -> torchshear.PruningPlan:
    groups = torchshear.analyze(torchshear.trace(model, noise(2, 6)))
    (name,) = [group.name for group in groups if any(member.name == "first.weight" for member in group.members)]
    return plan_from_kept(groups, {name: list(range(8))})


def batches(*shapes: tuple[int, ...], n: int = 4) -> list[tuple[Tensor, ...]]:
    return [tuple(noise(*shape, seed=100 * k + place) for place, shape in enumerate(shapes)) for k in range(n)]


def error(model: nn.Module, other: nn.Module, data: list[tuple[Tensor, ...]]) -> float:
    with torch.no_grad():
        pairs = [(model(*args), other(*args)) for args in data]
    flat = [[value[0] if isinstance(value, tuple) else value for value in pair] for pair in pairs]
    return float(sum((one - two).square().sum() for one, two in flat))


def ridge(inputs: Any, wanted: Any, present: Any) -> Iterator[Any]:
    """Weights with the biases as a last column: least squares around the present weights, by each ridge."""
    middle = inputs.mean(0)
    centred, rest = inputs - middle, wanted - wanted.mean(0) - (inputs - middle) @ present.T
    for share in RIDGES:
        more = np.sqrt(share * np.square(centred).sum(0).mean()) * np.eye(len(middle))
        rows = np.concatenate([centred, more]), np.concatenate([rest, np.zeros((len(middle), rest.shape[1]))])
        weight = present + np.linalg.lstsq(*rows, rcond=None)[0].T
        yield np.concatenate([weight, (wanted.mean(0) - weight @ middle)[:, None]], 1)


@pytest.mark.parametrize("name", PARTS)
def test_each_part_is_the_solution_of_least_squares(name: str) -> None:
    shape, parts = PARTS[name]
    torch.manual_seed(0)
    model = Packed(shape, parts).double().eval()
    data = batches((64, 6))
    plan = half_of_the_first(model)
    cut: Any = torchshear.shrink(model, plan)
    small: Any
    small, record = refit(model, cut, plan, data, batches=4, progress=False)
    assert not record.skipped
    assert len(cut.first.weight) == 8
    with torch.no_grad():
        x = torch.cat([args[0] for args in data])
        inputs = functional.linear(x, small.first.weight, small.first.bias).relu()
        chosen = torch.arange(len(x)) % 4 != 3
        start = 0
        for wanted, present, weight in zip(model(x), parts(cut.weight), parts(small.weight), strict=True):
            taken = slice(start, start + len(weight))
            start += len(weight)
            found = np.concatenate([weight, small.bias[taken].unsqueeze(1)], 1)
            solutions = ridge(inputs[chosen].numpy(), wanted[chosen].numpy(), present.numpy())
            assert min(abs(found - one).max() for one in solutions) < 1e-6
        assert torch.equal(small.bias[start:], cut.bias[start:])
    unread = torch.ones(model.weight.numel(), dtype=torch.bool)
    for taken in parts(torch.arange(model.weight.numel()).reshape(shape)):
        unread[taken.flatten()] = False
    if bool(unread.any()):  # rows that nothing reads stay
        rest = unread.reshape(shape)[:, :8]
        assert torch.equal(small.weight[rest], cut.weight[rest])


def test_parts_stay_as_they_are_where_nothing_is_cut() -> None:
    torch.manual_seed(0)
    model = Packed(*PARTS["by head"]).double().eval()
    plan = plan_from_kept(torchshear.analyze(torchshear.trace(model, noise(2, 6))), {})
    small, record = refit(model, torchshear.shrink(model, plan), plan, batches((64, 6)), batches=4, progress=False)
    assert record.error_before == record.error_after == 0
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in model.state_dict().items())


def test_duplicates_are_made_up_for_exactly() -> None:
    torch.manual_seed(0)
    model = Packed(*PARTS["chunk"]).double().eval()
    with torch.no_grad():
        for tensor in (model.first.weight, model.first.bias):
            tensor[8:] = tensor[:8]
    plan = half_of_the_first(model)
    small, _ = refit(model, torchshear.shrink(model, plan), plan, batches((64, 6)), batches=4, progress=False)
    assert len(small.get_parameter("first.weight")) == 8
    for got, wanted in zip(small(noise(9, 6)), model(noise(9, 6)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


class Across(nn.Module):
    """Attention of one sequence to another, which takes its projections out of one weight."""

    def __init__(self, need_weights: bool, batch_first: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.head = nn.Linear(16, 5)
        self.need_weights = need_weights

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.two(y).relu()
        found = self.attention(self.one(x).relu(), y, y, need_weights=self.need_weights)[0]
        out: Tensor = self.head(found)
        return out


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "to another sequence, with weights": (lambda: Across(True, True), ((16, 5, 8), (16, 7, 8))),
    "to another sequence": (lambda: Across(False, True), ((16, 5, 8), (16, 7, 8))),
    "time first": (lambda: Across(False, False), ((5, 16, 8), (7, 16, 8))),
    "encoder": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)),
        ((16, 5, 8),),
    ),
    "decoder": (lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), ((16, 5, 16), (16, 7, 16))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_packed_projections_of_attention(name: str) -> None:
    make, shapes = NETWORKS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    cut, small, record = fitted(model, batches(*shapes, n=8))
    assert not record.skipped
    assert record.is_kept
    assert record.error_after < record.error_before
    unseen = [tuple(noise(*shape, seed=7 + place) for place, shape in enumerate(shapes))]
    assert error(model, small, unseen) < error(model, cut, unseen)


class Twice(nn.Module):
    """Two calls that read the same part of a weight, each with one half of its inputs."""

    def __init__(self, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(12, 8, seed=1))
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, two = functional.pad(x[:, :4], (0, 4)), functional.pad(x[:, 4:], (4, 0))
        return functional.linear(one, self.first(self.weight)), functional.linear(two, self.second(self.weight))


def refit_spoiled(model: Any) -> tuple[Any, Refit]:
    plan = plan_from_kept(torchshear.analyze(torchshear.trace(model, noise(2, 8))), {})
    spoiled: Any = torchshear.shrink(model, plan)
    with torch.no_grad():
        spoiled.weight += noise(12, 8, seed=3)
    return refit(model, spoiled, plan, batches((64, 8)), batches=4, progress=False)


def test_a_part_that_several_calls_read_is_one_system() -> None:
    model = Twice(lambda w: w[:5], lambda w: w.split([5, 7])[0]).eval()
    small, record = refit_spoiled(model)
    assert record.error_after < 1e-9
    assert torch.allclose(small.weight[:5], model.weight[:5], atol=1e-3)


@pytest.mark.parametrize("name", ["overlap", "order", "repeated", "whole"])
def test_parts_that_stay_say_why(name: str) -> None:
    first: Any = {"repeated": lambda w: w[:2].repeat(3, 1)}.get(name, lambda w: w[:6])
    second: Any = {
        "overlap": lambda w: w[5:], "order": lambda w: w[:6].flip(0), "repeated": lambda w: w[2:8], "whole": lambda w: w
    }[name]  # fmt: skip
    _, record = refit_spoiled(Twice(first, second).eval())
    reasons = [one.reason for one in record.skipped]
    if name == "order":
        assert reasons == ["'weight' is read by 2 calls, 1 of which could be fitted together"]
    else:
        assert reasons == ["its weight is a part of 'weight' that overlaps with other parts or holds numbers twice"] * (
            1 if name == "repeated" else 2
        )


def test_weight_and_bias_in_one_tensor() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.flat = nn.Linear(6, 16), nn.Parameter(noise(4, 17, seed=1))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(self.first(x).relu(), self.flat[:, :16], self.flat[:, 16])

    torch.manual_seed(0)
    model = Flat().double().eval()
    data = batches((64, 6))
    cut, small, record = fitted(model, data)
    assert not record.skipped
    assert len(small.first.weight) == 8
    assert record.error_after < 0.7 * record.error_before
    assert (small.flat[:, -1] != cut.flat[:, -1]).all()
