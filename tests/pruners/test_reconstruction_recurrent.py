"""Reconstruction inside recurrent layers: what their weights read, what errors cost there, and which units go."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.pruners.naive_recurrent import Read, Steps, one_step
from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroups
from torchshear.pruners import UnscorableError
from torchshear.pruners.criteria._reconstruction import reconstruction_scores

N, STEPS, INPUTS, HIDDEN = 8, 5, 6, 7
LAYERS = {
    "lstm": lambda: nn.LSTM(INPUTS, HIDDEN, 2, batch_first=True),
    "lstm both ways": lambda: nn.LSTM(INPUTS, HIDDEN, 2, bidirectional=True),
    "gru": lambda: nn.GRU(INPUTS, HIDDEN, 2, batch_first=True),
    "rnn": lambda: nn.RNN(INPUTS, HIDDEN, 2, nonlinearity="relu", bias=True),
}


class LastStates(nn.Module):
    """A recurrent layer of which the final state of the last layer alone is read, as by encoders of speakers."""

    def __init__(self, n_layers: int = 3) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(INPUTS, HIDDEN + 1, n_layers, batch_first=True), nn.Linear(HIDDEN + 1, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, (states, _) = self.lstm(x)
        out: Tensor = self.head(states[-1])
        return out


def sequences(count: int, n_inputs: int = INPUTS) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(count)
    return [(torch.randn(N, STEPS, n_inputs, generator=generator).double(),) for _ in range(count)]


def collected(model: nn.Module, data: list[tuple[Tensor]], loss_fn: Any = None) -> tuple[ChannelGroups, Statistics]:
    graph = torchshear.trace(model, data[0])
    statistics = torchshear.collect(graph, data, loss_fn, criteria="reconstruction", progress=False)
    return torchshear.analyze(graph), statistics


def squared_error(output: Tensor, _: Any = None) -> Tensor:
    return functional.mse_loss(output, torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))


def squares_by_sums(model: Read, x: Tensor, end: str) -> Tensor:
    """Squared gradient by the sums in front of each gate of a layer, by a loop over steps; mean over samples."""
    layer, added = model.layer, {}
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    ends = [f"l{i}{way}" for i in range(layer.num_layers) for way in ["", "_reverse"][: 1 + layer.bidirectional]]
    read, passes = x, {}
    for one in ends:
        h = c = torch.zeros(N, HIDDEN, dtype=x.dtype)
        found: dict[int, Tensor] = {}
        for t in range(STEPS)[:: -1 if one.endswith("reverse") else 1]:
            own = dict(weights)
            if one == end:
                added[t] = torch.zeros(N, len(own[f"bias_ih_{one}"]), dtype=x.dtype, requires_grad=True)
                own[f"bias_ih_{one}"] = own[f"bias_ih_{one}"] + added[t]
            h, c = one_step(layer, one, own, read[:, t], h, c)
            found[t] = h
        passes[one] = torch.stack([found[t] for t in range(STEPS)], 1)
        if one.endswith("reverse") or not layer.bidirectional:
            number = one.removesuffix("_reverse")
            read = torch.cat([value for name, value in passes.items() if name.removesuffix("_reverse") == number], 2)
    last = passes[ends[-1]][:, 0 if layer.bidirectional else -1]
    loss = squared_error(model.head(torch.cat([read.mean(1), last], 1)))
    gradients = torch.autograd.grad(loss, list(added.values()))
    return torch.stack(gradients).mul(N).square().sum((0, 1)) / N


@pytest.mark.parametrize("kind", LAYERS)
def test_what_weights_inside_read_and_what_errors_cost_there(kind: str) -> None:
    torch.manual_seed(0)
    model = Read(LAYERS[kind]()).double().eval()
    data = sequences(1)
    _, statistics = collected(model, data, squared_error)
    seen = Steps(model, data)
    node = next(call.source for call in statistics.layers if ":before 0" in call.source).partition(":")[0]
    for number, end in enumerate(seen.ends):
        sums = statistics.values[f"{node}:before {number}", 2]
        states = torch.cat(seen.before[end])
        assert torch.allclose((sums.grams + sums.held_out)[:-1, :-1], states.T @ states)
        found = statistics.output_gradients[f"{node}:sums {number}"]
        assert torch.allclose(found, squares_by_sums(model, data[0][0], end), rtol=1e-5)
        if number > len(seen.ends) // 2:
            below = torch.cat(seen.read[end])
            sums = statistics.values[f"{node}:read by 1", 2]
            assert torch.allclose((sums.grams + sums.held_out)[:-1, :-1], below.T @ below)


def make_copies(lstm: nn.LSTM, original: int, copy: int) -> None:
    """Let a unit of every layer compute what another does."""
    for name, value in lstm.named_parameters():
        if "weight_hr" not in name:
            value.data.unflatten(0, (4, -1))[:, copy] = value.data.unflatten(0, (4, -1))[:, original]


def test_copies_go_first_in_every_layer() -> None:
    torch.manual_seed(0)
    model = LastStates().double().eval()
    make_copies(model.lstm, 2, 6)
    groups, statistics = collected(model, sequences(8))
    plan = torchshear.plan(groups, "reconstruction", 1 / 8, statistics=statistics)
    small = torchshear.shrink(model, plan)
    assert small.lstm.hidden_size == HIDDEN
    (group,) = plan.groups
    gone = sorted(set(range(3 * (HIDDEN + 1))) - set(group.kept.tolist()))
    assert [unit // (HIDDEN + 1) for unit in gone] == [0, 1, 2]
    assert {unit % (HIDDEN + 1) for unit in gone} <= {2, 6}


def test_final_states_alone_are_enough_from_end_to_end() -> None:
    torch.manual_seed(0)
    model = LastStates().eval()
    data = [(x.float(),) for (x,) in sequences(8)]
    result = torchshear.prune(
        model, data[0], target_macs=0.5, criterion="reconstruction", data=data, compensate="refit"
    )
    assert result.report.after.macs <= 0.5 * result.report.before.macs
    assert result.refit is not None
    assert result.refit.error_after < 0.5 * result.refit.error_before


def test_units_whose_readers_were_not_seen_are_not_free() -> None:
    torch.manual_seed(0)
    model = LastStates(2).double().eval()
    groups, statistics = collected(model, sequences(2))
    weights = {name: entry.tensor for name, entry in groups.graph.state.items()}
    (group,) = groups.prunable
    assert bool((reconstruction_scores(group, weights, statistics) > 0).all())
    last = {key: one for key, one in statistics.values.items() if ":" not in key[0]}
    with pytest.raises(UnscorableError, match="no layer reads its units"):
        reconstruction_scores(group, weights, replace(statistics, values=last))
