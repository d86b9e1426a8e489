"""Mixtures of experts, by how they route and how they dispatch, against a loop over tokens and the experts kept."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import torchshear
from tests.networks.experts import CHOSEN, CHOSEN_GROUPS, DISPATCHES, EXPERTS, GROUPS, ROUTINGS, TOKENS, WIDTH, Mixture
from torchshear.dependency import ChannelGroups, masked_operator, operator_rule, unregister
from torchshear.dependency.rules._choosing import grouped_product
from torchshear.pruners import plan_from_kept

KEPT_GROUPS, KEPT_IN_GROUP = [0, 2, 3], [0, 2]
KEPT_EXPERTS = [group * (EXPERTS // GROUPS) + place for group in KEPT_GROUPS for place in KEPT_IN_GROUP]
KEPT_INNER = [0, 3, 4, 6]


@pytest.fixture(autouse=True)
def _with_rule() -> Iterator[None]:
    operator_rule("experts.runs")(grouped_product)
    masked_operator("experts.runs")(lambda call: call.run())
    yield
    unregister("experts.runs")


def best(values: dict[int, float], count: int) -> list[int]:
    return sorted(values, key=lambda key: -values[key])[:count]


def shares(model: Mixture, logits: dict[int, float]) -> dict[int, float]:
    """Chosen expert -> its weight, for one token, from the logits of those experts that are there."""
    power = {e: math.exp(value) for e, value in logits.items()}
    sigmoid = {e: 1 / (1 + math.exp(-value)) for e, value in logits.items()}
    choice = {e: sigmoid[e] + float(model.correction[e]) for e in logits}
    if model.routing == "softmax_then_topk":
        return {e: power[e] / sum(power.values()) for e in best(logits, CHOSEN)}
    if model.routing in ("normalized_topk", "topk_then_softmax"):
        chosen = best(logits, CHOSEN)
        return {e: power[e] / sum(power[other] for other in chosen) for e in chosen}
    if model.routing == "corrected_sigmoid":
        chosen = best(choice, CHOSEN)
        return {e: 2.5 * sigmoid[e] / sum(sigmoid[other] for other in chosen) for e in chosen}
    members = {g: [e for e in logits if e // (EXPERTS // GROUPS) == g] for g in range(GROUPS)}
    totals = {g: sum(sorted(choice[e] for e in own)[-2:]) for g, own in members.items() if own}
    allowed = {e: choice[e] for g in best(totals, CHOSEN_GROUPS) for e in members[g]}
    return {e: sigmoid[e] for e in best(allowed, CHOSEN)}


def oracle(model: Mixture, x: Tensor, experts: list[int], inner: list[int]) -> Tensor:
    """What the model computes in float64 with some experts and some of their inner channels, token by token."""
    rows = []
    for token in model.stem(x):
        logits = {e: float(model.router.weight[e] @ token) for e in experts}
        out = model.shared(token) * model.shared_gate(token).sigmoid()
        for expert, share in shares(model, logits).items():
            gate, up = (token @ model.gate_up[expert]).chunk(2)
            hidden = (functional.silu(gate) * up)[inner]
            out = out + share * (hidden @ model.down[expert][inner])
        rows.append(model.head(out))
    return torch.stack(rows)


def traced(model: Mixture, x: Tensor) -> tuple[ChannelGroups, dict[int, str]]:
    """The groups, and those of experts by the number of their units; none of them is fixed."""
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    fixed = {"stem.weight", "head.weight", "head.bias"}  # by input and output
    assert {entry.name for entry in groups.fixed} == fixed
    experts = [g for g in groups if ("router.weight", 0) in {(member.name, member.dim) for member in g.members}]
    for group in experts:
        assert {(member.name, member.dim) for member in group.members} >= {("gate_up", 0), ("down", 0)}
    return groups, {group.width: group.name for group in experts}


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_tokens_choose_among_the_experts_that_are_left(routing: str, dispatch: str) -> None:
    torch.manual_seed(0)
    model = Mixture(routing, dispatch).double().eval()
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    groups, experts = traced(model, x)
    choice = {EXPERTS: KEPT_EXPERTS, GROUPS: KEPT_GROUPS, EXPERTS // GROUPS: KEPT_IN_GROUP}
    kept = {name: choice[width] for width, name in experts.items()} | {"gate_up[2]": KEPT_INNER}
    plan = plan_from_kept(groups, kept)
    small = torchshear.shrink(model, plan)
    assert torchshear.verify(model, small, plan, (x,)).reference == "kept positions"
    with torch.no_grad():
        torch.testing.assert_close(small(x), oracle(model, x, KEPT_EXPERTS, KEPT_INNER), rtol=1e-12, atol=1e-12)
        assert small(x[:2]).shape == (2, 3)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_as_many_experts_stay_as_a_token_may_choose(routing: str) -> None:
    """Also among the groups of experts that a token chooses first, whichever stay."""
    torch.manual_seed(1)
    model = Mixture(routing, "dense").double().eval()
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    groups, experts = traced(model, x)
    least = {group.width: group.min_units for group in groups if group.name in experts.values()}
    assert least == ({GROUPS: 2, EXPERTS // GROUPS: 2} if routing == "group_limited" else {EXPERTS: CHOSEN})
    result = torchshear.prune(model, (x,), ratio=0.99, form="traced")
    left = 4 if routing == "group_limited" else CHOSEN
    assert dict(result.model.named_parameters())["router.weight"].shape[0] == left
