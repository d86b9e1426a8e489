"""The criterion of what remains after a refit: against least squares on the data itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear.calibration import Statistics, _run
from torchshear.calibration._sums import products_of
from torchshear.dependency import ChannelGroup, ChannelGroups, Member
from torchshear.errors import ArgumentError
from torchshear.pruners import UnscorableError, reconstruction_errors
from torchshear.pruners.criteria import _group_readers, _reconstruction
from torchshear.pruners.criteria._criterion import find_criterion


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TwoReaders(nn.Module):
    """A hidden layer whose units a linear layer reads, and another one by heads of three positions each."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.up(x).relu()
        return self.one(x), self.two(x)


def analysed(model: nn.Module, x: Tensor, loader: list[Tensor]) -> tuple[ChannelGroups, Statistics]:
    graph = torchshear.trace(model.double().eval(), x)
    statistics = torchshear.collect(graph, loader, batches=len(loader), criteria="reconstruction", progress=False)
    return torchshear.analyze(graph), statistics


def group_of(groups: ChannelGroups, width: int) -> ChannelGroup:
    return next(group for group in groups if group.width == width)


IS_HELD_OUT = torch.arange(400) % 4 == 3


def centred(values: Tensor) -> Tensor:
    return values - values.mean(0)


def left_after(inputs: Tensor, weights: list[Tensor], kept: list[int]) -> float:
    """Error of the best refit of linear layers by some of their inputs, relative to the variance of each."""
    u = centred(inputs[~IS_HELD_OUT])
    total = 0.0
    for weight in weights:
        y = u @ weight.T
        solution = torch.linalg.lstsq(u[:, kept], y).solution if kept else u.new_zeros(0, len(weight))
        total += float((y - u[:, kept] @ solution).square().sum() / y.square().sum())
    return total


def loss_after(inputs: Tensor, weight: Tensor, squares: Tensor, kept: list[int]) -> float:
    """Rise of the loss by errors of a layer's outputs on samples held out, fitted to the others at the best ridge."""
    fit, held_out = centred(inputs[~IS_HELD_OUT]), centred(inputs[IS_HELD_OUT])
    gone = [k for k in range(inputs.shape[1]) if k not in kept]
    found = [(held_out[:, gone] @ weight[:, gone].T).square().mean(0) @ squares / 2]
    for ridge in (1e-2, 1e-1, 1.0) if kept else ():
        rows = (ridge * fit[:, kept].square().sum(0)).sqrt().diag()
        added, nothing = torch.cat([fit[:, kept], rows]), torch.zeros(len(kept), len(gone), dtype=torch.float64)
        stand_in = torch.linalg.lstsq(added, torch.cat([fit[:, gone], nothing])).solution
        missing = held_out[:, gone] - held_out[:, kept] @ stand_in
        found.append((missing @ weight[:, gone].T).square().mean(0) @ squares / 2)
    return float(min(found))


def squared_gradients(model: TwoReaders, x: Tensor) -> list[Tensor]:
    """Mean over samples of the squared gradient by each output, of cross-entropy to the largest one."""
    found = []
    for output in (out.detach().requires_grad_() for out in model(x)):
        torch.nn.functional.cross_entropy(output, output.argmax(1), reduction="sum").backward()
        assert output.grad is not None
        found.append(output.grad.square().mean(0))
    return found


def test_errors_are_those_of_least_squares_and_the_least_goes_first() -> None:
    torch.manual_seed(0)
    model = TwoReaders()
    loader = [noise(200, 4, seed=number) for number in range(2)]
    groups, statistics = analysed(model, noise(2, 4), loader)
    group = group_of(groups, 8)
    weights = {name: entry.tensor for name, entry in groups.graph.state.items()}
    order = find_criterion("reconstruction")(group, weights, statistics).argsort().tolist()
    with torch.no_grad():
        inputs = model.up(torch.cat(loader)).relu()
    readers = [model.one.weight.detach(), model.two.weight.detach()]
    squares = squared_gradients(model, loader[0])  # enough samples
    assert torch.allclose(statistics.output_gradients["linear_1"], squares[0], rtol=1e-5)
    errors = reconstruction_errors(groups, statistics)[group.name]
    assert errors.shape == (9,)
    kept, highest = list(range(8)), 0.0
    for number, unit in enumerate(order, 1):
        tried = {one: left_after(inputs, readers, [k for k in kept if k != one]) for one in kept}
        assert tried[unit] == pytest.approx(min(tried.values()), rel=0.02, abs=1e-3)
        kept.remove(unit)
        highest = max(highest, sum(loss_after(inputs, *one, kept) for one in zip(readers, squares, strict=True)))
        assert float(errors[number]) == pytest.approx(highest, rel=1e-3)


def test_without_gradients_errors_are_relative_to_what_a_layer_gives() -> None:
    torch.manual_seed(0)
    model = TwoReaders()
    groups, statistics = analysed(model, noise(2, 4), [noise(400, 4)])
    errors = reconstruction_errors(groups, replace(statistics, output_gradients={}))[group_of(groups, 8).name]
    assert float(errors[8]) == pytest.approx(2, rel=0.2)  # of both layers everything, on other samples


def test_a_model_without_gradients_is_scored_by_errors_alone() -> None:
    """Its output are integers."""

    class Classes(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    torch.manual_seed(0)
    groups, statistics = analysed(Classes(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)), noise(2, 4), [noise(400, 4)])
    assert not statistics.output_gradients
    assert "no gradient flows from the outputs" in statistics.notes[0]
    (errors,) = reconstruction_errors(groups, statistics).values()
    assert float(errors[8]) == pytest.approx(1, rel=0.2)


def test_units_that_are_looked_at_together_go_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 90), nn.ReLU(), nn.Linear(90, 12))
    model[0].weight.data[60:] = model[0].weight[:30]  # a pair of copies must not go at once
    model[0].bias.data[60:] = model[0].bias[:30]
    groups, statistics = analysed(model, noise(2, 6), [noise(400, 6)])
    (together,) = reconstruction_errors(groups, statistics).values()
    monkeypatch.setattr(_reconstruction, "_POOL", 1)
    monkeypatch.setattr(_reconstruction, "_POOL_SHARE", 1000)
    (one_by_one,) = reconstruction_errors(groups, statistics).values()
    assert torch.allclose(together, one_by_one, rtol=1e-3, atol=1e-6)
    assert float(together[30]) < 0.01


def test_layers_with_too_many_inputs_count_them_as_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run, "MAX_GRAM", 7)
    torch.manual_seed(0)
    model = TwoReaders()
    loader = [noise(200, 4)]
    groups, statistics = analysed(model, noise(2, 4), loader)
    (errors,) = reconstruction_errors(groups, statistics).values()
    with torch.no_grad():
        variance = model.up(loader[0]).relu().var(0, correction=0)
    squares = squared_gradients(model, loader[0])
    readers = zip((model.one.weight.detach(), model.two.weight.detach()), squares, strict=True)
    expected = sum(variance * (f @ weight.square()) / 2 for weight, f in readers)
    relative = sum(
        one / one.sum() for one in (variance * w.weight.detach().square().sum(0) for w in (model.one, model.two))
    )
    assert torch.allclose(errors.diff(), expected[relative.argsort()], rtol=1e-4)


def test_products_are_taken_of_places_all_over_a_value() -> None:
    value = torch.arange(12_000.0).reshape(3, 4, 1000, 1)
    found = products_of(value)
    assert found.shape == (2, 2)
    assert int(found[1, 1]) == 1024
    assert float(found[0, 1] / found[1, 1]) == pytest.approx(float(value.mean()), rel=0.01)
    few = noise(50, 3)
    assert torch.allclose(products_of(few)[:3, :3], few.T @ few)


def test_copies_go_first_whatever_their_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3))
    model[0].weight.data[4:] = 5 * model[0].weight[:2]
    model[0].bias.data[4:] = 5 * model[0].bias[:2]
    model.double()
    loader = [noise(8, 3, 6, 6, seed=number) for number in range(2)]
    groups, statistics = analysed(model, noise(2, 3, 6, 6), loader)
    group = group_of(groups, 6)
    plan = torchshear.plan(groups, "reconstruction", 1 / 3, statistics=statistics)
    gone = set(range(6)) - set(next(one for one in plan.groups if one.name == group.name).kept.tolist())
    assert sorted(unit % 4 for unit in gone) == [0, 1]
    errors = reconstruction_errors(groups, statistics)[group.name]
    assert float(errors[2]) < 0.02 * float(errors[3])


@pytest.mark.parametrize(
    ("reader", "shape"),
    [
        (nn.Conv2d(12, 8, 3, groups=2), (8, 3, 6, 6)),
        (nn.Sequential(nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 5, 1)), (8, 3, 6, 6)),
        (nn.ConvTranspose2d(12, 5, 2), (8, 3, 6, 6)),
        (nn.Sequential(nn.AvgPool2d(3), nn.Flatten(), nn.Linear(12 * 4, 5)), (8, 3, 6, 6)),
    ],
    ids=["grouped", "behind a depthwise one", "transposed", "several positions a unit"],
)
def test_every_kind_of_reader(reader: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Tanh(), reader)
    groups, statistics = analysed(model, noise(2, *shape[1:]), [noise(*shape, seed=number) for number in range(12)])
    (relative,) = reconstruction_errors(groups, replace(statistics, output_gradients={})).values()
    assert (relative.diff() >= 0).all()
    assert float(relative[0]) == 0
    assert 0.6 < float(relative[-1]) < 1.4  # of the variance over other samples
    even = {name: torch.full_like(one, 2.0) for name, one in statistics.output_gradients.items()}
    (errors,) = reconstruction_errors(groups, replace(statistics, output_gradients=even)).values()
    factors = errors[1:] / relative[1:]
    assert torch.allclose(factors, factors[-1])


@pytest.mark.parametrize(
    ("shape", "dim", "n_blocks", "outputs"),
    [((5, 4), 1, 0, 0), ((4, 5), 0, 0, 1), ((5, 4, 3, 3), 1, 0, 0), ((4, 5, 3), 0, 0, 1), ((3, 4, 5), 1, 0, 2)],
    ids=["linear", "transposed linear", "convolution", "transposed convolution", "experts"],
)
def test_outputs_are_weighed_along_their_own_dimension(
    shape: tuple[int, ...], dim: int, n_blocks: int, outputs: int
) -> None:
    weight, gradients = noise(*shape), noise(shape[outputs], seed=1).square()
    nothing = np.zeros(0, np.int64)
    member = Member("w", dim, frozenset({"in"}), nothing, nothing, shape[dim], n_blocks)
    by_hand = weight * gradients.sqrt().reshape(-1, *[1] * (len(shape) - outputs - 1))
    weighed = _group_readers._weigh_outputs(member, _group_readers._rows(member, weight), torch.Size(shape), gradients)
    assert torch.allclose(weighed, _group_readers._rows(member, by_hand))


def test_what_no_layer_reads_cannot_be_scored() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    graph = torchshear.trace(model, torch.randn(2, 4))
    groups = torchshear.analyze(graph, prunable_outputs="0")
    statistics = torchshear.collect(graph, [torch.randn(8, 4)], batches=1, criteria="reconstruction", progress=False)
    weights = {name: entry.tensor for name, entry in groups.graph.state.items()}
    with pytest.raises(UnscorableError, match="no layer"):
        find_criterion("reconstruction")(groups[0], weights, statistics)
    assert not reconstruction_errors(groups, statistics)


def test_statistics_for_other_criteria_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = torchshear.trace(model, torch.randn(2, 4))
    statistics = torchshear.collect(graph, [torch.randn(8, 4)], batches=1, progress=False)
    with pytest.raises(ArgumentError, match="grams.*criteria='reconstruction'"):
        torchshear.plan(torchshear.analyze(graph), "reconstruction", 0.5, statistics=statistics)
    other = torchshear.analyze(torchshear.trace(nn.Linear(4, 3), torch.randn(2, 4)))
    with pytest.raises(ArgumentError, match="another network"):
        reconstruction_errors(other, statistics)
