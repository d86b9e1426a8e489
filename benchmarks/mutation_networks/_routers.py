"""Networks with values that are positions along an axis, as routers choose them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutation_networks._base import A, linear, network, parameter, to
from tests.networks.experts import runs

EXPERTS, CODES = 6, 8


def codes(operators: str, passed: Callable[[Tensor], Tensor]) -> None:
    """Each token picks a code; its number passes an operator before the code is looked up."""
    network(
        operators, lambda m, x: m.two(m.table(passed(m.score(x).argmax(-1)))), (3, 5, 4),
        score=linear(4, CODES), table=lambda: nn.Embedding(CODES, 6), two=linear(6, 3),
    )  # fmt: skip


for names, handed in {
    "@embedding argmax": lambda i: i,
    "@_to_copy": lambda i: A._to_copy(i, dtype=torch.int32),
    "@to": lambda i: i.to(torch.int32),
    "@alias": A.alias,
    "@clone": lambda i: i.clone(),
    "@contiguous": lambda i: A.contiguous(i),
    "@detach": lambda i: i.detach(),
    "@expand @unsqueeze": lambda i: i.unsqueeze(2).expand(-1, -1, 2),
    "@flatten.using_ints": lambda i: i.flatten(0, 1),
    "@permute": lambda i: i.permute(1, 0),
    "@reshape": lambda i: i.reshape(-1, 1, 5),
    "@view.default": lambda i: i.view(-1, 1, 5),
    "@select.int": lambda i: i[:, 2],
    "@slice.Tensor": lambda i: i[:, 1:3],
    "@squeeze": lambda i: i.unsqueeze(1).squeeze(1),
    "@t": lambda i: i.t(),
    "@transpose.int": lambda i: i.transpose(0, 1),
}.items():
    codes(names, handed)
network(
    "argmin", lambda m, x: m.two(m.table(m.score(x).argmin(-1))), (3, 5, 4),
    score=linear(4, CODES), table=lambda: nn.Embedding(CODES, 6), two=linear(6, 3),
)  # fmt: skip
for name in ("max", "min"):
    network(
        f"{name}.dim python.getitem", lambda m, x, name=name: m.two(m.table(getattr(torch, name)(m.score(x), -1)[1])),
        (3, 5, 4), score=linear(4, CODES), table=lambda: nn.Embedding(CODES, 6), two=linear(6, 3),
    )  # fmt: skip


def router(operators: str, run: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Two of six experts for each sample."""

    def routed(m: Any, x: Tensor) -> Tensor:
        weight, chosen = m.gate(x).softmax(-1).topk(2, -1)
        return m.two(run(m, x, weight, chosen))

    network(
        operators, routed, (7, 8), gate=linear(8, EXPERTS), up=parameter(EXPERTS, 8, 10),
        down=parameter(EXPERTS, 10, 8), two=linear(8, 3),
    )  # fmt: skip


def one_hot(m: Any, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Shares by a mask of all experts."""
    share = torch.einsum("bk,bke->be", weight, to(functional.one_hot(chosen, m.gate.weight.shape[0]), x))
    return _all_experts(m, x, share)


def scattered(m: Any, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Shares written to where the chosen experts are."""
    return _all_experts(m, x, torch.zeros_like(m.gate(x)).scatter(-1, chosen, weight))


def scattered_in_place(m: Any, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Ones written to where the chosen experts are."""
    return _all_experts(m, x, torch.zeros_like(m.gate(x)).scatter_(-1, chosen, 1.0))


def gathered(m: Any, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Other scores read at the chosen experts."""
    share = m.gate(x).sigmoid().gather(1, chosen)
    return _all_experts(m, x, torch.zeros_like(m.gate(x)).scatter(-1, chosen, share))


def picked(m: Any, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Matrices of the chosen experts alone."""
    inner = torch.einsum("bd,bkdf->bkf", x, m.up[chosen]).relu()
    return (torch.einsum("bkf,bkfd->bkd", inner, m.down[chosen]) * weight[..., None]).sum(1)


def in_runs(m: Any, x: Tensor, weight: Tensor, chosen: Tensor, counted: str) -> Tensor:
    """Rows in order of their experts, one run each."""
    expert, order = chosen.reshape(-1).sort()
    counts = (
        torch.histc(expert.to(x.dtype), EXPERTS, 0, EXPERTS - 1)
        if counted == "histc"
        else torch.bincount(expert, minlength=EXPERTS)
    )
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    out = runs(runs(x[order // 2], m.up, ends).relu(), m.down, ends) * weight.reshape(-1)[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // 2, out)


def _all_experts(m: Any, x: Tensor, share: Tensor) -> Tensor:
    inner = torch.einsum("bd,edf->bef", x, m.up).relu()
    return torch.einsum("bef,efd,be->bd", inner, m.down, share)


router("@one_hot topk python.getitem", one_hot)
router("@scatter topk", scattered)
router("@scatter_ topk", scattered_in_place)
router("@gather topk", gathered)
router("@index.Tensor topk", picked)
router("@sort @histc cumsum experts.runs", lambda *given: in_runs(*given, "histc"))
router("@bincount", lambda *given: in_runs(*given, "bincount"))
network(
    "@index.Tensor", lambda m, x: m.two(m.codes[m.score(x).argmax(-1)]), (3, 5, 4),
    score=linear(4, CODES), codes=parameter(CODES, 6), two=linear(6, 3),
)  # fmt: skip
