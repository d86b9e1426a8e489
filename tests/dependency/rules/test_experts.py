"""Mixtures of experts, by how they route and how they dispatch, against a loop over tokens and the experts kept."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from torchshear.dependency import ChannelGroups, masked_operator, operator_rule, unregister
from torchshear.dependency.rules._choosing import grouped_product
from torchshear.pruners import plan_from_kept

WIDTH, INNER, TOKENS = 8, 8, 13
EXPERTS, CHOSEN = 12, 3
GROUPS, CHOSEN_GROUPS = 4, 2  # of experts, for routing that first chooses among groups of them
KEPT_GROUPS, KEPT_IN_GROUP = [0, 2, 3], [0, 2]
KEPT_EXPERTS = [group * (EXPERTS // GROUPS) + place for group in KEPT_GROUPS for place in KEPT_IN_GROUP]
KEPT_INNER = [0, 3, 4, 6]

Routed = tuple[Tensor, Tensor]


@torch.library.custom_op("experts::runs", mutates_args=())
def runs(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """What torch._grouped_mm does, which torch.export takes in bfloat16 only."""
    out = input.new_zeros(input.shape[0], weight.shape[2])
    for matrix, start, end in zip(weight, [0, *offs.tolist()], offs.tolist(), strict=False):
        out[start:end] = input[start:end] @ matrix
    return out


@runs.register_fake
def _(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[2])


@pytest.fixture(autouse=True)
def _with_rule() -> Iterator[None]:
    operator_rule("experts.runs")(grouped_product)
    masked_operator("experts.runs")(lambda call: call.run())
    yield
    unregister("experts.runs")


class Mixture(nn.Module):
    """Experts between two linear layers, and one that every token passes."""

    def __init__(self, routing: str, dispatch: str) -> None:
        super().__init__()
        self.routing, self.dispatch = routing, dispatch
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.register_buffer("correction", torch.randn(EXPERTS))
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * 0.3)
        self.shared = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, WIDTH))
        self.shared_gate = nn.Linear(WIDTH, 1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weight, index = ROUTINGS[self.routing](self, self.router(x))
        out = DISPATCHES[self.dispatch](self, x, weight, index)
        return self.head(out + self.shared(x) * self.shared_gate(x).sigmoid())


def softmax_then_topk(_: Mixture, logits: Tensor) -> Routed:
    weight, index = logits.softmax(-1).topk(CHOSEN, -1)
    return weight, index


def normalized_topk(_: Mixture, logits: Tensor) -> Routed:
    weight, index = logits.softmax(-1).topk(CHOSEN, -1)
    weight /= weight.sum(-1, keepdim=True)
    return weight, index


def topk_then_softmax(_: Mixture, logits: Tensor) -> Routed:
    weight, index = logits.topk(CHOSEN, -1)
    return weight.softmax(-1), index


def corrected_sigmoid(model: Mixture, logits: Tensor) -> Routed:
    scores = logits.sigmoid()
    index = (scores + model.correction).topk(CHOSEN, -1, sorted=False)[1]
    weight = scores.gather(1, index)
    return 2.5 * weight / (weight.sum(-1, keepdim=True) + 1e-20), index


def group_limited(model: Mixture, logits: Tensor) -> Routed:
    scores = logits.sigmoid()
    choice = scores + model.correction
    of_groups = choice.view(-1, GROUPS, EXPERTS // GROUPS).topk(2, -1)[0].sum(-1)
    groups = of_groups.topk(CHOSEN_GROUPS, -1, sorted=False)[1]
    mask = torch.zeros_like(of_groups).scatter_(1, groups, 1)
    mask = mask.unsqueeze(-1).expand(-1, GROUPS, EXPERTS // GROUPS).reshape(-1, EXPERTS)
    index = choice.masked_fill(~mask.bool(), -torch.inf).topk(CHOSEN, -1)[1]
    return scores.gather(1, index), index


ROUTINGS: dict[str, Callable[[Mixture, Tensor], Routed]] = {
    function.__name__: function
    for function in (softmax_then_topk, normalized_topk, topk_then_softmax, corrected_sigmoid, group_limited)
}


def _gated(value: Tensor) -> Tensor:
    gate, up = value.chunk(2, -1)
    return functional.silu(gate) * up


def dense(model: Mixture, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    share = torch.zeros_like(model.router(x)).scatter(-1, index, weight)
    each = _gated(torch.einsum("bd,edf->bef", x, model.gate_up))
    return torch.einsum("bef,efd,be->bd", each, model.down, share)


def picked(model: Mixture, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    rows = x.repeat_interleave(CHOSEN, 0).unsqueeze(1)
    out = _gated(rows.bmm(model.gate_up[index.reshape(-1)])).bmm(model.down[index.reshape(-1)])
    return (out.squeeze(1) * weight.reshape(-1, 1)).view(-1, CHOSEN, WIDTH).sum(1)


def grouped(model: Mixture, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    expert, order = index.reshape(-1).sort()
    counts = torch.histc(expert.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    out = runs(_gated(runs(x[order // CHOSEN], model.gate_up, ends)), model.down, ends)
    out = out * weight.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return out[back].view(-1, CHOSEN, WIDTH).sum(1)


DISPATCHES: dict[str, Callable[[Mixture, Tensor, Tensor, Tensor], Tensor]] = {
    function.__name__: function for function in (dense, picked, grouped)
}


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
