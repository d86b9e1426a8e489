"""Refit of recurrent layers: weights for inputs and states, in every layer and direction."""

import dataclasses
from collections.abc import Callable
from itertools import count
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
from torchshear.speedup.compensation import _recurrent_fit
from torchshear.speedup.compensation._least_squares import RIDGES, fit_linear
from torchshear.speedup.compensation._refit_record import RefittedLayer


class Recurrent(nn.Module):
    """A layer, a recurrent one that gives the outputs, or a classifier behind it."""

    def __init__(self, layer: nn.RNNBase, n_classes: int = 0) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 16), layer
        width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        self.head = nn.Linear(width, n_classes) if n_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.first(x).relu())[0])
        return out


LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(16, 12, batch_first=True),
    "lstm, two layers both ways": lambda: nn.LSTM(16, 12, 2, bidirectional=True, batch_first=True),
    "lstm, projected": lambda: nn.LSTM(16, 12, 2, batch_first=True, proj_size=5),
    "gru": lambda: nn.GRU(16, 12, 2, batch_first=True),
    "gru, time first": lambda: nn.GRU(16, 12, bidirectional=True),
    "rnn": lambda: nn.RNN(16, 12, batch_first=True),
    "rnn, without bias": lambda: nn.RNN(16, 12, nonlinearity="relu", bias=False, batch_first=True),
}

NAMES = "weight_ih", "weight_hh", "bias_ih", "bias_hh"


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def batches(model: nn.Module, n: int = 4) -> list[Tensor]:
    """Sequences of seven steps."""
    is_first = next(module for module in model.modules() if isinstance(module, nn.RNNBase)).batch_first
    return [noise(*((48, 7, 6) if is_first else (7, 48, 6)), seed=100 + number) for number in range(n)]


def halved(model: nn.Module, role: str | None, data: list[Tensor]) -> tuple[Any, Any, Refit]:
    result = torchshear.prune(model, data[0], ratio=0.5, roles=role)
    return result.model, *refit(model, result.model, result.plan, data, batches=len(data), progress=False)


def of_kind(record: Refit, kind: str) -> list[RefittedLayer]:
    return [layer for layer in record.layers if layer.kind == kind]


def held_out(value: Tensor, batch: int) -> Tensor:
    return value.index_select(batch, torch.arange(3, value.shape[batch], 4))


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_recurrent_layer_gives_comes_nearer(name: str) -> None:
    """Its inputs are cut alone, so that the outputs of the model are its own."""
    model = prepared(lambda: Recurrent(LAYERS[name]()))
    data = batches(model)
    cut, small, record = halved(model, "ffn", data)
    layers = of_kind(record, "recurrent")
    assert not record.skipped
    n_each = 2 if model.layer.bidirectional else 1  # type: ignore[union-attr]
    assert [layer.name for layer in layers] == [key for key in model.state_dict() if "weight_ih" in key]
    assert len(layers) == model.layer.num_layers * n_each  # type: ignore[union-attr, operator]
    assert all(layer.error_after < layer.error_before for layer in layers)
    assert "inputs" in layers[0].method
    assert record.is_kept
    batch = 0 if model.layer.batch_first else 1  # type: ignore[union-attr]
    with torch.no_grad():
        for one, expected in ((small, record.error_after), (cut, record.error_before)):
            pairs = [(held_out(one(x), batch), held_out(model(x), batch)) for x in data]
            got, y = (torch.cat(values, batch) for values in zip(*pairs, strict=True))
            if batch == 0:
                found = float((got - y).square().sum() / (y - y.mean(0)).square().sum())
                assert expected == pytest.approx(found, rel=1e-6)
        unseen = [noise(*data[0].shape, seed=seed) for seed in (7, 8)]
        errors = [sum(float((one(x) - model(x)).square().sum()) for x in unseen) for one in (cut, small)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", LAYERS)
def test_hidden_units_are_made_up_for(name: str) -> None:
    model = prepared(lambda: Recurrent(LAYERS[name](), n_classes=4))
    data = batches(model)
    _, _, record = halved(model, "hidden", data)
    layers = of_kind(record, "recurrent")
    if "projected" not in name:  # there the states keep all of their numbers
        assert any("states" in layer.method for layer in layers)
    assert all(layer.error_after <= layer.error_before for layer in layers)
    assert record.is_kept
    assert record.error_after < record.error_before


def test_the_weight_for_inputs_is_that_of_least_squares_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gate gets what it got of all inputs, as far as those that are left tell it."""
    monkeypatch.setattr(_recurrent_fit, "_STEPS", _recurrent_fit._STEPS[:1])
    model: Any = prepared(lambda: Recurrent(nn.LSTM(16, 12, batch_first=True)))
    data = batches(model)
    cut, small, _ = halved(model, "ffn", data)
    with torch.no_grad():
        x = torch.cat(data)
        x = x[torch.arange(len(x)) % 4 != 3].flatten(0, 1)
        full, left = (functional.linear(x, one.first.weight, one.first.bias).relu() for one in (model, small))
        layer = model.layer
        wanted = full @ layer.weight_ih_l0.mT + layer.bias_ih_l0
        found = torch.cat([small.layer.weight_ih_l0, small.layer.bias_ih_l0.unsqueeze(1)], 1)
        assert closest(found, left, wanted, cut.layer.weight_ih_l0) < 1e-6
    assert torch.equal(small.layer.weight_hh_l0, cut.layer.weight_hh_l0)


def ridge_regression(inputs: Tensor, wanted: Tensor, present: Tensor, share: float) -> np.ndarray[Any, Any]:
    """Return weight and shift by NumPy's least squares, with rows that hold the weight to the present one."""
    u, y, held = inputs.numpy(), wanted.numpy(), present.numpy()
    middle, size = u.mean(0), u.shape[1]
    more = np.sqrt(share * np.square(u - middle).sum(0).mean()) * np.eye(size)
    rest = y - y.mean(0) - (u - middle) @ held.T
    rows = np.concatenate([u - middle, more]), np.concatenate([rest, np.zeros((size, len(held)))])
    weight = held + np.linalg.lstsq(*rows, rcond=None)[0].T
    return np.concatenate([weight, (y.mean(0) - weight @ middle)[:, None]], 1)


def closest(found: Tensor, inputs: Tensor, wanted: Tensor, present: Tensor) -> float:
    """Return how near a weight with its shift behind it comes to that of any ridge."""
    return min(float(abs(found.numpy() - ridge_regression(inputs, wanted, present, one)).max()) for one in RIDGES)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_inputs_and_states_are_fitted_by_one_system(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions, against NumPy; in a GRU two of three gates have a sum, the last gets states times another."""
    monkeypatch.setattr(_recurrent_fit, "_STEPS", _recurrent_fit._STEPS[1:2])
    monkeypatch.setattr(_recurrent_fit, "_STIFFER", ())
    errors = (0.5**number for number in count())  # so that each fit is kept
    monkeypatch.setattr(_recurrent_fit.RecurrentFit, "_error", lambda *_: next(errors))
    model: Any = prepared(lambda: Recurrent(kind(16, 12, batch_first=True, bidirectional=True), n_classes=4))
    data = batches(model)
    groups = torchshear.analyze(torchshear.trace(model, data[0]))
    (hidden,) = [group.name for group in groups if group.width == 24]
    plan = plan_from_kept(groups, {hidden: [*range(6), *range(12, 18)]})
    cut: Any = torchshear.shrink(model, plan)
    small, record = refit(model, cut, plan, data, batches=4, progress=False)
    assert record.is_kept
    assert [layer.method for layer in of_kind(record, "recurrent")] == ["least squares of inputs and states"] * 2
    is_fitted = torch.arange(4 * 48) % 4 != 3
    x = model.first(torch.cat(data)).relu().detach()
    out, none = model.layer(x)[0].detach(), x.new_zeros(len(x), 1, 12)
    states = torch.cat([none, out[:, :-1, :12]], 1), torch.cat([out[:, 1:, 12:], none], 1)
    for suffix, before in zip(("l0", "l0_reverse"), states, strict=True):
        w_ih, w_hh, b_ih, b_hh = (getattr(model.layer, f"{name}_{suffix}").detach() for name in NAMES)
        present = [getattr(cut.layer, f"{name}_{suffix}").detach() for name in NAMES]
        found = [getattr(small.layer, f"{name}_{suffix}").detach() for name in NAMES]
        rows = torch.arange(len(w_ih)) % 12 < 6
        u, h = x[is_fitted].flatten(0, 1), before[is_fitted].flatten(0, 1)
        of_inputs, of_states = (u @ w_ih.mT + b_ih)[:, rows], (h @ w_hh.mT + b_hh)[:, rows]
        n = 12 if kind is nn.GRU else len(found[0])
        both = torch.cat([found[0], found[1], (found[2] + found[3]).unsqueeze(1)], 1)
        inputs, start = torch.cat([u, h[:, :6]], 1), torch.cat(present[:2], 1)
        assert closest(both[:n], inputs, (of_inputs + of_states)[:, :n], start[:n]) < 1e-6
        if kind is nn.GRU:
            last = torch.cat([found[0], found[2].unsqueeze(1)], 1), torch.cat([found[1], found[3].unsqueeze(1)], 1)
            assert closest(last[0][n:], u, of_inputs[:, n:], present[0][n:]) < 1e-6
            assert closest(last[1][n:], h[:, :6], of_states[:, n:], present[1][n:]) < 1e-6


def duplicated(model: Any) -> torchshear.PruningPlan:
    """Make the second half of the inputs and of the hidden units copies of the first, and cut it."""
    with torch.no_grad():
        for tensor in (model.first.weight, model.first.bias):
            tensor[8:] = tensor[:8]
        for name, tensor in model.layer.named_parameters():
            gates = tensor.unflatten(0, (-1, 12))
            gates[:, 6:] = gates[:, :6]
            assert torch.equal(gates[:, 6:], gates[:, :6]), name
    groups = torchshear.analyze(torchshear.trace(model, noise(3, 7, 6)))
    kept = {16: list(range(8)), 12: list(range(6))}
    return plan_from_kept(groups, {group.name: kept[group.width] for group in groups if group.width in kept})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_duplicate_inputs_and_units_are_made_up_for_exactly(kind: Any) -> None:
    model = prepared(lambda: Recurrent(kind(16, 12, batch_first=True), n_classes=4))
    plan = duplicated(model)
    cut: Any = torchshear.shrink(model, plan)
    assert cut.layer.hidden_size == 6
    small, record = refit(model, cut, plan, batches(model), batches=4, progress=False)
    x = noise(9, 7, 6, seed=3)
    assert float((cut(x) - model(x)).detach().abs().max()) > 1e-2
    torch.testing.assert_close(small(x), model(x), rtol=1e-6, atol=1e-6)
    assert of_kind(record, "recurrent")[0].method == "least squares of inputs and states"


def test_nothing_changes_where_nothing_is_cut() -> None:
    model = prepared(lambda: Recurrent(LAYERS["lstm, two layers both ways"](), n_classes=4))
    plan = plan_from_kept(torchshear.analyze(torchshear.trace(model, noise(3, 7, 6))), {})
    small, record = refit(model, torchshear.shrink(model, plan), plan, batches(model), batches=4, progress=False)
    assert record.error_before == record.error_after == 0
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in model.state_dict().items())


class Cells(nn.Module):
    """A cell that is stepped by hand, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell = nn.Linear(6, 16), nn.GRUCell(16, 12)
        self.twice, self.head = nn.GRU(12, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        state = x.new_zeros(x.shape[0], 12)
        states = []
        for step in range(2):
            state = self.cell(x[:, step], state)
            states.append(state)
        out: Tensor = self.head(self.twice(self.twice(torch.stack(states, 1))[0])[0])
        return out


def test_recurrent_layers_that_stay_say_why() -> None:
    model = prepared(Cells)
    _, _, record = halved(model, None, [noise(48, 2, 6, seed=seed) for seed in range(4)])
    assert dict.fromkeys((one.name, one.reason) for one in record.skipped) == dict.fromkeys(
        [
            ("cell", "it is a cell of a recurrent layer"),
            ("twice", "its weights are computed, or read by several calls"),
        ]
    )


def test_fits_that_make_it_worse_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(*given: Any) -> Any:
        fit = fit_linear(*given)
        return dataclasses.replace(fit, weight=-fit.weight)

    monkeypatch.setattr(_recurrent_fit, "fit_linear", spoiled)
    model = prepared(lambda: Recurrent(LAYERS["lstm, two layers both ways"]()))
    cut, small, record = halved(model, "ffn", batches(model))
    layers = of_kind(record, "recurrent")
    assert [layer.method for layer in layers] == [""] * 4
    assert record.error_after == record.error_before
    assert all(layer.error_after == layer.error_before > 0 for layer in layers)
    assert all(torch.equal(value, small.layer.state_dict()[key]) for key, value in cut.layer.state_dict().items())
