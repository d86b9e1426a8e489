"""Channel groups of small networks that a person can read off."""

import json

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Attention, Between, Grouped, Residual, Tied, analyzed, image, randomise
from tests.strategies import RandomNetwork, example_input
from torchshear.dependency import ChannelGroups, operator_rule, registered_operators, unregister
from torchshear.errors import ArgumentError
from torchshear.pruners import plan_from_kept


def dims(groups: ChannelGroups, name: str) -> set[tuple[str, int]]:
    return {(member.name, member.dim) for member in groups[name].members}


def test_a_residual_sum_ties_both_of_its_producers() -> None:
    groups = analyzed(Residual(), image())
    assert [(group.name, group.width) for group in groups] == [("stem.weight[0]", 8), ("one.weight[0]", 16)]
    assert dims(groups, "stem.weight[0]") == {
        ("stem.weight", 0),
        ("stem.bias", 0),
        ("norm.weight", 0),
        ("norm.bias", 0),
        ("norm.running_mean", 0),
        ("norm.running_var", 0),
        ("one.weight", 1),
        ("two.weight", 0),
        ("two.bias", 0),
        ("head.weight", 1),
    }


def test_roles_say_what_a_dimension_is_for() -> None:
    members = {(m.name, m.dim): m.purposes for m in analyzed(Residual(), image())["stem.weight[0]"].members}
    assert members["stem.weight", 0] == {"out"}
    assert members["one.weight", 1] == {"in"}
    assert members["norm.weight", 0] == {"norm"}
    assert members["stem.bias", 0] == {"bias"}
    assert members["norm.running_var", 0] == {"statistic"}


def test_inputs_and_outputs_are_fixed_with_a_reason() -> None:
    fixed = {(f.name, f.dim): f.reason for f in analyzed(Residual(), image()).fixed}
    assert fixed["stem.weight", 1] == "model input 'x', dimension 1"
    assert fixed["head.weight", 0] == "model output 0"


def test_heads_and_head_dimensions_are_groups_of_one_weight() -> None:
    groups = analyzed(Attention(24, 3), torch.randn(2, 5, 24))
    widths = {group.name: group.width for group in groups}
    assert widths == {"qkv.weight[0]": 3, "qkv.weight[0]#2": 8}
    heads = next(m for m in groups["qkv.weight[0]"].members if m.name == "qkv.weight")
    # position = (which * heads + head) * head_dim + dim, so unit h of the heads stands at every which and dim
    expected = np.arange(72) // 8 % 3
    assert np.array_equal(heads.units[np.argsort(heads.positions)], expected)
    inside = next(m for m in groups["qkv.weight[0]#2"].members if m.name == "qkv.weight")
    assert np.array_equal(inside.units[np.argsort(inside.positions)], np.arange(72) % 8)


def test_a_grouped_convolution_balances_its_inputs_and_outputs() -> None:
    groups = analyzed(Grouped(), image())
    for name in ("one.weight[0]", "two.weight[0]"):
        assert groups[name].balance.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert groups[name].n_blocks == 3
        assert groups[name].max_cut == 9


def test_tied_weights_are_one_member() -> None:
    groups = analyzed(Tied(), torch.randint(0, 11, (2, 4)))
    names = {member.name for group in groups for member in group.members}
    assert "embedding.weight" in names
    assert "head.weight" not in names


def test_groups_are_found_by_number_name_and_slice() -> None:
    groups = analyzed(Residual(), image())
    assert groups[0] is groups["stem.weight[0]"]
    assert list(groups[:1]) == [groups[0]]
    with pytest.raises(ArgumentError, match="no channel group 'nothing'; known are stem"):
        groups["nothing"]


def test_analysis_needs_no_weights() -> None:
    with torch.device("meta"):
        model = Residual()
    groups = analyzed(model, torch.empty(2, 3, 8, 8, device="meta"))
    assert [group.width for group in groups] == [8, 16]


def test_analysis_is_the_same_every_time() -> None:
    first, second = analyzed(Residual(), image()), analyzed(Residual(), image())
    assert [g.name for g in first] == [g.name for g in second]
    assert first.graph.fingerprint == second.graph.fingerprint


def test_networkx_view_has_parallel_edges_and_group_names() -> None:
    model = Between(lambda h: h * h, nn.Linear(3, 4), nn.Linear(4, 2))
    network = analyzed(model, torch.randn(2, 3)).to_networkx()
    assert isinstance(network, nx.MultiDiGraph)
    assert network.number_of_edges("linear", "mul") == 2
    assert network.nodes["one_weight"]["kind"] == "parameter"
    assert json.loads(network.nodes["linear"]["groups"]) == ["one.weight[0]"]
    assert json.loads(network.edges["one_weight", "linear", 0]["axes"]) == [["one.weight[0]"], []]
    assert nx.is_directed_acyclic_graph(network)


@torch.library.custom_op("torchshear_tests::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    """An operator that nobody has a rule for."""
    return x.flip(1)


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Twisted(nn.Module):
    """A known layer, the unknown operator, a known layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Two values a sample."""
        return self.three(torch.relu(self.two(twist(self.one(x)))))


def test_an_unknown_operator_is_never_guessed() -> None:
    groups = analyzed(Twisted(), torch.randn(2, 3))
    assert [group.name for group in groups] == ["two.weight[0]"]
    reasons = {(f.name, f.dim): f.reason for f in groups.fixed}
    assert "operator without a rule: torchshear_tests.twist.default" in reasons["one.weight", 0]
    assert "test_groups.py" in reasons["one.weight", 0]
    assert "operator without a rule" in reasons["two.weight", 1]


def test_a_rule_can_be_registered_once_and_forgotten() -> None:
    @operator_rule("torchshear_tests.twist")
    def _twist(call):  # type: ignore[no-untyped-def]
        x = call.axes("x")
        return (x[0], call.algebra.take(x[1], slice(None, None, -1)))

    try:
        assert "torchshear_tests.twist" in registered_operators()
        model = Twisted().eval()
        result = torchshear.prune(model, (torch.randn(2, 3),), ratio=0.5)
        assert [group.width for group in result.plan.groups] == [6, 6]
        with pytest.raises(ArgumentError, match="'torchshear_tests.twist' .*_twist"):
            operator_rule("torchshear_tests.twist")(_twist)
    finally:
        unregister("torchshear_tests.twist")
    with pytest.raises(ArgumentError, match="has no rule"):
        unregister("torchshear_tests.twist")
    with pytest.raises(ArgumentError, match="'twist'; .*'namespace.operator'"):
        operator_rule("twist")


def test_a_literal_index_is_renumbered() -> None:
    model = randomise(Between(lambda h: h[:, [3, 2, 5, 0]], nn.Conv2d(3, 6, 1), nn.Conv2d(4, 4, 1)))
    groups = analyzed(model, image())
    assert [group.width for group in groups] == [4, 2]
    plan = plan_from_kept(groups, {"one.weight[0]": [0, 2]})
    assert torchshear.verify(model, torchshear.shrink(model, plan), plan, args=(image(),)).max_error < 1e-12


def test_a_block_that_cannot_be_cut_fixes_the_others() -> None:
    class HalfFixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(2, 5, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.one(x)
            return self.two(x[:, :2]), x[:, 2:]

    groups = analyzed(HalfFixed(), torch.randn(2, 4, 3, 3))
    assert len(groups) == 0
    reasons = {(f.name, f.dim): f.reason for f in groups.fixed}
    assert "another block of it cannot be cut: aten.conv2d.default in module 'one'" in reasons["two.weight", 1]


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.99])
def test_something_is_left_where_groups_cross(ratio: float) -> None:
    """Channels of a padded shortcut go with either of two groups, since they are shuffled in blocks behind it."""
    blocks = [
        {"kind": "unfold", "width": 4},
        {"kind": "pad_shortcut", "front": 2, "back": 2, "mid": 3},
        {"kind": "channel_shuffle", "groups": 2},
    ]
    description = {"layout": "map", "input": [2, 5, 4, 4], "seed": 1, "outputs": "head", "blocks": blocks}
    model, x = RandomNetwork(description), example_input(description)
    groups = analyzed(model, x)
    assert [(group.width, group.min_units) for group in groups][:2] == [(2, 1), (4, 3)]
    for criterion in ("l1", "random", "fpgm"):
        plan = torchshear.plan(groups, ratio=ratio, criterion=criterion)
        assert min(plan.state["blocks.0.a.weight"].new_shape) > 0
