"""Positions chosen by data: whole experts go, with the router's rows, and nothing else is confused by it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from torchshear.pruners import plan_from_kept

KEPT = [0, 2, 3, 5]
WIDTH, EXPERTS, INNER = 8, 6, 10


class Router(nn.Module):
    """Two of six experts for each sample, whose weights are stored as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * 0.3)
        self.head = nn.Linear(WIDTH, 3)

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x).softmax(-1).topk(2, -1)


class OneHotRouter(Router):
    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.chosen(x)
        mask = functional.one_hot(index, self.gate.weight.shape[0]).to(x.dtype)
        share = torch.einsum("bk,bke->be", weight, mask)
        inner = torch.einsum("bd,edf->bef", x, self.up).relu()
        return self.head(torch.einsum("bef,efd,be->bd", inner, self.down, share))


class IndexingRouter(Router):
    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.chosen(x)
        inner = torch.einsum("bd,bkdf->bkf", x, self.up[index]).relu()
        return self.head((torch.einsum("bkf,bkfd->bkd", inner, self.down[index]) * weight[..., None]).sum(1))


class ScatteringRouter(Router):
    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.chosen(x)
        share = torch.zeros_like(self.gate(x)).scatter(-1, index, weight)
        inner = torch.einsum("bd,edf->bef", x, self.up).relu()
        return self.head(torch.einsum("bef,efd,be->bd", inner, self.down, share))


class SortingRouter(Router):
    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.chosen(x)
        expert, order = index.reshape(-1).sort()
        inner = torch.einsum("sd,sdf->sf", x[order // 2], self.up[expert]).relu()
        out = torch.einsum("sf,sfd->sd", inner, self.down[expert]) * weight.reshape(-1)[order][:, None]
        counts = torch.histc(expert.to(x.dtype), EXPERTS, 0, EXPERTS - 1)
        balance = (counts * torch.ones_like(self.gate.bias)).sum() * 0.1
        return self.head(torch.zeros_like(x).index_add(0, order // 2, out)) + balance


@pytest.mark.parametrize("kind", [OneHotRouter, IndexingRouter, ScatteringRouter, SortingRouter])
def test_experts_go_with_the_routers_rows(kind: type[Router]) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    experts = next(g for g in groups if {(m.name, m.dim) for m in g.members} >= {("gate.weight", 0), ("up", 0)})
    assert {(m.name, m.dim) for m in experts.members} >= {("gate.bias", 0), ("down", 0)}
    assert experts.is_cross_channel
    plan = plan_from_kept(groups, {experts.name: KEPT})
    small = torchshear.shrink(model, plan)
    with torch.no_grad():  # a router that can never choose what is gone
        model.gate.bias[[1, 4]] = -torch.inf
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert small(x[:2]).shape == (2, 3)


def test_as_many_experts_stay_as_are_chosen() -> None:
    model = OneHotRouter().eval()
    result = torchshear.prune(model, (torch.randn(4, WIDTH),), ratio=0.9)
    assert dict(result.model.named_parameters())["gate.weight"].shape[0] == 2


class Quantizer(nn.Module):
    """The nearest of some codes, looked up in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 5, bias=False)
        self.codes = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.codes(self.score(x).argmax(-1)))


def test_codes_go_with_the_rows_of_their_table() -> None:
    torch.manual_seed(0)
    model = Quantizer().double().eval()
    x = torch.randn(9, WIDTH, dtype=torch.float64)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    codes = next(g for g in groups if g.name == "score.weight[0]")
    assert {(m.name, m.dim) for m in codes.members} == {("score.weight", 0), ("codes.weight", 0)}
    small = torchshear.shrink(model, plan_from_kept(groups, {codes.name: [1, 2, 4]}))
    scores = model.score(x)
    scores[:, [0, 3]] = -torch.inf
    torch.testing.assert_close(small(x), model.head(model.codes(scores.argmax(-1))), rtol=1e-12, atol=1e-12)


class Arithmetic(Quantizer):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.codes((self.score(x).argmax(-1) + 1) % 5))


class Returned(Quantizer):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        index = self.score(x).argmax(-1)
        return self.head(self.codes(index)), index


@pytest.mark.parametrize(
    ("kind", "reason"), [(Arithmetic, "that this operator computes with"), (Returned, "are model output")]
)
def test_positions_that_are_computed_with_or_returned_stay(kind: type[Quantizer], reason: str) -> None:
    groups = torchshear.analyze(torchshear.trace(kind().eval(), (torch.randn(9, WIDTH),)))
    fixed = {(f.name, f.dim): f.reason for f in groups.fixed}
    assert reason in fixed["score.weight", 0]
