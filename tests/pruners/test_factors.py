"""Channels and a multiplier of theirs: what was asked is taken from the channels, once."""

import torch
from torch import nn

import torchshear
from tests.networks import Between, Net

X = torch.randn(2, 3, 8, 8)


def multiplied() -> Net:
    """Two depthwise convolutions, each with twice as many outputs."""
    return Net(
        lambda m, x: m.last(m.two(m.one(m.stem(x).relu()).relu()).relu()),
        stem=nn.Conv2d(3, 16, 3),
        one=nn.Conv2d(16, 32, 3, groups=16),
        two=nn.Conv2d(32, 64, 3, groups=32),
        last=nn.Conv2d(64, 5, 1),
    )


def widths(model: nn.Module) -> list[int]:
    return [len(parameter) for parameter in model.parameters() if parameter.ndim == 4]


def test_a_multiplier_stays_whole_where_what_it_multiplies_shrinks() -> None:
    result = torchshear.prune(multiplied().eval(), (X,), ratio=0.5)
    assert widths(result.model) == [8, 16, 32, 5]
    notes = [group.note for group in result.report.groups]
    assert notes == ["", *["stays whole: a factor of channels that shrink with 'stem.weight[0]'"] * 2]


def test_a_multiplier_shrinks_where_it_is_named_or_alone() -> None:
    named = torchshear.prune(multiplied().eval(), (X,), ratio={"one.weight[0]": 0.5, "*": 0.5})
    assert widths(named.model) == [8, 8, 16, 5]
    alone = torchshear.prune(multiplied().eval(), (X,), ratio=0.5, exclude="stem")
    assert widths(alone.model) == [16, 16, 32, 5]


def test_two_factors_that_stand_nowhere_alone_both_shrink() -> None:
    shuffled = Between(
        lambda h: h.unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2), nn.Conv2d(3, 24, 1), nn.Conv2d(24, 5, 1)
    )
    result = torchshear.prune(shuffled.eval(), (X,), ratio=0.5)
    assert {group.width: len(group.kept) for group in result.plan.groups} == {4: 2, 6: 3}
