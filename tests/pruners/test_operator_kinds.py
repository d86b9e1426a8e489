"""Criteria over recurrent layers and expert tensors, against loops over steps, tokens and experts in float64."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Net, randomise
from tests.networks.experts import CHOSEN, INNER, TOKENS, WIDTH, Mixture
from tests.pruners.naive_recurrent import RECURRENT, Read, Steps, loss_of, root_mean_squares, variance
from tests.pruners.scoring import score, weights_of
from torchshear.calibration._statistics import Statistics
from torchshear.dependency import ChannelGroup, ChannelGroups, operator_rule, unregister
from torchshear.dependency.rules._choosing import grouped_product
from torchshear.pruners import UnscorableError
from torchshear.pruners.criteria._criterion import find_criterion
from torchshear.pruners.selection._scoring import group_scores

STEPS, INPUTS, HIDDEN = 4, 5, 3


def random_data(*shape: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64),) for _ in range(3)]


KINDS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(INPUTS, HIDDEN),
    "lstm of two layers both ways": lambda: nn.LSTM(INPUTS, HIDDEN, 2, batch_first=True, bidirectional=True),
    "gru without biases": lambda: nn.GRU(INPUTS, HIDDEN, 3, bias=False),
    "rnn both ways": lambda: nn.RNN(INPUTS, HIDDEN, bidirectional=True, batch_first=True),
    "rnn with relu": lambda: nn.RNN(INPUTS, HIDDEN, 2, nonlinearity="relu"),
    "projected lstm": lambda: nn.LSTM(INPUTS, HIDDEN + 2, 2, proj_size=2, bidirectional=True),
}


@cache
def recurrent(kind: str) -> tuple[Steps, ChannelGroups, Statistics]:
    model = randomise(Read(KINDS[kind]())).double().eval()
    data = random_data(3, STEPS, INPUTS)
    groups = torchshear.analyze(torchshear.trace(model, data[0]))
    return Steps(model, data), groups, torchshear.collect(groups, data, loss_of, len(data))


def units_of(groups: ChannelGroups, weight: str) -> tuple[ChannelGroup, list[int]]:
    """The group in which rows of a weight lie, and its units in order of the first gate's rows."""
    for group in groups:
        for member in group.members:
            if (member.name, member.dim) == (weight, 0):
                return group, list(dict.fromkeys(member.units.tolist()))
    raise AssertionError(weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_scored_by_what_each_gives_at_every_step(name: str, kind: str) -> None:
    seen, groups, statistics = recurrent(kind)
    of_weights = name in ("fpgm", "wanda", "sensitivity")
    is_projected = seen.layer.proj_size > 0 and not of_weights
    refused = 0
    for end in seen.ends:
        group, units = units_of(groups, f"layer.weight_{'hr' if is_projected else 'ih'}_{end}")
        try:
            found = score(name, groups, group, statistics)[units]
        except UnscorableError:
            refused += 1
            continue
        expected = [RECURRENT[name](seen, end, c) for c in range(len(units))]
        np.testing.assert_allclose(found, expected, rtol=1e-5 if name == "fpgm" else 1e-8)
    assert refused == (len(seen.ends) if name == "apoz" and kind != "rnn with relu" else 0)


@pytest.mark.parametrize("name", ["mean_activation", "activation_variance", "group_fisher", "retrain_free"])
def test_hidden_units_behind_a_projection_are_not_shown(name: str) -> None:
    _, groups, statistics = recurrent("projected lstm")
    group, _ = units_of(groups, "layer.weight_ih_l0")
    assert group.is_prunable
    with pytest.raises(UnscorableError, match=f"^{name}: "):
        score(name, groups, group, statistics)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrent_call_gives_the_same_when_it_is_looked_into(kind: str) -> None:
    seen, _, statistics = recurrent(kind)
    assert statistics.loss == pytest.approx(sum(seen.losses) / len(seen.losses), rel=1e-12)


def cell_network(cell: nn.RNNCellBase) -> Net:
    """A cell that is called once a step."""

    def run(m: Net, x: Tensor) -> Tensor:
        state: Any = None
        found = []
        for step in x.unbind(1):
            state = m.cell(step, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return m.head(torch.stack(found, 1).mean(1))

    return Net(run, cell=cell, head=nn.Linear(HIDDEN, 3))


@pytest.mark.parametrize("name", ["mean_activation", "activation_variance", "wanda", "fpgm"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_cells_are_scored_like_layers(kind: type[nn.RNNBase], name: str) -> None:
    layer = randomise(Read(kind(INPUTS, HIDDEN, batch_first=True))).double().eval()
    cell = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}[kind](INPUTS, HIDDEN)
    cells = cell_network(cell).double().eval()
    cells.cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.layer.state_dict().items()})
    data = random_data(3, STEPS, INPUTS)
    groups = torchshear.analyze(torchshear.trace(cells, data[0]))
    statistics = torchshear.collect(groups, data, loss_of, len(data))
    (group,) = groups.prunable
    expected = [RECURRENT[name](Steps(layer, data), "l0", c) for c in range(HIDDEN)]
    np.testing.assert_allclose(score(name, groups, group, statistics), expected, rtol=1e-5 if name == "fpgm" else 1e-8)


@pytest.fixture(autouse=True)
def _with_rule() -> Iterator[None]:
    operator_rule("experts.runs")(grouped_product)
    yield
    unregister("experts.runs")


class Tokens:
    """A mixture as a loop over tokens and the experts that each chooses, in which gates multiply what experts make."""

    def __init__(self, model: Mixture, data: list[tuple[Tensor]]) -> None:
        self.up, self.down = model.gate_up.detach(), model.down.detach()
        self.silu: list[Tensor] = []  # of the half that has an activation, one line a token and expert
        self.read: list[Tensor] = []
        self.made: list[Tensor] = []  # results of every expert that was chosen, and of the one that is shared
        self.gates: list[Tensor] = []
        self.gradients: list[Tensor] = []
        for (x,) in data:
            gates = torch.ones(len(x), INNER, dtype=x.dtype, requires_grad=True)
            up = self.up.clone().requires_grad_()
            output = torch.stack([self.token(model, row, up, gate) for row, gate in zip(x, gates, strict=True)])
            gradients = torch.autograd.grad(loss_of(output), [gates, up])
            self.gates.append(gradients[0])
            self.gradients.append(gradients[1])

    def token(self, model: Mixture, x: Tensor, up: Tensor, gate: Tensor) -> Tensor:
        x = model.stem(x)
        shares, chosen = model.router(x).softmax(0).topk(CHOSEN)
        shared = model.shared(x)
        self.made.append(shared.detach()[None])
        out = shared * model.shared_gate(x).sigmoid()
        for share, expert in zip(shares, chosen.tolist(), strict=True):
            one, other = (x @ up[expert] * gate.repeat(2)).chunk(2)
            hidden = torch.nn.functional.silu(one) * other
            made = hidden @ self.down[expert]
            self.made.append(made.detach()[None])
            out = out + share * made
            self.silu.append(torch.nn.functional.silu(one).detach()[None])
            self.read.append(x.detach()[None])
        return model.head(out)


def matrix(seen: Tokens, c: int) -> list[float]:
    """Weights of all experts that make inner channel c, of both halves."""
    return seen.up[:, :, [c, c + INNER]].permute(2, 0, 1).flatten().tolist()


def expert_wanda(seen: Tokens, c: int) -> float:
    sizes = root_mean_squares(seen.read)
    columns = [seen.up[e, :, at] for e in range(len(seen.up)) for at in (c, c + INNER)]
    return sum(abs(float(w)) * size for column in columns for w, size in zip(column, sizes, strict=True))


def expert_sensitivity(seen: Tokens, c: int) -> float:
    rows = [(seen.up * g)[:, :, at].sum() for g in seen.gradients for at in (c, c + INNER)]
    return sum(abs(float(row)) for row in rows)


EXPERT: dict[str, Callable[[Tokens, int], float]] = {
    "l1": lambda seen, c: sum(map(abs, matrix(seen, c))),
    "unipruning": lambda seen, c: math.sqrt(sum(w * w for w in matrix(seen, c))),
    "fpgm": lambda seen, c: sum(math.dist(matrix(seen, c), matrix(seen, j)) for j in range(INNER)),
    "sensitivity": expert_sensitivity,
    "taylor": lambda seen, c: sum(
        float((seen.up[:, :, at] * g[:, :, at]).square().sum()) for g in seen.gradients for at in (c, c + INNER)
    ),
    "retrain_free": lambda seen, c: sum(float(g[:, c].sum()) ** 2 for g in seen.gates),
    "group_fisher": lambda seen, c: sum(float(g) ** 2 for gates in seen.gates for g in gates[:, c]),
    "mean_activation": lambda seen, c: float(torch.cat(seen.silu)[:, c].abs().mean()),
    "activation_variance": lambda seen, c: variance(torch.cat(seen.silu)[:, c].tolist()),
    "wanda": expert_wanda,
}
OF_ALL_EXPERTS = ("mean_activation", "activation_variance")  # see what experts make for tokens that do not choose them


@cache
def mixture(dispatch: str) -> tuple[Tokens, ChannelGroups, Statistics]:
    torch.manual_seed(0)
    model = Mixture("softmax_then_topk", dispatch).double().eval()
    data = random_data(TOKENS, WIDTH)
    groups = torchshear.analyze(torchshear.trace(model, data[0]))
    return Tokens(model, data), groups, torchshear.collect(groups, data, loss_of, len(data))


@pytest.mark.parametrize(
    ("name", "dispatch"),
    [(name, way) for name in EXPERT for way in ("dense", "picked") if way == "picked" or name not in OF_ALL_EXPERTS],
)
def test_inner_channels_of_experts_are_scored_over_all_experts(name: str, dispatch: str) -> None:
    seen, groups, statistics = mixture(dispatch)
    expected = [EXPERT[name](seen, c) for c in range(INNER)]
    found = score(name, groups, groups["gate_up[2]"], statistics)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if name == "fpgm" else 1e-8)


@pytest.mark.parametrize("name", OF_ALL_EXPERTS)
def test_what_picked_experts_make_is_seen_and_not_their_weights(name: str) -> None:
    seen, groups, statistics = mixture("picked")
    (group,) = [one for one in groups if ("down", 2) in {(member.name, member.dim) for member in one.members}]
    values = torch.cat(seen.made).T.tolist()
    expected = {
        "mean_activation": [sum(map(abs, line)) / len(line) for line in values],
        "activation_variance": [variance(line) for line in values],
    }
    np.testing.assert_allclose(score(name, groups, group, statistics), expected[name], rtol=1e-8)


def test_fpgm_compares_the_filters_of_a_grouped_transposed_convolution() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), nn.Conv2d(6, 4, 1))
    model = randomise(model).double().eval()
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(3, 4, 4, 4, dtype=torch.float64),)))
    weight = model[0].weight.detach()  # (4, 3, 2, 2): channel c of block b is made by the rows of block b
    made = [weight[2 * b : 2 * b + 2, c].flatten().tolist() for b in range(2) for c in range(3)]
    group = groups["0.weight[1]"]
    found = group_scores(group, find_criterion("fpgm"), weights_of(groups), None)
    np.testing.assert_allclose(found, [sum(math.dist(one, other) for other in made) for one in made], rtol=1e-5)


def twice() -> Net:
    """One matrix that two products read, of which one sees numbers a hundred times as large."""
    return Net(
        lambda m, x: m.head(torch.tanh(m.shared(x)) + torch.tanh(m.shared(100 * x))),
        shared=nn.Linear(3, 4, bias=False),
        head=nn.Linear(4, 2),
    )


def test_wanda_means_what_all_calls_read() -> None:
    model, data = randomise(twice()).double().eval(), random_data(3, 3)
    groups = torchshear.analyze(torchshear.trace(model, data[0]))
    statistics = torchshear.collect(groups, data, batches=3)
    (group,) = groups.prunable
    sizes = root_mean_squares([x * factor for (x,) in data for factor in (1, 100)])
    expected = [sum(abs(w) * s for w, s in zip(row, sizes, strict=True)) for row in model.shared.weight.tolist()]
    np.testing.assert_allclose(score("wanda", groups, group, statistics), expected, rtol=1e-8)
