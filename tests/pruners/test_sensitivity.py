"""Gradient sensitivity: heads against a mask that is multiplied into the model, rows against a naive loop; float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Attention, Between, Net, classified
from tests.networks.attention import EncoderBlock
from torchshear.calibration._statistics import Statistics
from torchshear.dependency import ChannelGroups
from torchshear.pruners import UnscorableError
from torchshear.pruners.criteria._criterion import find_criterion


def seen(model: nn.Module, *shape: int) -> tuple[ChannelGroups, Statistics]:
    groups = torchshear.analyze(torchshear.trace(model, (torch.zeros(*shape).double(),)))
    return groups, torchshear.collect(groups, classified(*shape), functional.cross_entropy, 4, criteria="sensitivity")


def score(groups: ChannelGroups, statistics: Statistics, role: str) -> Tensor:
    (group,) = [group for group in groups if group.role == role]
    return find_criterion("sensitivity")(group, {}, statistics)


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_heads_are_scored_by_the_gradient_of_a_mask(kv_heads: int) -> None:
    torch.manual_seed(0)
    model = EncoderBlock(kv_heads).double().eval()
    groups, statistics = seen(model, 3, 5, 12)
    masks = []
    for x, target in classified(3, 5, 12):
        xi = torch.ones(kv_heads, 6 // kv_heads, dtype=torch.float64, requires_grad=True)
        masks += torch.autograd.grad(functional.cross_entropy(model(x, xi), target), xi)
    # Query heads, each in all sets that share a key and value head; and these, each with the set that it serves.
    totals = [torch.stack([mask.sum(dim) for mask in masks]).abs().sum(0) for dim in (0, 1)]
    expected = {len(total): total for total in totals if len(total) > 1}
    heads = [group for group in groups if group.role in ("heads", "q_heads", "kv_heads")]
    assert {group.width for group in heads} == expected.keys()
    assert {group.name for group in heads} == statistics.heads.keys()
    for group in heads:
        total = expected[group.width]
        found = find_criterion("sensitivity")(group, {}, statistics)
        np.testing.assert_allclose(found, total / total.square().sum().sqrt(), rtol=1e-9)
        np.testing.assert_allclose(statistics.heads[group.name], total, rtol=1e-9)


def test_of_twelve_heads_the_eight_that_matter_most_stay_in_their_places() -> None:
    torch.manual_seed(0)
    model = Between(lambda h: h.mean(1), Attention(24, 12), nn.Linear(24, 5)).double().eval()
    groups, statistics = seen(model, 3, 5, 24)
    found = score(groups, statistics, "heads")
    assert found.square().sum().item() == pytest.approx(1, rel=1e-12)
    plan = torchshear.plan(groups, "sensitivity", 4 / 12, statistics=statistics, roles="heads")
    (group,) = [group for group in plan.groups if group.width == 12]
    assert group.kept.tolist() == sorted(found.argsort(descending=True)[:8].tolist())


def naive_rows(model: nn.Module, layers: list[str], inputs: list[tuple[Tensor, Tensor]], dim: int = 0) -> list[float]:
    """The definition, row by row and number by number."""
    width = model.get_submodule(layers[0]).weight.shape[dim]
    total = [0.0] * width
    for x, target in inputs:
        loss = functional.cross_entropy(model(x), target)
        for layer in map(model.get_submodule, layers):
            of_weight, of_bias = torch.autograd.grad(loss, (layer.weight, layer.bias), retain_graph=True)
            for j in range(width):
                product = layer.weight.select(dim, j) * of_weight.select(dim, j)
                total[j] += abs(sum(product.flatten().tolist()) + float(layer.bias[j].detach() * of_bias[j]))
    return total


def test_rows_lie_along_any_dimension() -> None:
    """A weight with its inputs first, as in GPT-2, whose bias is an operand before it."""
    torch.manual_seed(0)
    up = nn.Module()
    up.weight, up.bias = nn.Parameter(torch.randn(12, 9)), nn.Parameter(torch.randn(9))
    model = Net(lambda m, x: m.down(torch.tanh(torch.addmm(m.up.bias, x, m.up.weight))), up=up, down=nn.Linear(9, 5))
    groups, statistics = seen(model.double().eval(), 3, 12)
    np.testing.assert_allclose(
        score(groups, statistics, "ffn"), naive_rows(model, ["up"], classified(3, 12), 1), rtol=1e-9
    )


@pytest.mark.parametrize("piece", [1 << 18, 5])
def test_rows_of_blocks_come_one_after_another(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchshear.calibration._sums.PIECE", piece)
    torch.manual_seed(0)
    # Outputs of a transposed convolution in groups are the second dimension of its weight, block by block.
    layers = nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Linear(6, 5)
    model = Between(lambda h: torch.tanh(h).mean((2, 3)), *layers).double().eval()
    groups, statistics = seen(model, 3, 4, 5, 5)
    gates = []
    for x, target in classified(3, 4, 5, 5):  # a gate behind the layer is its rows and its bias
        gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
        output = model.two(model.call(model.one(x) * gate[:, None, None]))
        gates += torch.autograd.grad(functional.cross_entropy(output, target), gate)
    (group,) = groups.prunable
    found = find_criterion("sensitivity")(group, {}, statistics)
    np.testing.assert_allclose(found, torch.stack(gates).abs().sum(0), rtol=1e-9)


def test_units_without_rows_cannot_be_scored() -> None:
    parts = {"one": nn.Parameter(torch.randn(12, 7)), "two": nn.Parameter(torch.randn(7)), "head": nn.Linear(12, 5)}
    model = Net(lambda m, x: m.head(x * (m.one * m.two).mean()), **parts)  # multiplied with one another, and no layer's
    groups, statistics = seen(model.double().eval(), 3, 12)
    assert {member.name for group in groups for member in group.members} == {"one", "two"}
    for group in groups.prunable:
        with pytest.raises(UnscorableError, match="^sensitivity: "):
            find_criterion("sensitivity")(group, {}, statistics)


def test_heads_and_rows_are_ranked_together_beside_their_mean() -> None:
    torch.manual_seed(0)
    model = EncoderBlock().double().eval()
    groups, statistics = seen(model, 3, 5, 12)
    plan = torchshear.plan(groups, "sensitivity", 0.4, statistics=statistics, scope="global", roles=("heads", "ffn"))
    lost = []
    for role in ("heads", "ffn"):
        (group,) = [group for group in groups if group.role == role]
        found = score(groups, statistics, role).numpy()
        lost += [(value / found.mean(), (group.name, unit)) for unit, value in enumerate(found)]
    expected = {where for _, where in sorted(lost)[: int(0.4 * len(lost))]}
    gone = {(group.name, unit) for group in plan.groups for unit in set(range(group.width)) - set(group.kept.tolist())}
    assert gone == expected
