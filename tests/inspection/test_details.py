"""Descriptions of groups against numbers counted by hand, and how a group is named."""

import json

import pytest
import torch
from torch import nn

from tests.networks import Attention, Grouped, Net, Residual, analyzed, image
from torchshear.errors import ArgumentError
from torchshear.inspection import describe_groups
from torchshear.inspection._details import find_group
from torchshear.inspection._document import groups_document


def test_residual_group_in_numbers() -> None:
    detail, _ = describe_groups(analyzed(Residual(), image()))
    assert (detail.number, detail.name, detail.width, detail.max_cut) == (0, "stem.weight[0]", 8, 7)
    assert detail.purposes == ("bias", "in", "norm", "out", "statistic")
    stem, norm, one, two, head = 8 * 3 * 9 + 8, 8 + 8, 16 * 8 * 9, 8 * 16 * 9 + 8, 5 * 8
    assert detail.n_params == stem + norm + one + two + head
    assert detail.unit_params == (3 * 9 + 1) + 2 + 16 * 9 + (16 * 9 + 1) + 5
    assert [constraint.kind for constraint in detail.constraints] == ["minimum"]
    assert detail.constraints[0].text == "at least 1 of 8 units stays"
    members = {(member.name, member.dim): member for member in detail.members}
    assert members["norm.running_mean", 0].kind == "buffer"
    assert members["head.weight", 1].purposes == ("in",)
    (place,) = members["head.weight", 1].where
    assert place.startswith("aten.linear.default in module 'head' (plain.py:")


def test_heads_and_head_dimensions_have_their_positions() -> None:
    heads, inner = describe_groups(analyzed(Attention(), torch.randn(2, 5, 24)))
    (weight,) = (member for member in heads.members if member.name == "qkv.weight")
    assert (weight.n_positions, weight.size, weight.multiplicity) == (72, 72, 24)
    assert weight.first == "0..7, 24..31, 48..55"
    (weight,) = (member for member in inner.members if member.name == "qkv.weight")
    assert (weight.first, weight.multiplicity) == ("0, 8, 16, 24, ...", 9)
    mixed = {constraint.kind: constraint for constraint in inner.constraints}["cross-channel"]
    assert mixed.where[0].startswith("aten.scaled_dot_product_attention.default")
    assert not any(constraint.kind == "cross-channel" for constraint in heads.constraints)


def test_balance_names_the_operator_that_demands_it() -> None:
    first, second = describe_groups(analyzed(Grouped(), image()))
    for detail in (first, second):
        kinds = {constraint.kind: constraint for constraint in detail.constraints}
        assert kinds["balanced"].text == "each of 3 blocks loses equally many units"
        assert kinds["balanced"].where[0].startswith("aten.conv2d.default in module 'two'")
        assert kinds["minimum"].text == "at least 3 of 12 units stay"
    (blocked,) = (member for member in first.members if member.name == "two.weight")
    assert (blocked.n_blocks, blocked.size) == (3, 12)


def test_a_group_of_one_unit_a_block_says_that_it_is_fixed() -> None:

    detail = describe_groups(
        analyzed(
            Net(lambda m, x: m.two(m.one(x)).sum((2, 3)), one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(4, 8, 1, groups=4)),
            image(),
        )
    )
    for group in detail:
        assert group.is_prunable == (group.constraints[0].kind == "minimum")
        if not group.is_prunable:
            assert group.constraints[0].text == group.reason


def test_document_is_plain_data() -> None:
    document = groups_document(analyzed(Residual(), image()))
    assert json.loads(json.dumps(document))["groups"][1]["name"] == "one.weight[0]"
    assert {entry["name"] for entry in document["fixed"]} == {"stem.weight", "head.weight", "head.bias"}


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("one.weight[0]", 1), ("two.weight[1]", 1), ("one.bias", 1)])
def test_a_group_is_found_by_number_name_and_member(text: str, number: int) -> None:
    assert find_group(analyzed(Residual(), image()), text) == number


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("2", r"no channel group of number 2. Expected the number or name of one; numbers: 0 to 1"),
        ("-1", r"no channel group of number -1"),
        ("two.weight", r"lies in 2 channel groups: 0 \(stem.weight\[0\]\), 1 \(one.weight\[0\]\). Give the number"),
        ("on.weight[0]", r"no channel group 'on.weight\[0\]'. Did you mean 'one.weight\[0\]'\? Expected"),
        ("%", r"no channel group '%'. Expected"),
    ],
)
def test_a_group_that_is_not_there(text: str, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        find_group(analyzed(Residual(), image()), text)


def test_no_group_in_a_network_that_cannot_shrink() -> None:
    with pytest.raises(ArgumentError, match="none: no dimension of this network can shrink"):
        find_group(analyzed(nn.Linear(4, 3), torch.randn(2, 4)), "0")
