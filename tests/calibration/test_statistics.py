"""Statistics: what is summed, against naive loops over the model itself; and data that does not fit."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.calibration.sums import analysed, batches, collected
from tests.networks import Net, Residual, image, randomise
from tests.networks.plain import GroupedBranch
from torchshear.calibration._statistics import ALL_SUMS, SUMS_OF_GRADIENTS, SUMS_OF_WEIGHTS
from torchshear.calibration._taps import find_taps
from torchshear.calibration._weight_sums import WeightAccumulators
from torchshear.errors import ArgumentError, WeightError


@pytest.fixture
def net() -> nn.Module:
    return randomise(GroupedBranch()).eval()


def test_a_residual_stream_is_seen_behind_the_sum(net: nn.Module) -> None:
    taps = find_taps(analysed(net))["stem.weight[0]"]
    assert len(taps.made) == 2
    assert len(taps.activated) == 2
    assert all(tap.has_zeros for tap in taps.activated)


def weight_sums(net: nn.Module, found: Iterable[Mapping[str, Tensor | None]]) -> dict[str, dict[str, Tensor]]:
    """Sums of gradients by what is summed and parameter, one batch after another."""
    named = {name: p.detach() for name, p in net.named_parameters()}
    sums = {word: {name: torch.zeros_like(p) for name, p in named.items()} for word in SUMS_OF_WEIGHTS}
    for each in found:
        for name, weight in named.items():
            given = each.get(name)
            gradient = torch.zeros_like(weight) if given is None else given
            sums["taylor"][name] += (weight * gradient) ** 2
            sums["saliency"][name] += (weight * gradient).abs()
            sums["momentum"][name] = 0.9 * sums["momentum"][name] + (weight * gradient).abs()
            sums["gradient"][name] += gradient.abs()
    return sums


def test_a_gradient_that_is_not_there_is_zero() -> None:
    """A layer with two outputs, of which a loss may leave one out."""

    def run(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.relu(m.norm(m.stem(x)))
        return m.one(x), m.two(x)

    net = Net(run, stem=nn.Linear(6, 8), norm=nn.LayerNorm(8), one=nn.Linear(8, 3), two=nn.Linear(8, 3))
    net = randomise(net).eval()
    data = [(torch.randn(4, 6), keep) for keep in (True, False, True, False)]

    def loss(outputs: tuple[Tensor, Tensor], keep: bool) -> Tensor:
        return outputs[0].square().mean() + (outputs[1].square().mean() if keep else 0)

    names = [name for name, _ in net.named_parameters()]
    found = [torch.autograd.grad(loss(net(x), keep), list(net.parameters()), allow_unused=True) for x, keep in data]
    expected = weight_sums(net, [dict(zip(names, each, strict=True)) for each in found])
    groups = torchshear.analyze(torchshear.trace(net, (data[0][0],)))
    statistics = torchshear.collect(groups, data, loss, 4)
    for name in names:
        for word, sums in expected.items():
            torch.testing.assert_close(getattr(statistics.weights[name], word), sums[name])


@pytest.mark.parametrize("lines", [{}, {"weight": {0: 0}, "scale": {0: 0}, "bias": {0: 0}}])
def test_only_what_is_not_finite_is_told(lines: dict[str, dict[int, int]]) -> None:
    weights = {"weight": torch.zeros(4, 5), "scale": torch.zeros(4), "bias": torch.ones(4)}
    for spoiled in weights:
        for number in (torch.inf, -torch.inf, torch.nan):
            gradients = {name: torch.ones_like(weight) for name, weight in weights.items()}
            gradients[spoiled].view(-1)[-1] = number
            assert WeightAccumulators(weights, {"taylor"}, lines).add(gradients)[1] == {spoiled}
    large: dict[str, Tensor | None] = {name: torch.full_like(weight, 3e38) for name, weight in weights.items()}
    assert not WeightAccumulators(weights, (), lines).add(large)[1]


@pytest.mark.zoo
def test_a_chain_of_a_thousand_calls() -> None:
    net = nn.Sequential(*(part for _ in range(450) for part in (nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 4)
    groups = torchshear.analyze(torchshear.trace(net, (x,)))
    statistics = torchshear.collect(groups, [x], None, 1, criteria="wanda")
    assert len(statistics.layers) == 451


def test_gates_on_results_that_are_overwritten() -> None:
    """Layers whose results are overwritten, at once and by a view of them."""

    def run(m: Net, x: Tensor, gates: tuple[Tensor, ...] | None = None) -> Tensor:
        y = m.one(x)
        y = y if gates is None else y * gates[0][:, :, None, None]
        y = functional.silu(y, inplace=True)
        z = functional.dropout(m.two(y), 0.5, m.training)
        z = z if gates is None else z * gates[1][:, :, None, None]
        z.flatten(2).mul_(2)
        return m.head(torch.tanh(z).mean((2, 3)))

    net = randomise(Net(run, one=nn.Conv2d(3, 6, 1), two=nn.Conv2d(6, 7, 1), head=nn.Linear(7, 5))).eval()
    _, statistics = collected(net, criteria="group_fisher")
    squares = [torch.zeros(6, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)]
    for x, target in batches():
        gates = (torch.ones(len(x), 6, requires_grad=True), torch.ones(len(x), 7, requires_grad=True))
        found = torch.autograd.grad(functional.cross_entropy(net(x, gates), target), gates)
        squares = [sums + gradient.double().square().sum(0) for sums, gradient in zip(squares, found, strict=True)]
    for name, expected in zip(("one.weight[0]", "two.weight[0]"), squares, strict=True):
        torch.testing.assert_close(statistics.gates[name].squares, expected, rtol=1e-5, atol=1e-10)


def test_inputs_without_a_common_batch_have_gates() -> None:
    parts = {"one": nn.Linear(3, 6), "two": nn.Linear(4, 6), "head": nn.Linear(6, 2)}
    pair = Net(lambda m, x, y: m.head(torch.tanh(m.one(x)).sum(0) * torch.tanh(m.two(y)).sum(0)), **parts)
    data = (torch.randn(5, 3), torch.randn(3, 4))
    groups = torchshear.analyze(torchshear.trace(randomise(pair).eval(), data))
    statistics = torchshear.collect(groups, [data], lambda output, _: output.sum(), 1)
    assert all(bool((sums.squares > 0).all()) for sums in statistics.gates.values())


@pytest.mark.parametrize("size", [4, 8])
def test_gates_find_the_samples_in_any_dimension(size: int) -> None:
    """Linear layers that read sequences with the batch behind the time, and with both in one dimension."""

    def run(m: Net, x: Tensor, gates: tuple[Tensor, Tensor] | None = None) -> Tensor:
        y = m.one(x.transpose(0, 1))  # (time, batch, width)
        y = y if gates is None else y * gates[0]
        y = torch.tanh(y).transpose(0, 1)
        z = m.two(y.reshape(-1, 6))
        z = z if gates is None else z * gates[1].repeat_interleave(x.shape[1], 0)
        return m.head(torch.tanh(z).reshape(*x.shape[:2], 7).mean(1))

    net = randomise(Net(run, one=nn.Linear(3, 6), two=nn.Linear(6, 7), head=nn.Linear(7, 5))).eval()
    groups = torchshear.analyze(torchshear.trace(net, (torch.zeros(2, 8, 3),)))
    x = torch.randn(size, 8, 3, generator=torch.Generator().manual_seed(5))
    target = torch.arange(size) % 5
    statistics = torchshear.collect(groups, [(x, target)], functional.cross_entropy, 1)
    gates = (torch.ones(size, 6, requires_grad=True), torch.ones(size, 7, requires_grad=True))
    found = torch.autograd.grad(functional.cross_entropy(net(x, gates), target), gates)
    for name, gradient in zip(("one.weight[0]", "two.weight[0]"), found, strict=True):
        squares = gradient.double().square().sum(0)
        torch.testing.assert_close(statistics.gates[name].squares, squares, rtol=1e-5, atol=1e-10)


def test_sums_are_the_same_in_any_pieces(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, whole = collected(net)
    monkeypatch.setattr("torchshear.calibration._sums.PIECE", 7)
    pieces = torchshear.collect(groups, batches(), functional.cross_entropy, 3)
    for key, sums in whole.values.items():
        for word in ("zeros", "total", "magnitude", "squares"):
            torch.testing.assert_close(getattr(pieces.values[key], word), getattr(sums, word), rtol=1e-5, atol=1e-6)
    for kind in ("weights", "rows", "gates"):
        for name, one in getattr(whole, kind).items():
            for field in fields(one):
                other = getattr(getattr(pieces, kind)[name], field.name)
                torch.testing.assert_close(other, getattr(one, field.name), rtol=1e-4, atol=1e-9)


def test_only_what_is_asked_for_is_summed(net: nn.Module) -> None:
    _, apoz = collected(net, criteria="apoz")
    assert apoz.sums == {"zeros"}
    assert apoz.loss is None
    assert not apoz.weights
    assert not apoz.gates
    assert all(len(sums.zeros) and not len(sums.squares) for sums in apoz.values.values())
    _, two = collected(net, criteria=["taylor", "wanda"])
    assert two.sums == {"taylor", "inputs"}
    assert all(not len(sums.gradient) for sums in two.weights.values())
    assert all(len(sums.squares) and not len(sums.total) for sums in two.values.values())
    with pytest.raises(ArgumentError, match="criterion 'snip' looks at gradients; give a loss_fn"):
        collected(net, loss_fn=None, criteria=["apoz", "snip"])
    with pytest.raises(ArgumentError, match="criteria=3; expected names of criteria"):
        collected(net, criteria=3)
    _, mine = collected(net, loss_fn=None, criteria=lambda group, weights, statistics: torch.zeros(1))
    assert mine.sums == ALL_SUMS - SUMS_OF_GRADIENTS


def test_nothing_of_the_model_changes(net: nn.Module) -> None:
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    collected(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_arguments_are_checked(net: nn.Module) -> None:
    groups = analysed(net)
    with pytest.raises(ArgumentError, match="batches=0"):
        torchshear.collect(groups, batches(), None, 0)
    with pytest.raises(ArgumentError, match="loss_fn=.mse"):
        torchshear.collect(groups, batches(), "mse", 1)  # type: ignore[arg-type]
    other = torchshear.collect(
        torchshear.trace(randomise(Residual()).eval(), (image(),)), [(image(),)], None, batches=1
    )
    with pytest.raises(ArgumentError, match="statistics are of a network"):
        torchshear.plan(groups, criterion="apoz", statistics=other)
    with pytest.raises(ArgumentError, match="no statistics were given"):
        torchshear.plan(groups, criterion="taylor")
    with pytest.raises(ArgumentError, match="without a loss"):
        torchshear.plan(groups, criterion="taylor", statistics=torchshear.collect(groups, batches(), None, 3))
    with pytest.raises(WeightError, match="meta device"):
        torchshear.collect(analysed(GroupedBranch().to("meta").eval()), batches(), None, 1)


def test_an_endless_loader_is_stopped(net: nn.Module) -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from batches()

    assert torchshear.collect(analysed(net), endless(), None, 5).n_batches == 5
