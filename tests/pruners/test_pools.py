"""Scopes, limits and budgets: what is ranked together, and how exactly targets are met."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Grouped, Residual, image, randomise
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.plans._cut import Cut, dense_cost
from torchshear.errors import ArgumentError, PlanError
from torchshear.pruners import isomorphism_classes, plan_from_kept
from torchshear.pruners.criteria import _criterion
from torchshear.report import make_report


class Blocks(nn.Module):
    """A stem, two equal residual blocks of which one is wider inside, a plain convolution, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.narrow = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1))
        self.wide = nn.Sequential(nn.Conv2d(16, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 16, 3, padding=1))
        self.last = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.narrow(x)
        x = x + self.wide(x)
        return self.head(torch.sigmoid(self.last(x)).mean((2, 3)))


def groups_of(model: nn.Module, x: Tensor | None = None) -> ChannelGroups:
    return torchshear.analyze(torchshear.trace(model, (image() if x is None else x,)))


@pytest.fixture(scope="module")
def blocks() -> ChannelGroups:
    return groups_of(randomise(Blocks()))


@pytest.mark.parametrize(
    ("width", "scales", "left"),
    [
        (3, {1: [0.1, 0.5, 0.9], 3: [0.2, 0.3, -0.8]}, [[1, 2], [2]]),
        (64, {1: torch.linspace(0.001, 0.002, 64)}, [[62, 63], range(62)]),  # 98 % of the first, the rest of the second
    ],
    ids=["mixed", "one of small scales"],
)
def test_slim_ranks_scales_of_all_norms_together(width: int, scales: dict, left: list) -> None:
    body = [nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)]
    model = nn.Sequential(*body, nn.Conv2d(width, 2, 1))
    for layer, values in scales.items():
        model[layer].weight.data.copy_(torch.as_tensor(values))
    plan = torchshear.plan(groups_of(model), "bn_scale", 0.5, scope="global")
    assert [kept.tolist() for kept in plan.kept.values()] == [list(kept) for kept in left]


def test_global_scope_is_a_sort_of_all_scores(blocks: ChannelGroups) -> None:
    plan = torchshear.plan(blocks, "l2", 0.37, scope="global", max_ratio=0.9)
    weights = {name: entry.tensor.detach() for name, entry in blocks.graph.state.items()}
    pool = []
    for number, group in enumerate(blocks.prunable):
        own = [weights[m.name].movedim(m.dim, 0).flatten(1) for m in group.members if m.purposes & {"out"}]
        scores = torch.cat(own, 1).double().norm(dim=1)
        ranked = sorted(range(group.width), key=lambda c, s=scores: (float(s[c]), -c))
        most = int(group.width * 0.9 + 1e-9)
        pool += [(float(scores[c] / scores.mean()), number, rank, c) for rank, c in enumerate(ranked) if rank < most]
    total = sum(group.width for group in blocks.prunable)
    gone = sorted(pool)[: int(total * 0.37 + 1e-9)]
    for number, group in enumerate(blocks.prunable):
        left = set(range(group.width)) - {c for _, of, _, c in gone if of == number}
        assert plan.kept[group.name].tolist() == sorted(left)


def test_isomorphic_scope_ranks_only_equal_structures_together(blocks: ChannelGroups) -> None:
    classes = isomorphism_classes(blocks)
    narrow, wide = "narrow.0.weight[0]", "wide.0.weight[0]"
    assert classes[narrow] == classes[wide]
    assert len(set(classes.values())) == len(classes) - 1
    plan = torchshear.plan(blocks, "l1", 0.5, scope="isomorphic")
    widths = {name: len(kept) for name, kept in plan.kept.items()}
    assert widths[narrow] + widths[wide] == 32
    assert widths["stem.weight[0]"] == 8
    assert widths["last.weight[0]"] == 16


@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
@pytest.mark.parametrize(
    "target", [{"target_macs": 0.4}, {"target_params": 0.7}, {"target_macs": 0.6, "target_params": 0.3}]
)
@pytest.mark.parametrize("align", [None, 4])
def test_a_budget_is_met_as_nearly_as_widths_allow(
    blocks: ChannelGroups, scope: str, target: dict[str, float], align: int | None
) -> None:
    plan = torchshear.plan(blocks, "l1", align=align, scope=scope, **target)  # type: ignore[arg-type]
    dense, left = dense_cost(blocks.graph), Cut(blocks, plan.kept).cost()
    bounds = {"macs": target.get("target_macs", 9), "n_params": target.get("target_params", 9)}

    def holds(cost: object) -> bool:
        return all(getattr(cost, name) <= share * getattr(dense, name) for name, share in bounds.items())

    assert holds(left)
    for group in blocks.prunable:
        kept = plan.kept[group.name]
        if len(kept) == group.width:
            continue
        wider = np.union1d(kept, np.setdiff1d(np.arange(group.width), kept)[: align or 1])
        more = Cut(blocks, plan_from_kept(blocks, plan.kept | {group.name: wider}).kept).cost()
        assert not holds(more), f"{group.name} could be wider"


def test_budgets_are_absolute_above_one_and_reported(blocks: ChannelGroups) -> None:
    dense = dense_cost(blocks.graph)
    plan = torchshear.plan(blocks, target_macs=dense.macs // 2, scope="global")
    assert plan == torchshear.plan(blocks, target_macs=0.5, scope="global")
    report = make_report(plan)
    assert report.target == {"target_macs": dense.macs // 2}
    assert report.requested_ratio is None
    assert f"at most {dense.macs // 2:,} requested (50.0%)" in str(report)
    assert plan.request["target_macs"] == dense.macs // 2
    assert "ratio" not in plan.request


def test_a_mapping_beside_a_target_says_how_fast_groups_shrink(blocks: ChannelGroups) -> None:
    plan = torchshear.plan(blocks, ratio={"wide.0": 0.8, "narrow.0": 0.4}, target_macs=0.6)
    gone = {group.name: 1 - len(group.kept) / group.width for group in plan.groups}
    assert gone["stem.weight[0]"] == gone["last.weight[0]"] == 0
    assert gone["wide.0.weight[0]"] == pytest.approx(2 * gone["narrow.0.weight[0]"], abs=1.5 / 24)


def test_each_key_of_a_mapping_is_a_pool_of_its_own(blocks: ChannelGroups) -> None:
    plan = torchshear.plan(blocks, ratio={"[nw]*.0": 0.5, "stem.weight[0]": 0.25}, scope="global")
    widths = {name: len(kept) for name, kept in plan.kept.items()}
    assert widths["narrow.0.weight[0]"] + widths["wide.0.weight[0]"] == 32
    assert widths["stem.weight[0]"] == 12
    assert widths["last.weight[0]"] == 32


@pytest.mark.parametrize("scope", ["local", "global"])
def test_limits_hold(blocks: ChannelGroups, scope: str) -> None:
    limits = {"min_ratio": {"wide.0": 0.6}, "max_ratio": {"*": 0.4, "wide.0": 0.7}}
    plan = torchshear.plan(blocks, ratio=0.45, scope=scope, **limits)  # type: ignore[arg-type]
    gone = {group.name: 1 - len(group.kept) / group.width for group in plan.groups}
    assert 0.6 <= gone.pop("wide.0.weight[0]") <= 0.7
    assert max(gone.values()) <= 0.4


def test_balanced_blocks_and_minimum_width_hold_in_pools() -> None:
    groups = groups_of(randomise(Grouped()))
    plan = torchshear.plan(groups, target_macs=0.35, scope="global", min_width=6)
    for group in groups.prunable:
        kept = plan.kept[group.name]
        assert len(kept) >= 6
        if group.balance is not None:
            assert len(set(np.bincount(group.balance[kept]).tolist())) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"target_macs": 1e-4},
            r"target_macs: at most .* and the best possible is [\d,]+ \(0\.0\d+\), under min_width=1",
        ),
        ({"target_params": 0.2, "max_ratio": 0.1}, r"target_params: .*max_ratio=0.1"),
        ({"target_macs": 0.3, "exclude": "wide"}, "and 2 groups that stay whole"),
        ({"ratio": 0.99, "scope": "global"}, r"at most \d+ can go \(9\d\.\d%\)"),
        ({"ratio": 0.2, "scope": "global", "min_ratio": 0.5}, "min_ratio takes 56 of them"),
        ({"ratio": 0.2, "min_ratio": 0.9, "align": 64}, "min_ratio=0.9 of group .* cannot be met"),
    ],
)
def test_what_cannot_be_reached_is_said_before_anything_is_scored(
    blocks: ChannelGroups, asked: dict[str, object], message: str
) -> None:
    scored: list[str] = []

    def criterion(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: object) -> Tensor:
        scored.append(group.name)
        return torch.arange(group.width)

    with pytest.raises(PlanError, match=message):
        torchshear.plan(blocks, criterion, **asked)  # type: ignore[arg-type]
    assert not scored


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"scope": "globe"}, r"scope='globe'; expected one of auto, local, global, isomorphic.*Close to it: global"),
        (
            {"group_reduction": "median"},
            "group_reduction='median'; expected one of sum, filters, mean, max, normalized, geometric",
        ),
        ({"normalize": "l2"}, "normalize='l2'"),
        ({"target_macs": 0}, "target_macs=0; expected what may be left"),
        ({"target_params": "half"}, "target_params='half'"),
        ({"target_macs": 1.0}, "target_macs=1.0: the dense model keeps within it already"),
        ({"target_macs": 0.5, "ratio": 0.3}, "both say how much is to go"),
        ({"max_ratio": 1.5}, "max_ratio=1.5"),
        ({"min_ratio": {"nose": 0.1}}, "min_ratio: the key 'nose' decides nothing"),
        ({"min_ratio": 0.5, "max_ratio": 0.2}, "contradict each other"),
        ({"ratio": 0.001, "scope": "global"}, "removes nothing"),
    ],
)
def test_words_that_mean_nothing_are_refused(blocks: ChannelGroups, asked: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        torchshear.plan(blocks, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_where_nothing_is_to_go_all_stays(blocks: ChannelGroups, scope: str) -> None:
    fixed = groups_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    for groups, ratio in ((blocks, 0.0), (blocks, {"*": 0.0}), (fixed, 0.5)):
        plan = torchshear.plan(groups, ratio=ratio, scope=scope)
        assert plan.n_cut == 0
        assert str(make_report(plan))


@pytest.mark.parametrize("word", ["scope", "group_reduction", "normalize", "criterion"])
@pytest.mark.parametrize("given", [["l1", "global"], {}, {"sum"}])
def test_lists_in_place_of_a_word_are_refused(blocks: ChannelGroups, word: str, given: object) -> None:
    with pytest.raises(ArgumentError, match=f"{word}=.*expected one of"):
        torchshear.plan(blocks, **{word: given})  # type: ignore[arg-type]


def test_a_target_of_any_size_is_compared(blocks: ChannelGroups) -> None:
    for target in (10**400, float("inf")):
        with pytest.raises(ArgumentError, match="dense model"):
            torchshear.plan(blocks, target_params=target)


def test_unknown_keywords_are_refused(blocks: ChannelGroups) -> None:
    with pytest.raises(TypeError, match=r"plan\(\) .*'sparsity'; .*groups, criterion, .*scope"):
        torchshear.plan(blocks, sparsity=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("group_reduction", ["mean", "max", "normalized", "geometric"])
def test_members_are_combined_as_asked(group_reduction: str) -> None:
    model = randomise(Residual())
    groups = groups_of(model)
    rows = torch.stack(
        [getattr(model, name).weight.detach().double().flatten(1).abs().sum(1) for name in ("stem", "two")]
        + [model.norm.weight.detach().double().abs()]
    )
    expected = {
        "mean": rows.mean(0),
        "max": rows.max(0).values,
        "normalized": (rows / rows.mean(1, keepdim=True)).mean(0),
        "geometric": rows.log().mean(0).exp(),
    }[group_reduction]
    plan = torchshear.plan(groups, "l1", 0.5, group_reduction=group_reduction)
    stem = plan.kept["stem.weight[0]"]
    assert sorted(stem.tolist()) == sorted(torch.argsort(expected, descending=True)[:4].tolist())


@pytest.mark.parametrize("budget", ["target_macs", "target_params"])
def test_scores_that_are_losses_are_weighed_against_what_a_unit_costs(
    monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    """A channel of a map costs some hundred times the MACs of a hidden unit behind the pooling, and fewer weights."""
    for table in ("_CRITERIA", "_NEEDS"):
        monkeypatch.setattr(_criterion, table, dict(getattr(_criterion, table)))
    for table in ("_COMPARABLE", "_PER_COST"):
        monkeypatch.setattr(_criterion, table, set(getattr(_criterion, table)))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 20),
    )  # fmt: skip
    groups = groups_of(model, torch.randn(2, 3, 20, 20))

    @_criterion.criterion("as_losses", needs=(), comparable=True, per_cost=True)
    def as_losses(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: object) -> Tensor:
        return torch.linspace(1, 1.5, group.width, dtype=torch.float64)

    @_criterion.criterion("as_scores", needs=(), comparable=True)
    def as_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: object) -> Tensor:
        return as_losses(group, weights, statistics)

    def shrunk(criterion: str, **asked: object) -> list[str]:
        plan = torchshear.plan(groups, criterion, **{budget: 0.9}, **asked)
        return [group.name for group in plan.groups if len(group.kept) < group.width]

    first = ["2.weight[0]"] if budget == "target_macs" else ["5.weight[0]"]
    assert shrunk("as_losses") == shrunk("as_losses", scope="global") == first
    assert shrunk("as_losses", scope="local") != first
    assert shrunk("as_losses", ratio={"*": 0.5}) != first  # a mapping says how fast groups shrink
    assert shrunk("as_scores", scope="global") != first
