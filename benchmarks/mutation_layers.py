"""More networks for `mutations.py`: layers with weights, products, indices, space, recurrent layers, routers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutation_networks import UNITS, A, Case, CASES, Network, along, between, index, linear, network, parameter, to

__all__ = ["CASES", "Case", "Network", "WITHOUT_CASE"]

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BACK = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MAPS = {1: "signals", 2: "maps", 3: "volumes"}
SPACE = {1: (8,), 2: (6, 6), 3: (4, 4, 4)}

WITHOUT_CASE = {
    "transformers.grouped_mm_fallback": "its own package registers it, which is an extra; it has the rule of "
    "aten._grouped_mm, which torch.export takes in bfloat16 alone. An operator of this script stands for both.",
    "aten._grouped_mm": "see transformers.grouped_mm_fallback",
}

# --- products ---------------------------------------------------------------------------------------------------------
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
between("matmul", lambda x: x.mT @ x, "tokens")
between("bmm", lambda x: torch.bmm(torch.bmm(x, x.mT), x), "tokens")
between("bmm", lambda x: torch.bmm(x.mT, x.sin()), "tokens")
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
between("einsum", lambda x: torch.einsum("bti,btj->bji", x, x.sin()), "tokens")
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

# --- convolutions -----------------------------------------------------------------------------------------------------
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
network(
    "conv_tbc", lambda m, x: m.two(torch.conv_tbc(m.one(x).transpose(0, 1).contiguous(), m.w, m.b).transpose(0, 1).relu()),
    (3, 6, 4), one=linear(4, 10), w=parameter(3, 10, 12), b=parameter(12), two=linear(12, 3),
)  # fmt: skip

# --- attention --------------------------------------------------------------------------------------------------------


def attend(heads: int, key_heads: int, masked: bool) -> Any:
    """Attention with heads; fewer for keys and values, or with a mask."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.q(x).unflatten(2, (heads, 4)), m.k(x).unflatten(2, (key_heads, 4)), m.v(x).unflatten(2, (key_heads, 6))
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
between("scaled_dot_product_attention", lambda x: functional.scaled_dot_product_attention(x.mT, x.mT.sin(), x.mT.cos()).mT, "tokens")

# --- positions named by an index --------------------------------------------------------------------------------------
ORDER = (5, 3, 7, 0, 11, 1, 2, 4, 6, 8, 10, 9)
between("index_select", lambda x: x.index_select(1, torch.tensor(ORDER)))
between("index_select", lambda x: x.index_select(1, index(4, 1)), "tokens")
between("index.Tensor", lambda x: x[:, list(ORDER)])
between("index.Tensor", lambda x: x[:, index(1, 9, 4, 3)], "features", lambda: nn.Linear(4, 3))
between("index.Tensor", lambda x: x[:, index(4, 1, 1)], "tokens")
between("index.Tensor", lambda x: x[:, index(2, 0), index(1, 3)], "rows")
between("index.Tensor", lambda x: x.mT[..., index(2, 0).view(1, 2)].sum(3).mT, "tokens")
between("gather", lambda x: x.gather(1, along(x, 2, 0, 1)), "tokens")
between("take_along_dim", lambda x: x.take_along_dim(index(2, 0).view(1, 2, 1), 1), "tokens")
for op in "scatter scatter_ scatter_add scatter_add_".split():
    between(op, lambda x, op=op: getattr(x.cos(), op)(1, along(x, 1, 3), x[:, :2]), "tokens")
between("scatter scatter_", lambda x: x.scatter(1, along(x, 1), 0.5).scatter_(1, along(x, 2), 0.3), "tokens")
between("scatter_reduce", lambda x: x.scatter_reduce(1, along(x, 3), x[:, :1], "amax"), "tokens")
for op in "index_add index_add_ index_copy index_copy_".split():
    between(op, lambda x, op=op: getattr(x.cos(), op)(1, index(1, 3), x[:, 1:3]), "tokens")
between("index_reduce", lambda x: A.index_reduce(x.cos(), 1, index(1, 3), x[:, 1:3], "prod"), "tokens")
between("index_fill", lambda x: x.index_fill(1, index(0, 2), 0.5), "tokens")
between("index_fill_", lambda x: x.sin().index_fill_(1, index(0, 2), 0.5), "tokens")
between("index_put", lambda x: x.index_put((torch.arange(1), index(2)), x[:1, 0]), "tokens")
between("index_put_", lambda x: _written(x), "tokens")
between("index_put", lambda x: A.index_put(x.cos(), [None, index(0, 2)], x[:, :2]), "tokens")
between("one_hot", lambda x: x.sin() + to(functional.one_hot(torch.arange(5) % 3, 12), x), "tokens")
between("bucketize.Tensor", lambda x: to(torch.bucketize(x, torch.tensor([-0.2, 0.3], dtype=x.dtype)), x))


def _written(x: Tensor) -> Tensor:
    y = x.cos()
    y[:, index(0, 2)] = x[:, :2]
    return y


# --- space ------------------------------------------------------------------------------------------------------------
for n in SPACE:
    for op in ("avg_pool", "max_pool"):
        between(f"{op}{n}d", lambda x, f=getattr(functional, f"{op}{n}d"): f(x, 2), MAPS[n])
    half = tuple(size // 2 for size in SPACE[n])
    between(f"adaptive_avg_pool{n}d", lambda x, n=n, half=half: getattr(A, f"adaptive_avg_pool{n}d")(x, half), MAPS[n])
    between(f"adaptive_max_pool{n}d", lambda x, n=n, half=half: getattr(A, f"adaptive_max_pool{n}d")(x, half)[0], MAPS[n])
    between(f"max_pool{n}d_with_indices", lambda x, n=n: getattr(A, f"max_pool{n}d_with_indices")(x, [2] * n)[0], MAPS[n])
    between(f"upsample_nearest{n}d", lambda x, n=n: functional.interpolate(x, scale_factor=2), MAPS[n])
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[n]
    between(f"upsample_{mode}{n}d", lambda x, mode=mode: functional.interpolate(x, scale_factor=2, mode=mode), MAPS[n])
between("avg_pool2d", lambda x: functional.avg_pool2d(x.unsqueeze(1), (2, 1), 1).squeeze(1), "tokens")
between("max_pool2d", lambda x: functional.max_pool2d(x.mT, (1, 2), 1).mT, "tokens")
between("upsample_bicubic2d", lambda x: functional.interpolate(x, scale_factor=2, mode="bicubic"), "maps")
for mode in ("bicubic", "bilinear"):
    between(f"_upsample_{mode}2d_aa", lambda x, mode=mode: functional.interpolate(x, (4, 4), mode=mode, antialias=True), "maps")
between("_upsample_nearest_exact2d", lambda x: functional.interpolate(x, (4, 4), mode="nearest-exact"), "maps")


def unpooled(n: int) -> Any:
    """Maxima put back to where they were."""

    def call(x: Tensor) -> Tensor:
        values, where = getattr(functional, f"max_pool{n}d")(x, 2, return_indices=True)
        return getattr(functional, f"max_unpool{n}d")(values, where, 2)

    return call


between("max_unpool2d", unpooled(2), "maps")
between("max_unpool3d", unpooled(3), "volumes")


def grid(n: int, x: Tensor) -> Tensor:
    """Places to read, the same for every sample."""
    axis = torch.linspace(-0.9, 0.8, 4, dtype=x.dtype)
    return torch.stack(torch.meshgrid(*[axis] * n, indexing="ij"), -1).expand(x.shape[0], *[-1] * (n + 1))


between("grid_sampler", lambda x: functional.grid_sample(x, grid(2, x), align_corners=False), "maps")
between("grid_sampler_2d", lambda x: A.grid_sampler_2d(x, grid(2, x), 0, 0, False), "maps")
between("grid_sampler_3d", lambda x: A.grid_sampler_3d(x, grid(3, x), 0, 0, False), "volumes")
for op in "fft ifft rfft hfft ihfft".split():
    between(f"fft_{op}", lambda x, op=op: torch.view_as_real(getattr(torch.fft, op)(x, dim=1) + 0j)[..., 0].abs(), "tokens")
between("fft_irfft", lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=5, dim=1), "tokens")
for op in "fft2 ifft2 fftn ifftn rfft2 rfftn".split():
    between(f"fft_{op}", lambda x, op=op: getattr(torch.fft, op)(x, dim=(2, 3)).real, "maps")
for op in "irfft2 irfftn".split():
    between(f"fft_{op}", lambda x, op=op: getattr(torch.fft, op)(torch.fft.rfft2(x), s=(6, 6), dim=(2, 3)), "maps")
for op in "fftshift ifftshift".split():
    between(f"fft_{op}", lambda x, op=op: getattr(torch.fft, op)(x, dim=(1,)), "tokens")
for shape in ((3, 4, 3, 3),):
    network(
        "pixel_shuffle", lambda m, x: m.two(functional.pixel_shuffle(m.one(x), 2)), shape,
        one=lambda: CONV[2](4, 48, 1), two=lambda: CONV[2](12, 3, 1),
    )  # fmt: skip
network(
    "pixel_unshuffle", lambda m, x: m.two(functional.pixel_unshuffle(m.one(x), 2)), (3, 4, 6, 6),
    one=lambda: CONV[2](4, 12, 1), two=lambda: CONV[2](48, 3, 1),
)  # fmt: skip
between("channel_shuffle", lambda x: functional.channel_shuffle(x, 3), "maps")
between("native_channel_shuffle", lambda x: A.native_channel_shuffle(x, 3), "maps")
between("im2col col2im", lambda x: functional.fold(functional.unfold(x, 2, stride=2), 6, 2, stride=2), "maps")
network(
    "im2col", lambda m, x: m.two(functional.unfold(m.one(x), 2, stride=2).mT), (3, 4, 6, 6),
    one=lambda: CONV[2](4, 12, 1), two=linear(48, 3),
)  # fmt: skip
network(
    "col2im", lambda m, x: m.two(functional.fold(m.one(x).mT, 6, 2, stride=2)), (3, 9, 4),
    one=linear(4, 48), two=lambda: CONV[2](12, 3, 1),
)  # fmt: skip

# --- recurrent --------------------------------------------------------------------------------------------------------
for name, make in {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}.items():
    given = {"nonlinearity": "relu"} if name == "rnn_relu" else {}
    for options in ({"batch_first": True}, {"num_layers": 2, "bidirectional": True, "batch_first": True}):
        wide = 24 if "bidirectional" in options else 12
        build = lambda make=make, options={**given, **options}: make(8, 12, **options)  # noqa: E731
        network(
            f"{name}.input", lambda m, x: m.two(m.layer(m.one(x))[0]), (3, 5, 4),
            one=linear(4, 8), layer=build, two=linear(wide, 3),
        )  # fmt: skip

        def last(m: Any, x: Tensor) -> Tensor:
            """Final states of the last layer."""
            state = m.layer(m.one(x))[1]
            state = state[0] if isinstance(state, tuple) else state
            return m.two(state[-1])

        network(f"{name}.input", last, (3, 5, 4), one=linear(4, 8), layer=build, two=linear(12, 3))
network(
    "lstm.input", lambda m, x: m.two(m.layer(m.one(x))[0]), (3, 5, 4), one=linear(4, 8),
    layer=lambda: nn.LSTM(8, 12, 2, batch_first=True, proj_size=6), two=linear(6, 3),
)  # fmt: skip
network(
    "lstm.input", lambda m, x: m.two(m.other(m.one(x), m.layer(m.one(x))[1])[0]), (3, 5, 4), one=linear(4, 8),
    layer=lambda: nn.LSTM(8, 12, 2, batch_first=True), other=lambda: nn.LSTM(8, 12, 2, batch_first=True), two=linear(12, 3),
)  # fmt: skip
for name, make in {
    "lstm_cell": nn.LSTMCell,
    "gru_cell": nn.GRUCell,
    "rnn_tanh_cell": nn.RNNCell,
    "rnn_relu_cell": lambda i, o: nn.RNNCell(i, o, nonlinearity="relu"),
}.items():

    def stepped(m: Any, x: Tensor) -> Tensor:
        """Two steps of a cell."""
        state = m.cell(m.one(x[:, 0]))
        state = m.cell(m.one(x[:, 1]), state)
        return m.two(state[0] if isinstance(state, tuple) else state)

    network(name, stepped, (3, 2, 4), one=linear(4, 8), cell=lambda make=make: make(8, 12), two=linear(12, 3))
