"""What holds for every registered criterion, so that a new one is tested the day it is added."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.functions import Pointwise, ReluInPlace, Reversed, Rounded
from tests.networks import classified, named, randomise, tagged
from tests.networks.attention import EncoderBlock
from tests.networks.feed_forward import Experts, GatedFeedForward
from tests.networks.layers import Steps
from tests.networks.plain import ManyLayers
from tests.oracle import fresh_inputs
from tests.pruners import naive
from tests.pruners.scoring import collected, images, is_scored, mixed, score
from torchshear.calibration._statistics import SUMS_OF_GRADIENTS, Statistics
from torchshear.dependency import ChannelGroups, Member
from torchshear.errors import ArgumentError
from torchshear.pruners import UnscorableError, plan_from_kept, registered_criteria
from torchshear.pruners.criteria._criterion import declared_needs, find_criterion
from torchshear.pruners.selection._scoring import GROUP_REDUCTIONS

CRITERIA = registered_criteria()
BY_FORMULA = tuple(name for name in CRITERIA if name != "random")
BY_DEFINITION = tuple(name for name in BY_FORMULA if name != "reconstruction")  # which test_reconstruction.py refits
SCOPES = ("local", "global", "isomorphic")
DIGITS = {"fpgm": 1e-5}  # its distances are worked out in float32


@pytest.mark.parametrize("name", CRITERIA)
def test_docstring_says_formula_shape_direction_data_and_source(name: str) -> None:
    said = find_criterion(name).__doc__ or ""
    assert "shape (C,)" in said.splitlines()[0] + said.splitlines()[1]
    assert re.search(r"^ +s_[ch] [=~] ", said, re.MULTILINE)
    assert re.search(r"^ +Low scores go first: [^.]+\.", said, re.MULTILINE)
    needs = declared_needs(name)
    data = "gradients:" if needs & SUMS_OF_GRADIENTS else "activations:" if needs else "no data."
    assert f"Needs {data}" in " ".join(said.split())
    assert re.search(r"^ +Reference: \w", said, re.MULTILINE)


class Adversarial(naive.Residual):
    """A second head behind a reversal of gradients, and a stream that is rounded where gradients do not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.show("first", torch.relu(self.norm(self.made("stem", x))))
        y = self.show("middle", torch.relu(self.up_norm(self.made("up", Rounded.apply(x)))))
        x = self.show("last", ReluInPlace.apply(x + self.made("down", y), 0.5))
        x = x.mean((2, 3))
        return self.head(x) + self.domain(Reversed.apply(x, 0.7))


class Fused(naive.Residual):
    """The last layer of the branch is a function that is given its weights, whose backward is not the derivative."""

    def made(self, layer: str, x: Tensor) -> Tensor:
        if layer != "up":
            return super().made(layer, x)
        self.seen.setdefault(f"input of {layer}", []).append(x.detach())
        y = Pointwise.apply(x, self.up.weight, self.up.bias)
        return y * self.gates[layer][:, :, None, None] if layer in self.gates else y


TOYS = {"residual": naive.Residual, "grouped": naive.Grouped, "adversarial": Adversarial, "fused": Fused}


@cache
def toy(name: str) -> tuple[naive.Watched, ChannelGroups, Statistics]:
    model = randomise(TOYS[name]()).double().eval()
    groups = torchshear.analyze(torchshear.trace(model, (images()[0][0],)))
    model.seen.clear()
    return naive.Watched(model, images()), groups, torchshear.collect(groups, images(), functional.cross_entropy, 3)


def test_every_criterion_has_a_definition_to_be_compared_with() -> None:
    assert sorted(naive.NAIVE) == sorted(BY_DEFINITION)


@pytest.mark.parametrize("net", TOYS)
@pytest.mark.parametrize("name", naive.NAIVE)
def test_scores_are_the_definition(name: str, net: str) -> None:
    seen, groups, statistics = toy(net)
    assert [group.name for group in groups] == list(TOYS[net].parts)
    for group in groups:
        expected = naive.scores(name, seen, TOYS[net].parts[group.name])
        np.testing.assert_allclose(score(name, groups, group, statistics), expected, rtol=DIGITS.get(name, 1e-8))


def permuted(member: Member, weight: Tensor, order: np.ndarray) -> Tensor:
    """A weight in which unit c has what unit order[c] had."""
    lines = (
        weight.reshape(member.n_blocks, -1, *weight.shape[1:]).movedim(member.dim + 1, 1).flatten(0, 1).clone()
        if member.n_blocks
        else weight.movedim(member.dim, 0).clone()
    )
    places = [member.positions[member.units == unit] for unit in range(len(order))]
    source = lines.clone()
    for unit, other in enumerate(order):
        lines[places[unit]] = source[places[other]]
    if not member.n_blocks:
        return lines.movedim(0, member.dim)
    rows = lines.unflatten(0, (member.n_blocks, -1)).movedim(1, member.dim + 1)
    return rows.reshape(weight.shape)


@cache
def after_permuting(index: int, is_alike: bool) -> tuple[np.ndarray, ChannelGroups, Statistics]:
    """The order, and groups and statistics of the network in which the units of one group are permuted.

    Args:
        index: number of the group.
        is_alike: whether all balanced blocks are permuted in the same way.
    """
    model, groups, _ = mixed()
    group = groups[index]
    order = np.arange(group.width)
    for block in range(group.n_blocks):
        here = order if group.balance is None else np.flatnonzero(group.balance == block)
        order[here] = here[np.random.default_rng(index if is_alike else block).permutation(len(here))]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for member in group.members:
        state[member.name] = permuted(member, state[member.name], order)
    other = ManyLayers().double().eval()
    other.load_state_dict(state)
    for x, _ in images():
        torch.testing.assert_close(other(x), model(x))
    return (order, *collected(other, images()))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", BY_FORMULA)
def test_permuting_a_group_permutes_its_scores_and_nothing_else(name: str, index: int) -> None:
    _, groups, statistics = mixed()
    # Distances of filters that read different channels, as those of a grouped convolution, are taken in order.
    order, others, seen = after_permuting(index, name == "fpgm")
    assert (order != np.arange(len(order))).any()
    assert len(groups) == 3
    plans = [torchshear.plan(g, name, 0.5, statistics=s) for g, s in ((groups, statistics), (others, seen))]
    for number, (group, other) in enumerate(zip(groups, others, strict=True)):
        if not is_scored(name, groups, group, statistics):
            assert not is_scored(name, others, other, seen)
            continue
        before, after = score(name, groups, group, statistics), score(name, others, other, seen)
        digits = DIGITS.get(name, 1e-7)
        np.testing.assert_allclose(after, before[order] if number == index else before, rtol=digits)
        # Scores of what stays: among equal ones it is the place that decides.
        kept = [np.sort(found[plan.kept[group.name]]) for found, plan in zip((before, after), plans, strict=True)]
        np.testing.assert_allclose(*kept, rtol=digits)


@pytest.mark.parametrize("name", CRITERIA)
def test_the_order_of_members_does_not_matter(name: str) -> None:
    _, groups, statistics = mixed()
    for group in groups:
        turned = replace(group, members=group.members[::-1])
        if not is_scored(name, groups, group, statistics):
            assert not is_scored(name, groups, turned, statistics)
            continue
        expected = score(name, groups, group, statistics)
        np.testing.assert_allclose(score(name, groups, turned, statistics), expected, rtol=1e-12)


@pytest.mark.parametrize("group_reduction", [word for word in GROUP_REDUCTIONS if word != "geometric"])
@pytest.mark.parametrize("name", CRITERIA)
def test_members_are_scored_apart(name: str, group_reduction: str) -> None:
    _, groups, statistics = mixed()
    plan = torchshear.plan(groups, name, 0.5, statistics=statistics, group_reduction=group_reduction)
    assert plan.n_cut
    for group in groups:
        if is_scored(name, groups, group, statistics):
            assert len(plan.kept[group.name]) < group.width


@pytest.mark.parametrize("name", CRITERIA)
def test_the_same_seed_gives_the_same_plan(name: str) -> None:
    _, groups, statistics = mixed()
    again, seen = mixed_again()
    for scope in SCOPES:
        plans = [
            torchshear.plan(g, name, 0.5, statistics=s, scope=scope) for g, s in ((groups, statistics), (again, seen))
        ]
        assert plans[0] == plans[1]


@cache
def mixed_again() -> tuple[ChannelGroups, Statistics]:
    return mixed.__wrapped__()[1:]


def output_loss(output: Tensor, _: Tensor) -> Tensor:
    """Another weight for each number of a sample, so that no gradient is the same everywhere."""
    return (torch.linspace(-1, 2, output[0].numel(), dtype=output.dtype) * output.flatten(1).square()).mean()


@cache
def layers_of(kind: str) -> tuple[ChannelGroups, Statistics]:
    model, args, _ = named(kind)[0].build()
    return collected(model, [args, fresh_inputs(args, 1)], output_loss)


# Why a criterion may refuse, and by kind of layer and group which ones do: docs/criteria.md, "What cannot be scored".
REASONS = {
    "apoz": "no activation behind its layers gives exact zeros",
    "bn_scale": "no norm with a scale",
    "taylor_bn": "no norm with a scale",
    "reconstruction": "no layer reads its units",
}
NO_ZEROS, NO_NORM, NO_READER = ("apoz",), ("bn_scale", "taylor_bn"), ("reconstruction",)
REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "conv3d": {"0.weight[0]": NO_ZEROS},
    "transposed1d": {"0.weight[1]": NO_NORM},
    "transposed2d_in_groups": {"0.weight[0]": NO_ZEROS + NO_NORM, "1.weight[1]": NO_ZEROS},
    "transposed3d": {"0.weight[1]": NO_NORM},
    "depthwise": {"0.weight[0]": NO_ZEROS + NO_NORM},
    "norm_without_scale": {"0.weight[0]": NO_NORM},
    "linear": {"0.weight[0]": NO_ZEROS},
    "root_mean_square_norm": {"0.weight[0]": NO_ZEROS},
    "embedding": {"embedding.weight[1]": NO_ZEROS + NO_NORM, "hidden.weight[0]": NO_NORM},
    "parameters_of_no_layer": {"token[2]": NO_ZEROS + NO_READER},  # it reads the same token of every sample
    "batch_norm_of_steps": {"0.weight[0]": NO_ZEROS + NO_NORM},
    "bidirectional_lstm": {"0.weight_ih_l0[0]": NO_ZEROS + NO_NORM},
    "rnn_with_relu": {"0.weight_ih_l0[0]": NO_NORM},
    "experts": {"up[0]": NO_NORM + NO_READER, "up[2]": NO_NORM, "down[2]": NO_ZEROS + NO_NORM},
    "attention": {
        "0.qkv.weight[0]": NO_ZEROS + NO_NORM,
        "0.qkv.weight[0]#2": NO_ZEROS + NO_NORM,
        "0.proj.weight[0]": NO_ZEROS + NO_NORM,
    },
}


def test_what_may_be_refused_is_there() -> None:
    for kind, refused in REFUSED.items():
        assert refused.keys() <= {group.name for group in layers_of(kind)[0].prunable}


@pytest.mark.parametrize("kind", [one.name for one in tagged("layer")])
@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_finite_unless_a_criterion_has_nothing_to_say(name: str, kind: str) -> None:
    groups, statistics = layers_of(kind)
    assert groups.prunable
    reasons = []
    for group in groups.prunable:
        if name in REFUSED.get(kind, {}).get(group.name, ()):
            with pytest.raises(UnscorableError, match=f"^{name}: {REASONS[name]}") as refusal:
                score(name, groups, group, statistics)
            reasons.append(str(refusal.value))
            continue
        found = score(name, groups, group, statistics)
        assert found.shape == (group.width,)
        assert np.isfinite(found).all()
        assert (found >= 0).all()
    if len(reasons) < len(groups.prunable):
        plan = torchshear.plan(groups, name, 0.5, statistics=statistics)
        assert sum(name in group.note for group in plan.groups if "stays whole" in group.note) >= len(reasons)
    else:
        with pytest.raises(ArgumentError, match=f"stays whole: {name}"):
            torchshear.plan(groups, name, 0.5, statistics=statistics)


def sequences() -> list[tuple[Tensor, Tensor]]:
    """Sequences of four vectors, of three classes."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(3, 4, 6, generator=generator).double(), torch.randint(0, 3, (3,), generator=generator))
        for _ in range(3)
    ]


class Mean(nn.Module):
    """Mean over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


NETS: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "mixed": (ManyLayers, images()),
    "attention": (EncoderBlock, classified(3, 5, 12)),
    "gated": (GatedFeedForward, classified(3, 12)),
    "lstm": (
        lambda: nn.Sequential(
            nn.LSTM(6, 7, 2, batch_first=True, bidirectional=True), Steps(), Mean(), nn.Linear(14, 3)
        ),
        sequences(),
    ),
    "experts": (lambda: nn.Sequential(Experts(), Mean()), sequences()),
}


@cache
def net(name: str) -> tuple[nn.Module, ChannelGroups, Statistics]:
    build, data = NETS[name]
    model = randomise(build()).double().eval()
    return (model, *collected(model, data))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("which", NETS)
@pytest.mark.parametrize("name", CRITERIA)
def test_what_is_shrunk_equals_what_is_masked(name: str, which: str, scope: str) -> None:
    _, groups, statistics = net(which)
    if not any(is_scored(name, groups, group, statistics) for group in groups.prunable):
        with pytest.raises(ArgumentError, match="cannot score any"):
            torchshear.plan(groups, name, 0.5, statistics=statistics, scope=scope)
        return
    plan = torchshear.plan(groups, name, 0.5, statistics=statistics, scope=scope)
    assert plan.n_cut
    assert plan_from_kept(groups, plan.kept).kept.keys() == plan.kept.keys(), "every minimum and balance holds"
    if scope == "global":  # what is cut is proved of random units, too; units of other scopes are no other kind
        assert proved(which, tuple((group, tuple(units.tolist())) for group, units in plan.kept.items())) < 1e-9


@cache
def proved(which: str, kept: tuple[tuple[str, tuple[int, ...]], ...]) -> float:
    """How far a network with these units is from the masked one."""
    model, groups, _ = net(which)
    plan = plan_from_kept(groups, {name: list(units) for name, units in kept})
    return torchshear.verify(model, torchshear.shrink(model, plan), plan, (NETS[which][1][0][0],)).max_error
