"""Networks with operators that move, repeat, join or cut axes."""

import torch
from torch import nn
from torch.nn import functional

from mutation_networks._base import UNITS, A, between, branches, linear, network, parameter

between("permute", lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), "maps")
between("permute", lambda x: x.permute(0, 2, 1).cumsum(2).permute(0, 2, 1), "square")
between("transpose.int", lambda x: x.transpose(1, 2).cumsum(2).transpose(1, 2), "square")
for op in ("swapaxes", "swapdims"):
    between(op, lambda x, op=op: getattr(x, op)(1, 2).cumsum(2).swapaxes(1, 2), "square")
between("mT", lambda x: x.mT.cumsum(2).mT, "square")
between("mH", lambda x: x.mH.cumsum(2).mH, "square")
between("adjoint", lambda x: x.adjoint().cumsum(2).adjoint(), "square")
between("numpy_T t matrix_H", lambda x: (x[0].T.cumsum(0).t()).T.sin().H, "square")
between("movedim moveaxis", lambda x: x.movedim(1, 2).cumsum(2).moveaxis(2, 1), "square")
between("unsqueeze squeeze", lambda x: x.unsqueeze(1).squeeze(1), "tokens")
between("squeeze", lambda x: x.unsqueeze(2).squeeze())
between("unsqueeze_ squeeze_", lambda x: x.clone().unsqueeze_(1).squeeze_(1), "tokens")
between("expand", lambda x: x[:, :1].expand(-1, 5, -1), "tokens")
between("expand", lambda x: x.mean(2, keepdim=True).expand(-1, -1, UNITS) + 0.1 * x, "tokens")
between("broadcast_to", lambda x: A.broadcast_to(x.sin(), [2, *x.shape]).sum(0), "tokens")
between("expand_as", lambda x: x[:, :1].expand_as(x), "tokens")
between("expand_as", lambda x: x.sum(2, True).expand_as(x) + x * 0.5, "tokens")
between("repeat", lambda x: x.repeat(1, 2, 1), "tokens")
between("repeat", lambda x: x.repeat(1, 2).unflatten(1, (2, UNITS)).sum(1))
between("repeat", lambda x: x.mean(1, keepdim=True).repeat(1, UNITS) * x)
between("repeat", lambda x: x.repeat(1, 2), "features", lambda: nn.Linear(24, 3))
between("tile", lambda x: torch.tile(x, (2,)), "features", lambda: nn.Linear(24, 3))
between("repeat_interleave.self_int", lambda x: x.repeat_interleave(2, 1), "features", lambda: nn.Linear(24, 3))
between("repeat_interleave.self_int", lambda x: x.mean(1, keepdim=True).repeat_interleave(UNITS, 1) * x)
between("flip", lambda x: x.flip(2), "square")
between("flipud", lambda x: x.movedim(2, 0).flipud().movedim(0, 2), "tokens")
between("fliplr", lambda x: x.fliplr())
between("rot90", lambda x: x.rot90(1, (1, 2)).mT, "square")
between("rot90", lambda x: x.rot90(1, (1, 2)).rot90(2, (1, 2)), "square")
between("diagonal", lambda x: x.diagonal(dim1=1, dim2=2), "square")
between("diag_embed", lambda x: torch.diag_embed(x).sum(1), "features")
between("diag_embed", lambda x: torch.diag_embed(x).cumsum(2).sum(1), "features")
between("view_as_real", lambda x: torch.view_as_real(torch.complex(x, x.sin())).sum(2))
between("view_as_complex", lambda x: torch.view_as_complex(torch.stack([x, x.sin()], 2)).abs())
between("view_as_real", lambda x: torch.view_as_real(torch.complex(x, x.sin()))[..., 1])
between("roll", lambda x: x.roll(5, 1))
between("roll", lambda x: x.roll((2, 3), (1, 2)), "square")
between("reshape", lambda x: x.reshape(-1, 3, 4).cumsum(2).reshape(-1, UNITS))
between("reshape", lambda x: x.reshape(3, 60), "tokens", lambda: nn.Linear(60, 3))
between("view.default", lambda x: x.view(-1, 3, 4).sin().view(-1, UNITS))
between("_unsafe_view", lambda x: A._unsafe_view(A._unsafe_view(x, [3, 3, 4]).sin(), [3, UNITS]))
network(
    "_reshape_alias", lambda m, x: m.two(functional.linear(x, A._reshape_alias(m.w, [12, 4], [4, 1])).relu()),
    (3, 4), w=parameter(12, 4), two=linear(12, 3),
)  # fmt: skip
between("view_as reshape_as", lambda x: x.reshape(-1, 3, 4).sin().view_as(x).unflatten(1, (3, 4)).reshape_as(x))
between("view_as", lambda x: x.unflatten(1, (3, 4)).sin().view_as(x.cos()))
between("reshape_as", lambda x: x.unflatten(1, (3, 4)).sin().reshape_as(x.cos()))
between("flatten.using_ints", lambda x: x.flatten(1), "tokens", lambda: nn.Linear(60, 3))
between("flatten.using_ints", lambda x: x.unflatten(1, (3, 4)).sin().flatten(1))
between("ravel", lambda x: x * x[0].sin().ravel())
network(
    "ravel", lambda m, x: x @ (m.two.weight @ m.w.ravel().sin().unflatten(0, (12, 4))).T,
    (3, 4), w=parameter(12, 4), two=linear(12, 3),
)  # fmt: skip
between("unflatten.int", lambda x: x.unflatten(1, (2, 6)).sum(1), "features", lambda: nn.Linear(6, 3))
between("unflatten.int", lambda x: x.unflatten(1, (3, 4)).cumsum(1).flatten(1))

for op in ("cat", "concat", "concatenate"):
    between(op, lambda x, op=op: getattr(torch, op)([x, x.sin()], 1), "features", lambda: nn.Linear(24, 3))
    between(op, lambda x, op=op: getattr(torch, op)([x, x.sin()], 1), "tokens")
network(
    "cat", lambda m, x: m.two(torch.cat([m.one(x), m.other(x).sin()], 1)),
    (3, 4), one=linear(4, 12), other=linear(4, 12), two=linear(24, 3),
)  # fmt: skip
network(
    "cat stack", lambda m, x: m.two(torch.cat([m.one(x), torch.stack([m.other(x), m.one(x)], 1)[:, 0]], 0)),
    (3, 4), one=linear(4, 12), other=linear(4, 12), two=linear(12, 3),
)  # fmt: skip
network(
    "stack", lambda m, x: m.two(torch.stack([m.one(x), m.other(x)], 1)),
    (3, 4), one=linear(4, 12), other=linear(4, 12), two=linear(12, 3),
)  # fmt: skip
between("hstack", lambda x: torch.hstack([x, x.sin()]), "features", lambda: nn.Linear(24, 3))
between("vstack", lambda x: torch.vstack([x, x.sin()]).unflatten(0, (2, -1)).sum(0))
between("vstack row_stack", lambda x: torch.row_stack([torch.vstack([x.sum(0), x.prod(0)]), x.mean(0)]))
between("row_stack", lambda x: A.row_stack([x, x.sin()]))
between("dstack", lambda x: torch.dstack([x, x.sin()]).sum(2))
between("column_stack", lambda x: torch.column_stack([x, x.sin()]), "features", lambda: nn.Linear(24, 3))
between("block_diag", lambda x: torch.block_diag(x, x.sin()), "features", lambda: nn.Linear(24, 3))
between("atleast_1d", lambda x: A.atleast_1d(x).sin())
between("atleast_2d", lambda x: A.atleast_2d(x.sum(0)))
between("atleast_3d", lambda x: A.atleast_3d(x).squeeze(2))
for name, split in {
    "split": lambda x: x.split(6, 1),
    "split_with_sizes": lambda x: A.split_with_sizes(x, [6, 6], 1),
    "chunk": lambda x: x.chunk(2, 1),
    "tensor_split": lambda x: x.tensor_split(2, 1),
    "unsafe_chunk": lambda x: A.unsafe_chunk(x, 2, 1),
    "unsafe_split": lambda x: A.unsafe_split(x, 6, 1),
    "hsplit": lambda x: x.hsplit(2),
    "python.getitem": lambda x: x.chunk(2, 1),
}.items():
    between(name, lambda x, f=split: torch.cat([f(x)[1], f(x)[0].sin()], 1))
    between(name, lambda x, f=split: f(x)[0] * 2, "features", lambda: nn.Linear(6, 3))
between("split", lambda x: A.split.sizes(x, [5, 7], 1)[1], "features", lambda: nn.Linear(7, 3))
between("tensor_split", lambda x: torch.cat(x.tensor_split([3, 7], 1)[1:], 1), "features", lambda: nn.Linear(9, 3))
between("vsplit", lambda x: x.movedim(2, 0).vsplit(2)[1].movedim(0, 2), "tokens", lambda: nn.Linear(6, 3))
between("dsplit", lambda x: torch.cat(x.dsplit(2)[::-1], 2), "tokens")
between("narrow", lambda x: torch.cat([x.narrow(1, 4, 8), x.narrow(1, 0, 4)], 1))
between("select.int", lambda x: x.select(1, 3), "tokens")
between("select.int", lambda x: x * x.select(2, 3).unsqueeze(2), "tokens")
between("slice.Tensor", lambda x: torch.cat([x[:, 4:], x[:, :4]], 1))
between("slice.Tensor", lambda x: x[:, 2:9], "features", lambda: nn.Linear(7, 3))
between("slice.Tensor", lambda x: torch.cat([x[:, 1::2], x[:, ::2]], 1))
between("slice.Tensor", lambda x: x[:, 1:4], "square")
between("select_scatter", lambda x: x.select_scatter(x[..., 3] * 2, 2, 5), "tokens")
between("select_scatter", lambda x: x.select_scatter(x[:, 3] * 2, 1, 4), "tokens")
between("slice_scatter", lambda x: x.slice_scatter(x[..., :4] * 2, 2, 8, 12), "tokens")
between("slice_scatter", lambda x: x.slice_scatter(x[:, :2] * 2, 1, 2, 4), "tokens")
between("unbind", lambda x: x.unbind(1)[2] + 2 * x.unbind(1)[0], "tokens")
between("unfold.default", lambda x: x.unfold(1, 2, 2).sum((1, 3)), "tokens")
between("pad", lambda x: functional.pad(x, (1, 2)), "features", lambda: nn.Linear(15, 3))
between("pad", lambda x: functional.pad(x, (0, 0, 1, 2)), "tokens")
between("constant_pad_nd", lambda x: A.constant_pad_nd(x, [1, 2], 0.3), "features", lambda: nn.Linear(15, 3))
branches("stack", lambda a, b: torch.stack([a, b], 1), "tokens")
branches("dstack", lambda a, b: torch.dstack([a, b]).sum(2))
branches("vstack", lambda a, b: torch.vstack([a, b]))
branches("row_stack", lambda a, b: A.row_stack([a, b]))
branches("hstack", lambda a, b: torch.hstack([a, b]), "tokens")
branches("select_scatter", lambda a, b: a.select_scatter(b[:, 3], 1, 4), "tokens")
branches("slice_scatter", lambda a, b: a.slice_scatter(b[:, :2], 1, 2, 4), "tokens")
branches("slice_scatter", lambda a, b: a.slice_scatter(b[..., :4], 2, 8, 12), "tokens")
branches("view_as", lambda a, b: a.unflatten(2, (3, 4)).sin().view_as(b) + b, "tokens")
branches("reshape_as", lambda a, b: a.unflatten(2, (3, 4)).sin().reshape_as(b) + b, "tokens")
