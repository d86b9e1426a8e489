"""Dependency-aware pruning: the common part, the extra part, filter groups, and what cannot be removed."""

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Net, image, randomise
from torchshear.compat.nni import DependencyAwarePlan, plan_dependency_aware
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.pruners import UnscorableError


class Branches(nn.Module):
    """Two convolutions whose results are added, the second in filter groups if asked."""

    def __init__(self, width: int, n_groups: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, width, 3, padding=1)
        self.before = nn.Conv2d(3, 8, 1)
        self.two = nn.Conv2d(8, width, 3, padding=1)
        self.grouped = nn.Conv2d(width, width, 1, groups=n_groups)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.relu(self.one(x) + self.two(torch.relu(self.before(x))))
        return self.head(torch.relu(self.grouped(both)))


def planned(width: int, n_groups: int, ratios: dict[str, float], **asked: str) -> tuple[DependencyAwarePlan, nn.Module]:
    model = randomise(Branches(width, n_groups)).eval()
    groups: ChannelGroups = torchshear.analyze(torchshear.trace(model, (image(),)))
    return plan_dependency_aware(groups, ratios, **asked), model


def lost(plan: DependencyAwarePlan, layer: str) -> set[int]:
    mask = plan.masks[f"{layer}.weight"]
    return set(torch.nonzero(~mask.flatten(1).any(1)).flatten().tolist())


def test_common_part_by_the_sum_and_extra_part_by_the_layers_own_scores() -> None:
    plan, model = planned(50, 1, {"one": 0.3, "two": 0.2})
    norms = {n: getattr(model, n).weight.detach().double().abs().flatten(1).sum(1) for n in ("one", "two")}
    common = set(torch.argsort(norms["one"] + norms["two"])[:10].tolist())
    rest = [c for c in torch.argsort(norms["one"]).tolist() if c not in common]
    assert lost(plan, "two") == common
    assert lost(plan, "one") == common | set(rest[:5])
    assert not plan.masks["one.bias"][rest[:5]].any()
    rows = {row.layer: row for row in plan.layers}
    assert (rows["one"].common, rows["one"].extra) == (10, 5)
    assert (rows["two"].common, rows["two"].extra) == (10, 0)
    assert rows["one"].params == 5 * 27
    assert rows["one"].macs == 5 * 27 * 64


class Activated(Branches):
    """Each convolution has an activation of its own in front of the sum, or both have one behind it."""

    def __init__(self, width: int, is_shared: bool) -> None:
        super().__init__(width)
        self.is_shared = is_shared

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(torch.relu(self.before(x)))
        both = torch.relu(one + two) if self.is_shared else torch.relu(one) + torch.relu(two)
        return self.head(both)


@pytest.mark.parametrize("criterion", ["apoz", "mean_activation"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_activations_are_those_of_the_layer_itself(criterion: str, is_shared: bool) -> None:
    model = randomise(Activated(20, is_shared)).eval()
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    statistics = torchshear.collect(groups, [(x,)], None, 1, False, criteria=criterion)
    plan = plan_dependency_aware(groups, {"one": 0.5, "two": 0.2}, criterion, statistics=statistics)
    with torch.no_grad():
        made = {"one": model.one(x).relu(), "two": model.two(model.before(x).relu()).relu()}
    own = {n: ((a > 0) if criterion == "apoz" else a).double().mean((0, 2, 3)) for n, a in made.items()}
    common = set((own["one"] + own["two"]).argsort()[:4].tolist())
    rest = [c for c in own["one"].argsort().tolist() if c not in common]
    assert lost(plan, "two") == common
    assert lost(plan, "one") == common | set(rest[:6])


def test_only_the_common_part_is_removed() -> None:
    plan, model = planned(50, 1, {"one": 0.3, "two": 0.2})
    small = torchshear.shrink(model, plan.plan)
    assert small.one.weight.shape[0] == 40
    torchshear.verify(model, small, plan.plan, args=(image(),))


@pytest.mark.parametrize(("ratio", "common"), [(0.5, 8), (0.3, 4), (0.2, 0)])
def test_filter_groups_lose_equally_many(ratio: float, common: int) -> None:
    plan, _ = planned(16, 4, {"one": 0.8, "two": ratio})
    kept = plan.plan.kept["one.weight[0]"]
    assert len(kept) == 16 - common
    assert torch.bincount(torch.from_numpy(kept) // 4).tolist() == [4 - common // 4] * 4
    gone = torch.tensor(sorted(lost(plan, "one")))
    assert torch.bincount(gone // 4, minlength=4).tolist() == [3] * 4
    notes = {row.layer: row.note for row in plan.layers}
    assert notes["one"] == "" if ratio == 0.8 else notes["one"] in ("", "12 were asked for")
    if ratio == 0.2:
        assert notes["two"] == "3 rounded down to equal numbers in 4 filter groups"


def test_a_layer_of_which_nothing_is_said_keeps_its_whole_set() -> None:
    plan, _ = planned(16, 1, {"one": 0.5})
    assert plan.plan.n_cut == 0
    rows = {row.layer: row for row in plan.layers}
    assert (rows["one"].common, rows["one"].extra) == (0, 8)
    assert rows["two"].note == "nothing was asked of it, so nothing goes in common"
    assert "8 channels are masked in single layers and stay" in str(plan)


def test_layers_that_cannot_be_scored_stay_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1), nn.ReLU())
    model.append(nn.Conv2d(4, 2, 1))
    groups = torchshear.analyze(torchshear.trace(randomise(model).eval(), (image(),)))
    statistics = torchshear.collect(groups, [(image(),)], None, 1, criteria="apoz")
    plan = plan_dependency_aware(groups, {"0": 0.5, "2": 0.5, "3": 0.5}, "apoz", statistics=statistics)
    rows = {row.layer: row for row in plan.layers}
    assert (rows["0"].common, rows["2"].common, rows["3"].common) == (4, 0, 2)
    assert rows["2"].note.startswith("stays whole: apoz: no activation behind its layers")
    with pytest.raises(UnscorableError, match=r"'2', of group '2.weight\[0\]'"):
        plan_dependency_aware(groups, {"2": 0.5}, "apoz", statistics=statistics)


def test_the_extra_part_can_be_dropped() -> None:
    plan, _ = planned(16, 1, {"one": 0.5, "two": 0.25}, extra="drop")
    assert lost(plan, "one") == lost(plan, "two")
    assert sum(row.extra for row in plan.layers) == 0
    assert {row.layer: row.note for row in plan.layers}["one"] == "8 were asked for"


def test_layers_of_a_recurrent_call_are_counted_by_their_own_units() -> None:
    model = nn.LSTM(3, 8, num_layers=2, batch_first=True)
    groups = torchshear.analyze(torchshear.trace(last(model), (torch.randn(2, 4, 3),)))
    plan = plan_dependency_aware(groups, {"cells.weight_ih_l0": 0.5, "cells.weight_hh_l1": 0.25})
    row = {one.layer: one for one in plan.layers}["cells.weight_ih_l0"]
    assert (row.width, row.common, row.extra, row.note) == (8, 0, 4, "")
    assert row.params == 4 * 4 * 3
    assert (~plan.masks["cells.weight_ih_l0"]).sum() == row.params


def last(cells: nn.Module) -> Net:
    """The last value of recurrent cells, and a classifier."""
    return Net(lambda m, x: m.head(m.cells(x)[0][:, -1]), cells=cells, head=nn.Linear(8, 3))


@pytest.mark.parametrize("ratios", [None, [], 0.5, {3: 0.5}])
def test_ratios_that_are_no_mapping_of_names_are_refused(ratios: object) -> None:
    groups = torchshear.analyze(torchshear.trace(last(nn.LSTM(3, 8, batch_first=True)), (torch.randn(2, 4, 3),)))
    with pytest.raises(ArgumentError, match="ratios.*expected"):
        plan_dependency_aware(groups, ratios)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratios", "asked", "message"),
    [
        ({"tow": 0.5}, {}, r"ratios: 'tow' is no layer whose channels can go. Close to it: two"),
        ({"head": 0.5}, {}, "ratios: 'head' is no layer"),
        ({"one": 1.0}, {}, r"ratios\['one'\]=1.0"),
        ({"one": 0.5, "one.weight": 0.2}, {}, "two entries for 'one.weight'"),
        ({"one": 0.5}, {"extra": "keep"}, "extra='keep'; expected one of apply, drop"),
    ],
)
def test_what_means_nothing_is_refused(ratios: dict[str, float], asked: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        planned(16, 1, ratios, **asked)
