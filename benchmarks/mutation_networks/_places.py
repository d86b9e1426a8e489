"""Networks with operators that pick positions by an index, or move over space."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutation_networks._base import A, along, between, branches, index, linear, network, to

MAPS = {1: "signals", 2: "maps", 3: "volumes"}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SPACE = {1: (8,), 2: (6, 6), 3: (4, 4, 4)}

ORDER = (5, 3, 7, 0, 11, 1, 2, 4, 6, 8, 10, 9)
between("index_select", lambda x: x.index_select(1, torch.tensor(ORDER)))
between("index_select", lambda x: x.index_select(1, index(4, 1)), "tokens")
between("index.Tensor", lambda x: x[:, list(ORDER)])
between("index.Tensor", lambda x: x[:, index(1, 9, 4, 3)], "features", lambda: nn.Linear(4, 3))
between("index.Tensor", lambda x: x[:, index(4, 1, 1)], "tokens")
between("index.Tensor", lambda x: x[:, [True, True, False] * 4], "features", lambda: nn.Linear(8, 3))
between("index.Tensor", lambda x: x[:, index(2, 0), index(1, 3)], "rows")
between("index.Tensor", lambda x: x.mT[..., index(2, 0).view(1, 2)].sum(3).mT, "tokens")
PAIRS = torch.triu_indices(12, 12, 1).tolist()


def products(x: Tensor) -> Tensor:
    """The products of all pairs of features."""
    return x[:, PAIRS[0]] * x[:, PAIRS[1]]


between("index.Tensor", products, "features", lambda: nn.Linear(66, 3))
between(
    "index_select",
    lambda x: x.index_select(1, index(*PAIRS[0])).sigmoid() - x.index_select(1, index(*PAIRS[1])),
    "features",
    lambda: nn.Linear(66, 3),
)
between(
    "index.Tensor",
    lambda x: (x[:, :, None] * x[:, None].sigmoid())[:, PAIRS[0], PAIRS[1]],
    "features",
    lambda: nn.Linear(66, 3),
)
between("gather", lambda x: x.gather(1, along(x, 2, 0, 1)), "tokens")
between("take_along_dim", lambda x: x.take_along_dim(index(2, 0).view(1, 2, 1), 1), "tokens")
for op in ("scatter", "scatter_", "scatter_add", "scatter_add_"):
    between(op, lambda x, op=op: getattr(x.cos(), op)(1, along(x, 1, 3), x[:, :2]), "tokens")
between("scatter scatter_", lambda x: x.scatter(1, along(x, 1), 0.5).scatter_(1, along(x, 2), 0.3), "tokens")
between("scatter_reduce", lambda x: x.scatter_reduce(1, along(x, 3), x[:, :1], "amax"), "tokens")
for op in ("index_add", "index_add_", "index_copy", "index_copy_"):
    between(op, lambda x, op=op: getattr(x.cos(), op)(1, index(1, 3), x[:, 1:3]), "tokens")
between("index_reduce", lambda x: A.index_reduce(x.cos(), 1, index(1, 3), x[:, 1:3], "prod"), "tokens")
between("index_fill", lambda x: x.index_fill(1, index(0, 2), 0.5), "tokens")
between("index_fill_", lambda x: x.sin().index_fill_(1, index(0, 2), 0.5), "tokens")
between("index_put", lambda x: x.index_put((torch.arange(1), index(2)), x[:1, 0]), "tokens")
between("index_put_", lambda x: _written(x), "tokens")
between("index_put", lambda x: A.index_put(x.cos(), [None, index(0, 2)], x[:, :2]), "tokens")
between("one_hot", lambda x: x.sin() + to(functional.one_hot(torch.arange(5) % 3, 12), x), "tokens")
between("one_hot", lambda x: to(functional.one_hot((x > 0).to(torch.int64) + 2 * (x > 0.5), 4)[..., 1], x))
between("bucketize.Tensor", lambda x: to(torch.bucketize(x, torch.tensor([-0.2, 0.3], dtype=x.dtype)), x))


def _written(x: Tensor) -> Tensor:
    y = x.cos()
    y[:, index(0, 2)] = x[:, :2]
    return y


for n in SPACE:
    for op in (f"avg_pool{n}d", f"max_pool{n}d"):
        between(op, lambda x, op=op: getattr(functional, op)(x, 2), MAPS[n])
    half = tuple(size // 2 for size in SPACE[n])
    between(f"adaptive_avg_pool{n}d", lambda x, n=n, half=half: getattr(A, f"adaptive_avg_pool{n}d")(x, half), MAPS[n])
    between(
        f"adaptive_max_pool{n}d", lambda x, n=n, half=half: getattr(A, f"adaptive_max_pool{n}d")(x, half)[0], MAPS[n]
    )
    between(
        f"max_pool{n}d_with_indices", lambda x, n=n: getattr(A, f"max_pool{n}d_with_indices")(x, [2] * n)[0], MAPS[n]
    )
    between(f"upsample_nearest{n}d", lambda x, n=n: functional.interpolate(x, scale_factor=2), MAPS[n])
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[n]
    between(f"upsample_{mode}{n}d", lambda x, mode=mode: functional.interpolate(x, scale_factor=2, mode=mode), MAPS[n])
between("avg_pool2d", lambda x: functional.avg_pool2d(x.unsqueeze(1), (2, 1), 1).squeeze(1), "tokens")
between("max_pool2d", lambda x: functional.max_pool2d(x.mT, (1, 2), 1).mT, "tokens")
between("upsample_bicubic2d", lambda x: functional.interpolate(x, scale_factor=2, mode="bicubic"), "maps")
for mode in ("bicubic", "bilinear"):
    between(
        f"_upsample_{mode}2d_aa",
        lambda x, mode=mode: functional.interpolate(x, (4, 4), mode=mode, antialias=True),
        "maps",
    )
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
for op in ("fft", "ifft", "rfft", "hfft", "ihfft"):
    between(
        f"fft_{op}", lambda x, op=op: torch.view_as_real(getattr(torch.fft, op)(x, dim=1) + 0j)[..., 0].abs(), "tokens"
    )
between("fft_irfft", lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=5, dim=1), "tokens")
for op in ("fft2", "ifft2", "fftn", "ifftn", "rfft2", "rfftn"):
    between(f"fft_{op}", lambda x, op=op: getattr(torch.fft, op)(x, dim=(2, 3)).real, "maps")
for op in ("irfft2", "irfftn"):
    between(f"fft_{op}", lambda x, op=op: getattr(torch.fft, op)(torch.fft.rfft2(x), s=(6, 6), dim=(2, 3)), "maps")
for op in ("fftshift", "ifftshift"):
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

# --- two branches -----------------------------------------------------------------------------------------------------
branches("index_add", lambda a, b: a.index_add(1, index(1, 3), b[:, 1:3]), "tokens")
branches("index_copy", lambda a, b: a.index_copy(1, index(1, 3), b[:, 1:3]), "tokens")
branches("index_reduce", lambda a, b: A.index_reduce(a, 1, index(1, 3), b[:, 1:3], "prod"), "tokens")
branches("index_put", lambda a, b: A.index_put(a, [None, index(0, 2)], b[:, :2]), "tokens")
branches("scatter", lambda a, b: a.scatter(1, along(a, 1, 3), b[:, :2]), "tokens")
branches("scatter_add", lambda a, b: a.scatter_add(1, along(a, 1, 3), b[:, :2]), "tokens")
branches("scatter_reduce", lambda a, b: a.scatter_reduce(1, along(a, 1, 3), b[:, :2], "amax"), "tokens")
branches("gather", lambda a, b: a.gather(1, to(b > 0, index(1))), "tokens")
branches("take_along_dim", lambda a, b: a.take_along_dim(to(b > 0, index(1)), 1), "tokens")
