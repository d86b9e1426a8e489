"""Choosing what may shrink: roles, ratios by key, exclusions. What is asked is done, or refused in so many words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Net, Separate, ViTBlock, analyzed, randomise
from tests.oracle import assert_equals_masked, n_elements
from tests.plan_files import edit_plan
from torchshear import PruningPlan
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError


class TwoStages(nn.Module):
    """Two residual stages of convolutions and a classifier with a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))
        self.down = nn.Conv2d(8, 16, 3, padding=1)
        self.two = nn.Sequential(nn.Conv2d(16, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 16, 3, padding=1))
        self.head = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.down((x + self.one(x)).relu())
        x = x + self.two(x)
        return self.head(x.mean((2, 3)))


# Group -> (width, role), as one reads them off the network.
GROUPS = {
    "stem.weight[0]": (8, "residual"),
    "one.0.weight[0]": (12, "channels"),
    "down.weight[0]": (16, "residual"),
    "two.0.weight[0]": (20, "channels"),
    "head.0.weight[0]": (24, "ffn"),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomise(TwoStages().double().eval(), seed=3)


@pytest.fixture(scope="module")
def groups(model: nn.Module) -> ChannelGroups:
    return torchshear.analyze(torchshear.trace(model, (image(),)))


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def cut(plan: PruningPlan) -> dict[str, int]:
    """Group -> number of units that go, for groups that lose any."""
    return {group.name: group.width - len(group.kept) for group in plan.groups if len(group.kept) < group.width}


def notes(plan: PruningPlan) -> dict[str, str]:
    return {group.name: group.note for group in plan.groups}


def test_the_network_is_as_read(groups: ChannelGroups) -> None:
    assert {group.name: (group.width, group.role) for group in groups} == GROUPS


def test_chosen_roles_shrink_and_nothing_else(model: nn.Module) -> None:
    result = torchshear.prune(model, (image(),), ratio=0.5, roles="channels")
    assert cut(result.plan) == {"one.0.weight[0]": 6, "two.0.weight[0]": 10}
    assert_equals_masked(model, result.model, result.plan, (image(),))
    assert notes(result.plan)["stem.weight[0]"] == "stays whole: its role 'residual' is not among roles=channels"
    assert notes(result.plan)["one.0.weight[0]"] == ""
    assert result.report.requested_ratio == result.report.achieved_ratio == 0.5
    assert "not among roles=channels" in str(result.report)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (
            {"ratio": 0.25, "roles": ["ffn", "residual"]},
            {"stem.weight[0]": 2, "down.weight[0]": 4, "head.0.weight[0]": 6},
        ),
        # The stage `two` adds to the stream of `down`, whose own name comes first; the inside is the pattern's.
        (
            {"ratio": {"*": 0.75, "residual": 0.25, "two": 0.5, "down.weight[0]": 0.125}},
            dict(zip(GROUPS, (2, 9, 2, 10, 18), strict=True)),
        ),
        ({"ratio": {"head": 0.5}}, {"head.0.weight[0]": 12}),  # what only reads a group does not decide on it
        ({"ratio": {"down": 0.5}}, {"down.weight[0]": 8}),
        ({"ratio": {"stem": 0.5, "one.?.weight": 0.5}}, {"stem.weight[0]": 4, "one.0.weight[0]": 6}),
    ],
    ids=["roles", "keys in their order", "reader", "writer", "keys that ask the same"],
)
def test_what_was_asked_goes(groups: ChannelGroups, asked: dict, expected: dict[str, int]) -> None:
    plan = torchshear.plan(groups, **asked)
    assert cut(plan) == expected
    assert plan.request.items() >= asked.items()


def test_what_no_key_fits_stays_whole_and_says_so(groups: ChannelGroups) -> None:
    plan = torchshear.plan(groups, ratio={"one.*": 0.5, "ffn": 0.25})
    # `one` makes its inside and adds to the stream of the stem; that it is read by `down` does not count for `down`.
    assert cut(plan) == {"stem.weight[0]": 4, "one.0.weight[0]": 6, "head.0.weight[0]": 6}
    assert notes(plan)["two.0.weight[0]"] == "stays whole: no key of ratio fits it"
    asked = {group.name: group.ratio for group in plan.groups}
    assert asked == dict.fromkeys(GROUPS) | {"stem.weight[0]": 0.5, "one.0.weight[0]": 0.5, "head.0.weight[0]": 0.25}


def test_reports_give_the_mean_of_what_was_asked(model: nn.Module) -> None:
    report = torchshear.prune(model, (image(),), ratio={"channels": 0.5, "ffn": 0.25}).report
    assert report.requested_ratio == pytest.approx((6 + 10 + 6) / (12 + 20 + 24))
    assert report.achieved_ratio == report.requested_ratio
    assert [row.role for row in report.groups] == [role for _, role in GROUPS.values()]


def test_excluded_parameters_keep_their_shapes(model: nn.Module, groups: ChannelGroups) -> None:
    for exclude in ("two", "two.*", ["two.0.*", "two.2"], "t*"):
        plan = torchshear.plan(groups, exclude=exclude)
        small = torchshear.shrink(model, plan)
        before, after = model.state_dict(), small.state_dict()
        assert all(after[name].shape == before[name].shape for name in before if name.startswith("two"))
        # The stem's stream ends in `down`, so it may shrink, and with it columns of `down`.
        assert cut(plan).keys() == {"stem.weight[0]", "one.0.weight[0]", "head.0.weight[0]"}
        assert_equals_masked(model, small, plan, (image(),))
    assert notes(plan)["two.0.weight[0]"] == "stays whole: excluded by 't*': two.0.weight"


def test_a_group_can_be_excluded_by_its_name(groups: ChannelGroups) -> None:
    plan = torchshear.plan(groups, exclude=["down.weight[0]", "head"])
    assert cut(plan).keys() == {"stem.weight[0]", "one.0.weight[0]", "two.0.weight[0]"}
    assert notes(plan)["down.weight[0]"] == "stays whole: excluded by its name"
    assert notes(plan)["head.0.weight[0]"] == "stays whole: excluded by 'head': head.0.weight"
    assert plan.request["exclude"] == ["down.weight[0]", "head"]


def tied_words() -> Net:
    """A table that is also the head, under two names."""
    parts = {"table": nn.Embedding(9, 8), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
    body = Net(
        lambda m, x: m.lm_head((h := m.table(x)) + m.down(m.up(h).relu())), **parts, lm_head=nn.Linear(8, 9, bias=False)
    )
    body.lm_head.weight = body.table.weight
    return body


@pytest.mark.parametrize("name", ["table", "lm_head"])
def test_a_tied_weight_answers_to_each_of_its_names(name: str) -> None:
    groups = torchshear.analyze(torchshear.trace(tied_words(), (torch.randint(0, 9, (2, 4)),)))
    assert cut(torchshear.plan(groups, exclude=name)) == {"up.weight[0]": 6}
    assert cut(torchshear.plan(groups, ratio={name: 0.25})) == {"table.weight[1]": 2}


@pytest.fixture(scope="module")
def transformer() -> tuple[nn.Module, ChannelGroups]:
    """One block of a vision transformer on patches."""
    parts = {"stem": nn.Linear(10, 24), "block": ViTBlock(24, 4), "head": nn.Linear(24, 3)}
    model = Net(lambda m, x: m.head(m.block(m.stem(x)).mean(1)), **parts)
    model = randomise(model.double().eval(), seed=5)
    return model, analyzed(model, torch.randn(2, 7, 10, dtype=torch.float64))


@pytest.mark.parametrize(
    ("roles", "widths"),
    [
        ("heads", {4: 2, 6: 6, 24: 24, 96: 96}),
        ("head_dim", {4: 4, 6: 3, 24: 24, 96: 96}),
        ("residual", {4: 4, 6: 6, 24: 12, 96: 96}),
        (("ffn", "heads"), {4: 2, 6: 6, 24: 24, 96: 48}),
    ],
)
def test_a_transformer_by_role(
    transformer: tuple[nn.Module, ChannelGroups], roles: str | tuple[str, ...], widths: dict[int, int]
) -> None:
    model, groups = transformer
    plan = torchshear.plan(groups, ratio=0.5, roles=roles)
    assert {group.width: len(group.kept) for group in plan.groups} == widths
    assert n_elements(torchshear.shrink(model, plan)) < n_elements(model)  # which proves what it gives


def test_a_role_stands_for_narrower_ones_unless_they_are_named() -> None:
    groups = torchshear.analyze(torchshear.trace(Separate(kv_heads=2), (torch.randn(2, 5, 16),)))
    by_role = {group.role: group.name for group in groups}
    assert by_role.keys() == {"kv_heads", "q_heads", "qk_dim", "v_dim"}
    both = torchshear.plan(groups, roles="heads")
    assert cut(both) == {by_role["kv_heads"]: 1, by_role["q_heads"]: 1}
    one = torchshear.plan(groups, ratio={"heads": 0.5, "q_heads": 0, "head_dim": 1 / 3})
    assert cut(one) == {by_role["kv_heads"]: 1, by_role["qk_dim"]: 2, by_role["v_dim"]: 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"roles": "chanels"}, r"roles: 'chanels' is no role; roles of this model's groups are residual \(2\), "),
        ({"roles": "chanels"}, "Close to it: channels"),
        ({"roles": "heads"}, r"roles: no group has the role 'heads'; .*channels \(2\), ffn \(1\); other roles are"),
        ({"roles": ["state", "heads"]}, "no group has the role 'state' or 'heads'; roles of this model's groups are"),
        ({"roles": []}, "names no role"),
        ({"roles": 5}, "roles=5; expected a string or several"),
        ({"ratio": {}}, "empty mapping"),
        ({"ratio": {"ffn": 1.0}}, r"ratio\['ffn'\]=1.0; expected a number in \[0, 1\)"),
        ({"ratio": {"ffn": "half"}}, r"ratio\['ffn'\]='half'"),
        ({"ratio": "half"}, "ratio='half'; expected a number"),
        (
            {"ratio": {"ffm": 0.5}},
            "the key 'ffm' decides nothing: it is no channel group and no role.*Close to it: ffn",
        ),
        ({"ratio": {"two.4": 0.5, "*": 0.1}}, "'two.4' decides nothing: .*Close to it: two"),
        ({"ratio": {"heads": 0.5}}, "'heads' decides nothing: no group has that role"),
        ({"ratio": {"head.2": 0.5}}, r"head.2.weight\[0\] is fixed: model output 0"),
        (
            {"ratio": {"channels": 0.5}, "roles": "ffn"},
            "'channels' decides nothing: group 'one.0.weight.0.' stays whole",
        ),
        ({"ratio": {"ffn": 0.5, "head.0": 0.1}}, "'ffn' decides nothing: for group .* the key 'head.0' comes first"),
        (
            {"ratio": {"stem": 0.5, "one": 0.25}},
            "made by layers of several patterns: 'stem' asks 0.5 and 'one' asks 0.25",
        ),
        ({"exclude": "layer4.*"}, "exclude: 'layer4.*' fits no parameter, module or channel group"),
        ({"exclude": ["two", "hed"]}, "'hed' fits no parameter.*Close to it: head"),
        ({"exclude": "*"}, r"exclude='\*' leaves nothing that can shrink"),
        ({"roles": "ffn", "exclude": "head"}, "roles='ffn', exclude='head' leaves nothing that can shrink"),
        ({"ratio": {"ffn": 0.001}}, "ratio={'ffn': 0.001} removes nothing: none of 1 groups"),
    ],
)
def test_nothing_does_nothing_in_silence(groups: ChannelGroups, arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        torchshear.plan(groups, **arguments)


def test_unknown_keywords_are_refused(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="'axis'; .*model, .*roles, exclude, prunable_outputs"):
        torchshear.prune(model, (image(),), axis="ffn")


def test_plans_keep_roles_and_ratios_in_their_files(groups: ChannelGroups, tmp_path: Path) -> None:
    plan = torchshear.plan(groups, ratio={"ffn": 0.5, "channels": 0.25}, exclude="one")
    plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.request == plan.request
    assert [(g.role, g.ratio, g.note) for g in loaded.groups] == [(g.role, g.ratio, g.note) for g in plan.groups]
    assert loaded.request["ratio"] == {"ffn": 0.5, "channels": 0.25}


def test_plans_written_before_there_were_roles_load(model: nn.Module, groups: ChannelGroups, tmp_path: Path) -> None:
    plan = torchshear.plan(groups)
    plan.save(tmp_path / "plan.json")
    edit_plan(tmp_path / "plan.json", lambda document: [(g.pop("role"), g.pop("ratio")) for g in document["groups"]])
    old = PruningPlan.load(tmp_path / "plan.json")
    assert old == plan
    assert [(group.role, group.ratio) for group in old.groups] == [("", None)] * len(GROUPS)
    assert_equals_masked(model, torchshear.shrink(model, old), old, (image(),))


def test_the_lowest_scores_go_whatever_chose_the_group(groups: ChannelGroups) -> None:
    """Choosing changes which groups lose units, not which units a group loses."""
    everything = torchshear.plan(groups, ratio=0.5).kept
    for roles in ("channels", "ffn", "residual"):
        kept = torchshear.plan(groups, ratio=0.5, roles=roles).kept
        for group in groups:
            expected = everything[group.name] if group.role == roles else np.arange(group.width)
            assert np.array_equal(kept[group.name], expected)
