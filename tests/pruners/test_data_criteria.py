"""Criteria that look at data, norms or distances: oracles, naive loops, permutation, and what they cannot score."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.calibration.sums import analysed, collected
from tests.networks import Net, randomise
from tests.networks.plain import GroupedBranch
from torchshear.calibration._statistics import Statistics
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.pruners import UnscorableError, registered_criteria
from torchshear.pruners.criteria._criterion import find_criterion, needs_of
from torchshear.pruners.selection._scoring import group_scores

GRADIENTS = ("taylor", "taylor_bn", "group_fisher", "snip", "snip_momentum", "gradient")
ALL = tuple(name for name in registered_criteria() if name != "random")


def scores(name: str, groups: ChannelGroups, group: str, statistics: Statistics | None = None) -> Tensor:
    weights = {n: e.tensor for n, e in groups.graph.state.items() if e.kind == "parameter"}
    return find_criterion(name)(groups[group], weights, statistics)


def test_bn_scale_cannot_score_groups_without_a_norm() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(UnscorableError, match="no norm"):
        scores("bn_scale", analysed(plain), "0.weight[0]")
    with pytest.raises(ArgumentError, match="cannot score any of 1 groups"):
        torchshear.plan(analysed(plain), criterion="bn_scale")


def test_a_group_that_cannot_be_scored_stays_whole_and_says_why() -> None:
    groups, statistics = collected(randomise(GroupedBranch(functional.gelu)).eval())
    with pytest.raises(ArgumentError, match="use 'mean_activation'"):
        torchshear.plan(groups, criterion="apoz", statistics=statistics)

    class Half(GroupedBranch):
        def forward(self, x: Tensor) -> Tensor:
            y = functional.relu(self.up_norm(self.up(functional.gelu(self.norm(self.stem(x))))))
            return self.head(functional.gelu(self.down(y)).mean((2, 3)))

    groups, statistics = collected(randomise(Half()).eval())
    plan = torchshear.plan(groups, criterion="apoz", statistics=statistics)
    assert {g.name for g in plan.groups if len(g.kept) < g.width} == {"up.weight[0]"}
    assert any("exact zeros" in g.note for g in plan.groups)


def test_wanda_and_unipruning_see_depthwise_layers() -> None:
    net = randomise(nn.Sequential(nn.Conv2d(4, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 5, 1))).eval()
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    groups = torchshear.analyze(torchshear.trace(net, (x,)))
    (group,) = groups.prunable
    weight, sizes = net[0].weight.detach(), x.square().mean((0, 2, 3)).sqrt()  # type: ignore[union-attr]
    each = (weight.abs().sum((1, 2, 3)) * sizes.repeat_interleave(3)).reshape(4, 3)  # three outputs of each input
    statistics = torchshear.collect(groups, [(x,)], None, 1, criteria="wanda")
    found = scores("wanda", groups, group.name, statistics)
    rows = next(m for m in group.members if m.name == "0.weight")
    expected = torch.zeros(group.width).index_add_(
        0, torch.from_numpy(rows.units), each.flatten()[torch.from_numpy(rows.positions)]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    squares = torch.zeros(group.width).index_add_(
        0, torch.from_numpy(rows.units), weight.square().sum((1, 2, 3))[torch.from_numpy(rows.positions)]
    )
    np.testing.assert_allclose(scores("unipruning", groups, group.name, statistics), squares.sqrt(), rtol=1e-5)


def test_a_weight_that_is_computed_is_not_said_to_lack_an_activation() -> None:
    up, down = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3, 6))
    factored = Net(lambda m, x: functional.linear(x, m.up @ m.down), up=up, down=down)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), factored, nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(4, 5)
    groups = torchshear.analyze(torchshear.trace(net, (x,)))
    statistics = torchshear.collect(groups, [(x,)], None, 1, criteria="apoz")
    plan = torchshear.plan(groups, criterion="apoz", statistics=statistics)
    notes = {g.name: g.note for g in plan.groups}
    assert "no layer that it knows makes its units" in notes["2.up[0]"]
    assert not notes["0.weight[0]"]


def test_wanda_sees_the_inputs_of_a_product_with_its_bias_first() -> None:
    weight, bias = nn.Parameter(torch.zeros(6, 9)), nn.Parameter(torch.zeros(9))
    net = Net(
        lambda m, x: m.head(torch.addmm(m.bias, x, m.weight).relu()), weight=weight, bias=bias, head=nn.Linear(9, 2)
    )
    net, x = randomise(net).eval(), torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    groups = torchshear.analyze(torchshear.trace(net, (x,)))
    expected = (net.weight.detach().abs() * x.square().mean(0).sqrt()[:, None]).sum(0)
    found = scores("wanda", groups, "weight[1]", torchshear.collect(groups, [(x,)], None, 1, criteria="wanda"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_criteria_say_what_they_need(name: str) -> None:
    with pytest.raises(ArgumentError, match="loss_fn"):
        torchshear.plan(analysed(randomise(GroupedBranch()).eval()), criterion=name)


def test_statistics_for_other_criteria_are_refused_with_what_is_missing() -> None:
    groups, statistics = collected(randomise(GroupedBranch()).eval(), criteria="apoz")
    with pytest.raises(ArgumentError, match="for other criteria, without magnitude"):
        torchshear.plan(groups, criterion="mean_activation", statistics=statistics)
    with pytest.raises(ArgumentError, match="without a loss, or for criteria that need none"):
        torchshear.plan(groups, criterion="taylor", statistics=statistics)


@pytest.mark.parametrize("name", ALL)
def test_what_is_collected_for_a_criterion_alone_gives_its_scores(name: str) -> None:
    net = randomise(GroupedBranch()).eval()
    groups, everything = collected(net, criteria=ALL)
    if not needs_of(name):
        with pytest.raises(ArgumentError, match=f"criteria='{name}' look at no data"):
            collected(net, criteria=name)
        return
    _, alone = collected(net, criteria=name)
    assert alone.sums == needs_of(name) < everything.sums
    for group in groups.prunable:
        torch.testing.assert_close(*(scores(name, groups, group.name, one) for one in (alone, everything)))


WHOLE = ("apoz", "mean_activation", "activation_variance", "group_fisher", "retrain_free")  # score no single member
BY_MEMBER = ("l1", "l2", "taylor", "snip", "snip_momentum", "gradient", "fpgm", "wanda", "sensitivity")


@pytest.mark.parametrize(
    ("name", "is_whole"), [*((name, True) for name in WHOLE), *((name, False) for name in BY_MEMBER)]
)
def test_only_scores_of_members_depend_on_how_these_are_combined(name: str, is_whole: bool) -> None:
    groups, statistics = collected(randomise(GroupedBranch()).eval())
    weights = {n: e.tensor for n, e in groups.graph.state.items() if e.kind == "parameter"}

    def scored(group_reduction: str) -> np.ndarray:
        return group_scores(groups["stem.weight[0]"], find_criterion(name), weights, statistics, group_reduction)

    for word in ("mean", "max", "geometric"):
        assert np.allclose(scored(word), scored("sum"), rtol=1e-12 if is_whole else 1e-3) is is_whole
    if is_whole:
        np.testing.assert_allclose(scored("normalized"), scored("sum") / scored("sum").mean(), rtol=1e-12)
