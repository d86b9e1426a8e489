"""Mixtures of experts, by how they route tokens and how they dispatch them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, INNER, TOKENS = 8, 8, 13
EXPERTS, CHOSEN = 12, 3
GROUPS, CHOSEN_GROUPS = 4, 2  # of experts, for routing that first chooses among groups of them

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
