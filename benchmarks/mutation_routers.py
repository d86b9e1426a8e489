"""Networks for `mutations.py` with values that are positions, and with operators of which nothing may shrink."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutation_layers import CASES, WITHOUT_CASE, Case
from mutation_networks import A, Network, between, index, linear, network, parameter, to

__all__ = ["CASES", "WITHOUT_CASE", "Case", "Network"]

EXPERTS, CODES = 6, 8


@torch.library.custom_op("mutations::runs", mutates_args=())
def runs(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """What torch._grouped_mm does, which torch.export takes in bfloat16 only."""
    out = input.new_zeros(input.shape[0], weight.shape[2])
    for matrix, start, end in zip(weight, [0, *offs.tolist()], offs.tolist(), strict=False):
        out[start:end] = input[start:end] @ matrix
    return out


@runs.register_fake
def _(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[2])


# --- who picks a position, and who reads it ---------------------------------------------------------------------------


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
        f"{name}.dim python.getitem", lambda m, x, f=getattr(torch, name): m.two(m.table(f(m.score(x), -1)[1])),
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
router("@sort @histc cumsum mutations.runs", lambda *given: in_runs(*given, "histc"))
router("@bincount", lambda *given: in_runs(*given, "bincount"))
network(
    "@index.Tensor", lambda m, x: m.two(m.codes[m.score(x).argmax(-1)]), (3, 5, 4),
    score=linear(4, CODES), codes=parameter(CODES, 6), two=linear(6, 3),
)  # fmt: skip

# --- nothing may shrink -----------------------------------------------------------------------------------------------


def square(x: Tensor) -> Tensor:
    """A matrix that is positive definite, of twelve units."""
    return x.mT @ x + torch.eye(12, dtype=x.dtype) * 3


T = "tokens"
between("linalg_cholesky", lambda x: x @ torch.linalg.cholesky(square(x)), T)
between("linalg_det", lambda x: x * torch.linalg.det(square(x))[:, None, None], T)
between("linalg_slogdet", lambda x: x * torch.linalg.slogdet(square(x))[1][:, None, None], T)
between("linalg_eigh", lambda x: x * torch.linalg.eigh(square(x))[0][:, None], T)
between("linalg_householder_product", lambda x: torch.linalg.householder_product(x.mT, x[:, :, 0]).mT, T)
between("linalg_inv", lambda x: x @ torch.linalg.inv(square(x)), T)
between("linalg_matrix_exp", lambda x: x @ torch.linalg.matrix_exp(square(x) * 0.01), T)
between("matrix_exp", lambda x: x @ A.matrix_exp(square(x) * 0.01), T)
between("linalg_pinv", lambda x: x @ torch.linalg.pinv(square(x)), T)
between("linalg_qr", lambda x: torch.linalg.qr(x)[1], T)
between("linalg_solve", lambda x: torch.linalg.solve(square(x), x.mT).mT, T)
between("linalg_svd", lambda x: x * torch.linalg.svd(square(x))[1][:, None], T)
between("linalg_svdvals", lambda x: x * torch.linalg.svdvals(square(x))[:, None], T)
between("linalg_cross", lambda x: torch.cat([torch.linalg.cross(x[..., :3], x[..., 3:6]), x[..., :9]], 2), T)
between("as_strided", lambda x: x.as_strided((3, 4), (12, 3)), "features", lambda: nn.Linear(4, 3))
between("view.dtype", lambda x: to(x.view(torch.int64) % 7, x))
between("take", lambda x: x * x.take(index(3, 5))[0])
between("put", lambda x: x.put(index(3, 5), x[0, :2]))
between("masked_scatter", lambda x: x.masked_scatter(x > 0, x.cos()))
between("fill_diagonal_", lambda x: (x.mT @ x)[0].fill_diagonal_(0.5), T)
between("diagonal_scatter", lambda x: (x.mT @ x)[0].diagonal_scatter(x[0, 0]), T)
between("affine_grid_generator", lambda x: functional.affine_grid(x.unflatten(1, (2, 2, 3))[:, 0], [3, 1, 2, 2], False).flatten(1), "features", lambda: nn.Linear(8, 3))
between("pdist", lambda x: x * functional.pdist(x.T).sum())
between("histc", lambda x: x * torch.histc(x, 4, -1, 1)[0])
between("searchsorted", lambda x: to(torch.searchsorted(torch.tensor([-0.2, 0.3], dtype=x.dtype), x), x))
between("bincount", lambda x: x * torch.bincount((x[0] > 0).to(torch.int64), minlength=2)[0])
between("nonzero masked_select", lambda x: x * x.masked_select(x > 0).sum() + x.nonzero().sum())
