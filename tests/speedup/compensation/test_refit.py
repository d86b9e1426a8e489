"""Refit: layers give again what they gave before the cut. Every network is in test_every_network.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import torchshear
from tests.networks import Residual, noise
from torchshear.errors import ArgumentError, DataError, PlanError, WeightError
from torchshear.pruners import plan_from_kept
from torchshear.speedup.compensation._linear_layer import LinearLayer, linear_layer
from torchshear.speedup.compensation._refit import refit
from torchshear.speedup.compensation._stored_parts import StoredParts


def loader(*shape: int, n_batches: int = 4) -> list[tuple[Tensor]]:
    return [(noise(*shape, seed=100 + number),) for number in range(n_batches)]


class Convolutional(nn.Module):
    """Convolutions with and without bias, a norm behind one, a residual, a depthwise one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.outer = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.depthwise(self.inner(x).relu()).relu())
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
    return model


def test_outputs_come_nearer() -> None:
    model = prepared(Convolutional)
    result = torchshear.prune(model, noise(2, 3, 8, 8), ratio=0.5)
    small, record = refit(model, result.model, result.plan, loader(16, 3, 8, 8), batches=4, progress=False)
    assert record.is_kept
    assert record.error_after < 0.5 * record.error_before
    unseen = noise(16, 3, 8, 8, seed=7)
    with torch.no_grad():
        errors = [float((one(unseen) - model(unseen)).square().sum()) for one in (result.model, small)]
    assert errors[1] < errors[0]
    assert (record.n_samples, record.n_held_out) == (48, 16)


def test_weights_are_found_again_from_outputs() -> None:
    model = prepared(Convolutional)
    groups = torchshear.analyze(torchshear.trace(model, noise(2, 3, 8, 8)))
    plan = plan_from_kept(groups, {})
    spoiled = torchshear.shrink(model, plan)
    with torch.no_grad():
        for number, parameter in enumerate(spoiled.parameters()):
            parameter.add_(0.1 * noise(*parameter.shape, seed=number))
    small, record = refit(model, spoiled, plan, loader(32, 3, 8, 8, n_batches=8), batches=8, progress=False)
    assert record.error_before > 1e-3
    assert record.error_after < 1e-8
    for layer in ("inner", "depthwise"):  # behind it some channels are always zero
        expected, found = (one.get_parameter(f"{layer}.weight") for one in (model, small))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_duplicate_channels_are_made_up_for_exactly() -> None:
    model = prepared(Convolutional)
    with torch.no_grad():
        for tensor in (model.inner.weight, model.inner.bias, model.depthwise.weight, model.depthwise.bias):
            tensor[12:] = tensor[:12]
    groups = torchshear.analyze(torchshear.trace(model, noise(2, 3, 8, 8)))
    name = next(group.name for group in groups if group.name.startswith("inner"))
    plan = plan_from_kept(groups, {name: list(range(12))})
    cut = torchshear.shrink(model, plan)
    small, _ = refit(model, cut, plan, loader(16, 3, 8, 8), batches=4, progress=False)
    x = noise(4, 3, 8, 8, seed=3)
    assert float((cut(x) - model(x)).detach().abs().max()) > 1e-2
    torch.testing.assert_close(small(x), model(x), rtol=1e-6, atol=1e-6)


# Each linear operator: what it computes at drawn positions is W u + b, and its matrix becomes its weight again.
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], int]] = {
    "linear": (lambda x, w, b: functional.linear(x, w, b), (4, 3, 6), (5, 6), 5),
    "matmul": (lambda x, w, b: x @ w, (4, 3, 6), (6, 5), 0),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (4, 6), (6, 5), 5),
    "linear of a transposed weight": (lambda x, w, b: functional.linear(x, w.t(), b), (4, 6), (6, 5), 5),
    "experts": (lambda x, w, b: torch.bmm(x, w), (3, 4, 6), (3, 6, 5), 0),
    "one matrix in a batch": (lambda x, w, b: x @ w, (4, 3, 6), (1, 6, 5), 0),
    "conv1d": (lambda x, w, b: functional.conv1d(x, w, b, 2, 1, 2), (4, 6, 15), (5, 6, 3), 5),
    "conv2d": (lambda x, w, b: functional.conv2d(x, w, b, (2, 1), (1, 2)), (4, 6, 7, 8), (5, 6, 3, 2), 5),
    "conv2d, same": (
        lambda x, w, b: functional.conv2d(x, w, b, padding="same", dilation=2), (4, 6, 7, 8), (5, 6, 3, 2), 5
    ),
    "grouped": (lambda x, w, b: functional.conv2d(x, w, b, groups=3), (4, 6, 5, 5), (9, 2, 3, 3), 9),
    "depthwise": (lambda x, w, b: functional.conv2d(x, w, b, padding=1, groups=6), (4, 6, 5, 5), (6, 1, 3, 3), 6),
    "conv3d": (lambda x, w, b: functional.conv3d(x, w, b, 1, 1), (4, 2, 4, 5, 3), (5, 2, 2, 3, 1), 5),
    "transposed": (
        lambda x, w, b: functional.conv_transpose2d(x, w, b, (2, 3), (1, 0), (1, 2), 1, (1, 2)),
        (4, 6, 5, 4),
        (6, 5, 3, 2),
        5,
    ),
    "transposed, grouped": (
        lambda x, w, b: functional.conv_transpose1d(x, w, b, 2, 1, 0, 2), (4, 6, 7), (6, 2, 4), 4
    ),
    "einsum": (lambda x, w, b: torch.einsum("btd,do->bto", x, w), (4, 3, 6), (6, 5), 0),
    "einsum to heads": (lambda x, w, b: torch.einsum("btd,hed->bhte", x, w), (4, 3, 6), (2, 5, 6), 0),
    "einsum of heads": (lambda x, w, b: torch.einsum("hed,bhte->btd", w, x), (4, 2, 3, 5), (2, 5, 6), 0),
    "einsum by head": (lambda x, w, b: torch.einsum("b...hd,hde->b...eh", x, w), (4, 3, 2, 6), (2, 6, 5), 0),
    "einsum, implicit": (lambda x, w, b: torch.einsum("ba,ca", x, w), (4, 6), (5, 6), 0),
    "one sample": (lambda x, w, b: functional.conv1d(x, w, b), (6, 9), (5, 6, 3), 5),
}  # fmt: skip


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor], weight: tuple[int, ...], n_out: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(noise(*weight, seed=1))
        self.bias = nn.Parameter(noise(n_out, seed=2)) if n_out else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


@pytest.mark.parametrize("name", CALLS)
def test_rows_of_every_linear_operator(name: str) -> None:
    function, shape, weight, n_out = CALLS[name]
    model, x = Call(function, weight, n_out), noise(*shape)
    graph = torchshear.trace(model, x)
    state = {name: entry.tensor for name, entry in graph.state.items()}
    parts = StoredParts(graph, graph, state)
    found = [linear_layer(node, node, {}, parts, graph.batch_hint) for node in graph if isinstance(node, fx.Node)]
    (layer,) = [one for one in found if isinstance(one, LinearLayer)]
    matrix = layer.to_matrix(model.weight.detach())
    assert torch.equal(layer.to_weight(matrix, model.weight), model.weight)
    output = model(x).detach()
    taps = model.weight.shape[2:] if layer.n_dims else ()
    for n_rows in (7, 10**6):
        rows = layer.rows(x, output, taps, n_rows, torch.Generator().manual_seed(0), 1)
        assert set(rows.samples.tolist()) == {0}
        assert rows.inputs.shape[1] == len(rows.samples) <= n_rows
        got = rows.inputs @ matrix.mT
        if model.bias is not None:
            got = got + model.bias.detach().reshape(matrix.shape[0], 1, -1)
        torch.testing.assert_close(got, rows.outputs, rtol=1e-12, atol=1e-12)
    assert rows.outputs.numel() == output.numel()


def test_layers_that_stay_as_they_are_say_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 16)
            self.twice = nn.Linear(16, 16)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x).relu()
            x = self.twice(self.twice(x).relu()).relu()
            out: Tensor = self.head(self.normed(x).relu())
            return out

    model = prepared(Odd)
    result = torchshear.prune(model, noise(2, 8), ratio=0.5)
    _, record = refit(model, result.model, result.plan, loader(32, 8), batches=4, progress=False)
    reasons = {one.name: one.reason for one in record.skipped}
    assert reasons["normed"] == "its weight is computed of parameters"
    assert {layer.name for layer in record.layers} == {"one", "twice", "head"}


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, DataError, "the loader gave no batch"),
        (loader(16, 3, 8, 8), {"batches": 9}, DataError, "ended after 4 of 9 batches"),
        ([(torch.full((16, 3, 8, 8), torch.nan).double(),)], {"batches": 1}, DataError, "holds NaN"),
        ([*loader(16, 3, 8, 8), *loader(0, 3, 8, 8)], {"batches": 8}, DataError, "batch 4 holds no sample"),
        (loader(1, 3, 8, 8), {"batches": 4}, DataError, "4 samples; a refit needs at least 8"),
        (loader(16, 3, 9, 9), {"batches": 4}, DataError, r"shape \(16, 3, 9, 9\)"),
        (loader(16, 3, 8, 8), {"batches": 0}, ArgumentError, "batches must be a whole number"),
        (loader(16, 3, 8, 8), {"batches": 4, "progress": "yes"}, ArgumentError, "progress='yes'"),
    ],
)  # fmt: skip
def test_bad_input(data: list[Any], options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = prepared(Convolutional)
    result = torchshear.prune(model, noise(2, 3, 8, 8), ratio=0.5)
    with pytest.raises(error, match=message):
        refit(model, result.model, result.plan, data, **options)


def test_models_that_cannot_be_refitted() -> None:
    model = prepared(Convolutional)
    result = torchshear.prune(model, noise(2, 3, 8, 8), ratio=0.5)
    with pytest.raises(PlanError):
        refit(Residual().double(), result.model, result.plan, loader(16, 3, 8, 8), batches=4)
    with pytest.raises(WeightError, match="meta device"):
        refit(model, result.model.to("meta"), result.plan, loader(16, 3, 8, 8), batches=4)


def test_constant_inputs_and_few_samples_make_nothing_worse() -> None:
    model = prepared(Convolutional)
    result = torchshear.prune(model, noise(2, 3, 8, 8), ratio=0.5)
    for data in ([(torch.ones(8, 3, 8, 8).double(),)], [(noise(8, 3, 8, 8, seed=5),)]):
        small, record = refit(model, result.model, result.plan, data, batches=1, progress=False)
        assert record.error_after <= record.error_before
        assert all(layer.error_after <= layer.error_before for layer in record.layers)
        assert all(bool(tensor.isfinite().all()) for tensor in small.state_dict().values())


def test_methods_stage_by_stage() -> None:
    model = prepared(Convolutional)
    x = noise(2, 3, 8, 8)
    result = torchshear.prune(model, x, ratio=0.5)
    held = {key: value.clone() for key, value in result.model.state_dict().items()}
    data = loader(16, 3, 8, 8)

    def compensated(method: Any, *given: Any) -> nn.Module:
        return torchshear.compensate(model, result.model, result.plan, *given, method=method, batches=4, progress=False)

    expected = {
        "refit": refit(model, result.model, result.plan, data, batches=4, progress=False)[0],
        "statistics": torchshear.recalibrate(result.model, data, 4, progress=False),
        "constants": torchshear.compensate(model, result.model, result.plan, method="constants"),
        "means": torchshear.prune(model, x, ratio=0.5, compensate="means", data=data, batches=4).model,
    }
    for method, other in expected.items():
        found = compensated(method, *([] if method == "constants" else [data])).state_dict()
        assert all(torch.equal(found[key], value) for key, value in other.state_dict().items())
        assert any(not torch.equal(found[key], value) for key, value in held.items())
    assert all(torch.equal(held[key], value) for key, value in result.model.state_dict().items())
    with pytest.raises(ArgumentError, match="method='refits'"):
        compensated("refits", data)
    with pytest.raises(ArgumentError, match="method='refit' .*loader="):
        compensated("refit")
    with pytest.raises(ArgumentError, match="method='constants' runs no data"):
        compensated("constants", data)
