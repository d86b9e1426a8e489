"""Groups are left whole where only that keeps a model's own class, if it costs little; plans replay it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Between, analyzed, randomise
from tests.oracle import assert_equals_masked, assert_is_slice
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._form import Form
from torchshear.errors import ArgumentError, PlanError
from torchshear.speedup import TracedModule, shrink_to_form
from torchshear.speedup.native._form import Native
from torchshear.speedup.shrinking._prepared_cut import PreparedCut
from torchshear.speedup.shrinking._whole_groups import NativeTradeoff, leave_groups_whole

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """As in YOLO11: what comes out has the width of the stream, however many heads of whatever width there are."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head, self.key = heads, width // heads, width // heads // 2
        self.qkv = nn.Conv2d(width, width + 2 * self.key * heads, 1)
        self.leave = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(x).view(b, self.heads, 2 * self.key + self.head, h * w)
        q, k, v = qkv.split([self.key, self.key, self.head], 2)
        shares = (q.transpose(-2, -1) @ k * 0.25).softmax(-1)
        return self.leave((v @ shares.transpose(-2, -1)).view(b, c, h, w))


class Detector(nn.Module):
    """Much convolution around two small attentions."""

    def __init__(self, wide: int = 96) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, wide, 3), nn.ReLU(), nn.Conv2d(wide, wide, 3), nn.ReLU())
        self.enter = nn.Conv2d(wide, 16, 1)
        self.blocks = nn.ModuleList(Attention(16, 2) for _ in range(2))
        self.leave = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


@pytest.fixture(scope="module")
def model() -> Detector:
    return randomise(Detector().eval(), 3)


@pytest.fixture(scope="module")
def result(model: Detector) -> torchshear.PruneResult:
    return torchshear.prune(model, (IMAGE,))


@pytest.fixture(scope="module")
def traced(model: Detector) -> torchshear.PruneResult:
    return torchshear.prune(model, (IMAGE,), form="traced")


@pytest.fixture(scope="module")
def groups(model: Detector) -> ChannelGroups:
    return analyzed(model, IMAGE)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_class_is_kept_at_little_cost(
    model: Detector, result: torchshear.PruneResult, traced: torchshear.PruneResult
) -> None:
    assert type(result.model) is Detector
    assert_equals_masked(model, result.model, result.plan, (IMAGE,))
    assert_is_slice(model, result.model, result.plan)
    smallest = size(traced.model)
    assert smallest < size(result.model) <= smallest + 0.1 * (size(model) - smallest)


def test_the_report_says_which_groups_stay_whole_and_what_that_costs(result: torchshear.PruneResult) -> None:
    assert "groups left whole for that" in result.report.form
    assert "of what the cut saves" in result.report.form
    whole = [group for group in result.report.groups if "keeps its own class" in group.note]
    assert len(whole) == 2  # the same in both blocks
    assert all(group.kept == group.width and repr(group.name) in result.report.form for group in whole)
    assert result.report.requested_ratio == result.report.achieved_ratio == 0.5


def test_a_plan_replays_it_without_a_search(
    model: Detector, result: torchshear.PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.plan.save(tmp_path / "plan.json")
    monkeypatch.setattr("torchshear.speedup.shrinking._prepared_cut.native_form", None)
    plan = torchshear.PruningPlan.load(tmp_path / "plan.json")
    again = torchshear.shrink(randomise(Detector().eval(), 9), plan)
    again.load_state_dict(result.model.state_dict())
    assert torch.equal(again(IMAGE), result.model(IMAGE))


def test_a_target_is_met_all_the_same(model: Detector) -> None:
    result = torchshear.prune(model, (IMAGE,), target_macs=0.3)
    assert type(result.model) is Detector
    assert 0.25 * result.report.before.macs < result.report.after.macs <= 0.3 * result.report.before.macs


def test_a_config_list_leaves_them_whole_too(model: Detector) -> None:
    result = torchshear.prune(model, (IMAGE,), config=[{"op_types": ["Conv2d"], "sparsity": 0.5}])
    assert type(result.model) is Detector
    assert_equals_masked(model, result.model, result.plan, (IMAGE,))


def test_parts_of_a_model_keep_their_class(model: Detector) -> None:
    result = torchshear.prune(model, (IMAGE,), submodules=["enter", "blocks.0", "stem"])
    assert result.form == "native"
    assert type(result.model.blocks[0]) is Attention


def test_what_costs_much_comes_back_traced_and_says_so() -> None:
    small = randomise(Detector(4).eval(), 3)
    result = torchshear.prune(small, (IMAGE,))
    assert isinstance(result.model, TracedModule)
    assert "at most 10% of what the cut saves" in result.report.form


def test_native_insists_whatever_it_costs() -> None:
    small = randomise(Detector(4).eval(), 3)
    result = torchshear.prune(small, (IMAGE,), form="native")
    assert type(result.model) is Detector
    assert size(result.model) < size(small)
    assert_equals_masked(small, result.model, result.plan, (IMAGE,))


def test_traced_insists_on_the_graph(traced: torchshear.PruneResult) -> None:
    assert isinstance(traced.model, TracedModule)
    assert all(len(group.kept) == group.width // 2 for group in traced.plan.groups if group.width > 1)


def test_native_that_cannot_be_is_refused() -> None:
    literal = Between(lambda h: h.view(-1, 8), nn.Linear(6, 8), nn.Linear(8, 3))
    with pytest.raises(PlanError, match="native"):
        torchshear.prune(literal.eval(), (torch.randn(2, 6),), form="native")


@pytest.mark.parametrize("form", ["graph", None, 1])
def test_other_words_are_refused(model: Detector, form: object) -> None:
    with pytest.raises(ArgumentError, match="expected one of 'auto', 'native', 'traced'"):
        torchshear.prune(model, (IMAGE,), form=form)  # type: ignore[arg-type]


def test_a_native_form_found_at_once_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchshear.speedup.shrinking._whole_model.leave_groups_whole", _refuse)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    assert torchshear.prune(plain.eval(), (IMAGE,)).form == "native"


def test_what_was_planned_is_shrunk_as_it_was_planned(model: Detector, groups: ChannelGroups) -> None:
    """Only `prune` may choose other groups; a plan says what to keep."""
    plan = torchshear.plan(groups)
    shrunk = shrink_to_form(model, plan)
    assert (shrunk.form, shrunk.plan) == ("traced", plan)


@dataclass
class Searched:
    """A search in which making the native form is played: it is right where enough groups are whole.

    Attributes:
        job: the cut of the detector.
        tried: number of groups that were left whole, each time.
        enough: number of groups that must be.
    """

    job: PreparedCut
    tried: list[int]
    enough: int

    def run(self, most: float) -> Native:
        """Search, with plans as `prune` makes them."""
        groups = self.job.cut.groups
        tradeoff = NativeTradeoff(lambda whole: torchshear.plan(groups, exclude=tuple(whole)), most)
        return leave_groups_whole(self.job, self.job.find_native(), tradeoff)[1]


@pytest.fixture
def searched(model: Detector, groups: ChannelGroups, monkeypatch: pytest.MonkeyPatch) -> Searched:
    search = Searched(PreparedCut.of(model, groups, torchshear.plan(groups)), [], 7)

    def native(job: PreparedCut) -> Native:
        search.tried.append(sum(len(of.kept) == of.width for of in job.plan.groups))
        if search.tried[-1] < search.enough:
            return Native(None, Form("traced", "too few are whole"), "blocks.0")
        return Native(model, Form("native", "enough are whole"))

    monkeypatch.setattr(PreparedCut, "find_native", native)
    return search


def test_kinds_are_tried_alone_and_all_then_all_but_one(searched: Searched) -> None:
    """The kinds are, the cheapest first: two groups each of queries and keys, of values, of heads; and the stream."""
    assert searched.run(0.9).model is not None
    assert searched.tried == [0, 2, 2, 7, 6, 5, 5, 5]


def test_a_search_in_which_nothing_helps_ends_with_all_kinds(searched: Searched) -> None:
    searched.enough = 8
    assert searched.run(0.9).model is None
    assert searched.tried == [0, 2, 2, 7]


def test_a_search_ends_where_the_kinds_it_needs_cost_too_much(searched: Searched) -> None:
    """The stream may be left whole, heads may be, but not both."""
    assert searched.run(0.01).model is None
    assert searched.tried == [0, 2, 2, 7, 6, 5]


def test_the_only_kind_of_a_module_is_left_before_those_of_another() -> None:
    """Attention of torch is as wide inside as outside, and this stream is the output."""

    class Other(nn.MultiheadAttention):
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (kind(16, 1, batch_first=True) for kind in (nn.MultiheadAttention, Other))
            self.wide = nn.Sequential(nn.Linear(16, 1600), nn.ReLU(), nn.Linear(1600, 16))

        def forward(self, x: Tensor) -> Tensor:
            for attention in (self.one, self.two):
                x = x + attention(x, x, x, need_weights=False)[0]
            return x + self.wide(x)

    net = randomise(Net().eval(), 3)
    result = torchshear.prune(net, (torch.randn(2, 5, 16),))
    assert type(result.model) is Net
    assert {group.name.partition(".")[0] for group in result.report.groups if group.note} == {"one", "two"}


def _refuse(*args: object) -> Callable[..., object]:
    raise AssertionError
