"""Networks with products, convolutions and attention."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutation_networks._base import A, between, branches, index, linear, network, parameter

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BACK = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SPACE = {1: (8,), 2: (6, 6), 3: (4, 4, 4)}

network("linear", lambda m, x: m.two(m.one(x).relu()), (3, 4), one=linear(4, 12), two=linear(12, 3))
network("linear", lambda m, x: m.two(m.one(x).softmax(1)), (3, 4), one=linear(4, 12), two=linear(12, 3))
network(
    "linear", lambda m, x: functional.linear(m.one(x), m.two(m.table)), (3, 4),
    one=linear(4, 12), two=linear(5, 12), table=parameter(3, 5),
)  # fmt: skip
for name, product in {"matmul": torch.matmul, "mm": torch.mm}.items():
    network(
        name, lambda m, x, f=product: f(f(x, m.v).relu(), m.w), (3, 4), v=parameter(4, 12), w=parameter(12, 3)
    )  # fmt: skip
network(
    "addmm", lambda m, x: torch.addmm(m.c, torch.addmm(m.b, x, m.v).relu(), m.w),
    (3, 4), v=parameter(4, 12), w=parameter(12, 3), b=parameter(12), c=parameter(3),
)  # fmt: skip
between("matmul", lambda x: (x @ x.mT).softmax(2) @ x, "tokens")
between("matmul", lambda x: (x.mT @ x).sin().sum(1), "tokens")
between("bmm", lambda x: torch.bmm(torch.bmm(x, x.mT), x), "tokens")
between("bmm", lambda x: torch.bmm(x.mT, x.sin()).sin().sum(1), "tokens")
between("baddbmm", lambda x: torch.baddbmm(x.sin(), x @ x.mT, x), "tokens")
between("addbmm", lambda x: torch.addbmm(x[0], x @ x.mT, x), "tokens")
network(
    "mv addmv", lambda m, x: m.two(torch.addmv(m.b, m.v, torch.mv(m.w, x.sum(0)))), (3, 4),
    v=parameter(12, 6), w=parameter(6, 4), b=parameter(12), two=linear(12, 3),
)  # fmt: skip
network("mv", lambda m, x: m.two(torch.mv(m.w, x.sum(0))), (3, 4), w=parameter(12, 4), two=linear(12, 3))
between("mv", lambda x: torch.mv(x, x.sum(0)).unsqueeze(1) * x)
between("addmv", lambda x: torch.addmv(x.sum(1), x, x.sum(0)).unsqueeze(1) * x)
between("dot vdot", lambda x: x * torch.dot(x[0], x[1]) + torch.vdot(x[0], x[2]))
between("inner", lambda x: torch.inner(x, x.sin()).sum(1, True) * x)
network("inner", lambda m, x: m.two(torch.inner(x, m.v)), (3, 4), v=parameter(12, 4), two=linear(12, 3))
between("outer", lambda x: torch.outer(x.sum(1), x.sum(0)))
between("ger", lambda x: A.ger(x.sum(1), x.sum(0)))
between("addr", lambda x: torch.addr(x.sin(), x.sum(1), x.sum(0)))
between("kron", lambda x: torch.kron(x.sum(0), index(1, 2).to(x.dtype)), "features", lambda: nn.Linear(24, 3))
between("kron", lambda x: torch.kron(index(1, 2).to(x.dtype), x.sum(0)), "features", lambda: nn.Linear(24, 3))
network(
    "linalg_multi_dot", lambda m, x: m.two(torch.linalg.multi_dot([x, m.v, m.w])), (3, 4),
    v=parameter(4, 10), w=parameter(10, 12), two=linear(12, 3),
)  # fmt: skip
network(
    "chain_matmul", lambda m, x: m.two(A.chain_matmul([x, m.v, m.w])), (3, 4),
    v=parameter(4, 10), w=parameter(10, 12), two=linear(12, 3),
)  # fmt: skip
between("linalg_multi_dot", lambda x: torch.linalg.multi_dot([x, x.T, x]))
network(
    "tensordot", lambda m, x: m.two(torch.tensordot(x, m.v, ([1], [1]))), (3, 4),
    v=parameter(12, 4), two=linear(12, 3),
)  # fmt: skip
between("tensordot", lambda x: torch.tensordot(x, x, ([1], [1])).sum(1, True) * x)
network(
    "einsum", lambda m, x: m.two(torch.einsum("btd,dh->bth", x, m.v)), (3, 5, 4), v=parameter(4, 12), two=linear(12, 3)
)  # fmt: skip
between("einsum", lambda x: torch.einsum("bti,bsi,bsj->btj", x, x, x), "tokens")
between("einsum", lambda x: torch.einsum("...i,...i->...i", x, x), "tokens")
between("einsum", lambda x: torch.einsum("bti,btj->bji", x, x.sin()).sin().sum(1), "tokens")
network(
    "bilinear", lambda m, x: m.two(m.both(m.a(x), m.b(x)).relu()), (3, 4),
    a=linear(4, 12), b=linear(4, 10), both=lambda: nn.Bilinear(12, 10, 8), two=linear(8, 3),
)  # fmt: skip
network(
    "embedding", lambda m, x: m.two(m.table(x).relu()), torch.arange(12).view(3, 4),
    table=lambda: nn.Embedding(13, 12), two=linear(12, 3),
)  # fmt: skip
network(
    "embedding", lambda m, x: m.two(m.table(x).softmax(-1)), torch.arange(12).view(3, 4),
    table=lambda: nn.Embedding(13, 12), two=linear(12, 3),
)  # fmt: skip
for mode in ("mean", "sum", "max"):
    network(
        "embedding_bag", lambda m, x: m.two(m.table(x)), torch.arange(12).view(3, 4),
        table=lambda mode=mode: nn.EmbeddingBag(13, 12, mode=mode), two=linear(12, 3),
    )  # fmt: skip

for n, space in SPACE.items():
    for options in ({}, {"groups": 4}, {"groups": 12}):
        network(
            f"conv{n}d", lambda m, x: m.two(m.mid(m.one(x)).relu()), (3, 4, *space),
            one=lambda n=n: CONV[n](4, 12, 1), two=lambda n=n: CONV[n](12, 3, 1),
            mid=lambda n=n, options=options: CONV[n](12, 12, 3, padding=1, **options),
        )  # fmt: skip
        network(
            f"conv_transpose{n}d", lambda m, x: m.two(m.mid(m.one(x)).relu()), (3, 4, *space),
            one=lambda n=n: CONV[n](4, 12, 1), two=lambda n=n: CONV[n](12, 3, 1),
            mid=lambda n=n, options=options: BACK[n](12, 12, 2, stride=2, **options),
        )  # fmt: skip
network(
    "conv2d", lambda m, x: m.two(m.mid(m.one(x)).softmax(1)), (3, 4, 6, 6), one=lambda: CONV[2](4, 12, 1),
    mid=lambda: CONV[2](12, 24, 3, groups=12), two=lambda: CONV[2](24, 3, 1),
)  # fmt: skip
network(
    "conv_transpose2d", lambda m, x: m.two(m.mid(m.one(x)).relu()), (3, 4, 6, 6), one=lambda: CONV[2](4, 12, 1),
    mid=lambda: BACK[2](12, 24, 2, groups=12), two=lambda: CONV[2](24, 3, 1),
)  # fmt: skip
between("conv1d", lambda x: functional.conv1d(x, x.new_ones(5, 5, 1)), "tokens")


def filter_each_sample(n: int, turned: bool) -> Any:
    """Convolve each sample with filters of its own: a weight times a style, one number an input channel."""
    convolve = getattr(functional, f"conv{'_transpose' if turned else ''}{n}d")

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.one(x)
        b, channels, space = len(h), h.shape[1], h.shape[2:]
        style = m.style(x.flatten(2).mean(2)).view(b, 1, channels, *(1,) * n)
        weight = (m.w * style).transpose(1, 2) if turned else m.w * style
        y = convolve(h.reshape(1, -1, *space), weight.reshape(-1, *weight.shape[2:]), groups=b)
        return m.two(y.view(b, -1, *y.shape[2:]).relu())

    return run


for n, space in SPACE.items():
    for turned in (False, True):
        network(
            f"conv{'_transpose' if turned else ''}{n}d", filter_each_sample(n, turned), (3, 4, *space),
            one=lambda n=n: CONV[n](4, 12, 1), two=lambda n=n: CONV[n](10, 3, 1), style=linear(4, 12),
            w=parameter(1, 10, 12, *(3,) * n),
        )  # fmt: skip
network(
    "conv_tbc", lambda m, x: m.two(torch.conv_tbc(m.one(x).transpose(0, 1).contiguous(), m.w, m.b).transpose(0, 1)),
    (3, 6, 4), one=linear(4, 10), w=parameter(3, 10, 12), b=parameter(12), two=linear(12, 3),
)  # fmt: skip


def attend(heads: int, key_heads: int, masked: bool) -> Any:
    """Attention with heads; fewer for keys and values, or with a mask."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (
            m.q(x).unflatten(2, (heads, 4)),
            m.k(x).unflatten(2, (key_heads, 4)),
            m.v(x).unflatten(2, (key_heads, 6)),
        )
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if masked else None
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, enable_gqa=heads != key_heads
        )
        return m.two(out.transpose(1, 2).flatten(2))

    return run


for heads, key_heads, masked in ((4, 4, False), (4, 4, True), (6, 3, False)):
    network(
        "scaled_dot_product_attention", attend(heads, key_heads, masked), (3, 5, 8), q=linear(8, 4 * heads),
        k=linear(8, 4 * key_heads), v=linear(8, 6 * key_heads), two=linear(6 * heads, 3),
    )  # fmt: skip
network(
    "scaled_dot_product_attention", lambda m, x: m.two(functional.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x))),
    (3, 5, 8), q=linear(8, 10), k=linear(8, 10), v=linear(8, 12), two=linear(12, 3),
)  # fmt: skip
between(
    "scaled_dot_product_attention",
    lambda x: functional.scaled_dot_product_attention(x.mT, x.mT.sin(), x.mT.cos()).mT,
    "tokens",
)

# --- two branches -----------------------------------------------------------------------------------------------------
branches("matmul", lambda a, b: a @ b.mT @ b, "tokens")
branches("bmm", lambda a, b: torch.bmm(torch.bmm(a, b.mT), b), "tokens")
branches("baddbmm", lambda a, b: torch.baddbmm(a, a @ a.mT, b), "tokens")
branches("addbmm", lambda a, b: torch.addbmm(a[0], a @ a.mT, b), "tokens")
branches("einsum", lambda a, b: torch.einsum("bti,bsi->bts", a, b) @ b, "tokens")
branches("einsum", lambda a, b: torch.einsum("bti,bti->bti", a, b), "tokens")
branches("dot vdot", lambda a, b: b * torch.dot(a[0], b[0]) + torch.vdot(a[0], b[2]))
branches("mv", lambda a, b: b * torch.mv(a, b.sum(0)).unsqueeze(1))
branches("addmv", lambda a, b: b * torch.addmv(a.sum(1), a, b.sum(0)).unsqueeze(1))
branches("inner", lambda a, b: b * torch.inner(a, b).sum(1, True))
branches("tensordot", lambda a, b: b * torch.tensordot(a, b, ([1], [1])).sum(1, True))
branches("linalg_multi_dot", lambda a, b: torch.linalg.multi_dot([a, b.T, b]))
branches("chain_matmul", lambda a, b: A.chain_matmul([a, b.T, b]))
branches("addr", lambda a, b: torch.addr(a, a.sum(1), b.sum(0)))
branches("outer", lambda a, b: torch.outer(a.sum(1), b.sum(0)))
branches(
    "scaled_dot_product_attention", lambda a, b: functional.scaled_dot_product_attention(a, b, b.sin()), "tokens"
)  # fmt: skip
