"""Networks with operators that reduce an axis, order it, or normalise along it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mutation_networks._base import KINDS, UNITS, A, between, branches, linear, network, parameter, to

for op in [
    "sum",
    "mean",
    "amax",
    "amin",
    "logsumexp",
    "nansum",
    "nanmean",
    "std",
    "var",
    "prod",
    "median",
    "nanmedian",
    "max",
    "min",
    "mode",
]:

    def values(x: Tensor, dim: int, keep: bool, op: str = op) -> Tensor:
        """A reduction over one dimension."""
        result = getattr(torch, op)(x, dim, keepdim=keep)
        return result if isinstance(result, Tensor) else result[0]

    name = f"{op}.dim" if op in ("median", "nanmedian", "max", "min") else op
    between(name, lambda x, f=values: f(x, 1, False), "tokens")
    between(name, lambda x, f=values: x * f(x, 2, True), "tokens")
for op in ("sum", "mean", "std", "var", "prod", "median", "nanmedian", "max", "min", "nansum"):
    name = f"{op}.default" if op in ("median", "nanmedian", "max", "min") else op
    between(name, lambda x, op=op: x * getattr(torch, op)(x))
for op, least in (("any", 0.8), ("all", -0.8)):

    def holds(x: Tensor, dim: int, op: str = op, least: float = least) -> Tensor:
        """Whether any or all are above a number that makes both answers usual."""
        return to(getattr(torch, op)(x > least, dim), x)

    between(op, lambda x, f=holds: f(x, 1), "tokens")
    between(op, lambda x, f=holds: x * (1 + f(x, 2)).unsqueeze(2), "tokens")
between("count_nonzero", lambda x: to(torch.count_nonzero(x > 0, 1), x), "tokens")
between("count_nonzero", lambda x: x * to(torch.count_nonzero(x > 0, 2), x).unsqueeze(2), "tokens")
for op in ("linalg.norm", "linalg.vector_norm", "norm"):
    f = torch.linalg.norm if op == "linalg.norm" else torch.linalg.vector_norm if "vector" in op else None
    name = op.replace(".", "_")

    def length(x: Tensor, dim: int, keep: bool, f: Any = f) -> Tensor:
        """A norm over one dimension."""
        return A.norm.ScalarOpt_dim(x, 2, [dim], keep) if f is None else f(x, dim=dim, keepdim=keep)

    between(name, lambda x, f=length: f(x, 1, False), "tokens")
    between(name, lambda x, f=length: x * f(x, 2, True), "tokens")
between("linalg_matrix_norm", lambda x: torch.linalg.matrix_norm(x).unsqueeze(2).unsqueeze(3), "maps")
between("linalg_matrix_norm", lambda x: x * torch.linalg.matrix_norm(x, dim=(1, 2), keepdim=True), "maps")
between("var_mean std_mean", lambda x: torch.var_mean(x, 1)[0] + torch.std_mean(x, 1)[1] * 2, "tokens")
between("var_mean", lambda x: torch.var_mean(x, 1)[0], "tokens")
between("std_mean", lambda x: torch.std_mean(x, 1)[1], "tokens")
between(
    "var_mean std_mean",
    lambda x: x * torch.var_mean(x, 2, keepdim=True)[0] + torch.std_mean(x, 2, keepdim=True)[1],
    "tokens",
)
between("aminmax", lambda x: torch.aminmax(x, dim=1)[1], "tokens")
between("aminmax", lambda x: x - torch.aminmax(x, dim=2, keepdim=True)[0], "tokens")
for op in ("quantile", "nanquantile"):
    between(op, lambda x, op=op: getattr(torch, op)(x, 0.3, 1), "tokens")
    between(op, lambda x, op=op: getattr(torch, op)(x, torch.tensor([0.2, 0.6], dtype=x.dtype), 1).sum(0), "tokens")
    between(op, lambda x, op=op: x * getattr(torch, op)(x, 0.3, 2, True), "tokens")
between("kthvalue", lambda x: x.kthvalue(2, 1).values, "tokens")
between("sort", lambda x: x.sort(1).values, "tokens")
between("argsort", lambda x: to(x.argsort(1), x), "tokens")
between("topk", lambda x: x.topk(2, 1).values.sum(1), "tokens")
between("topk", lambda x: x * x.topk(2, 2).values.sum(2, True), "tokens")
between("argmax", lambda x: to(x.argmax(1), x), "tokens")
between("argmin", lambda x: to(x.argmin(1), x), "tokens")
between("trapezoid.dx", lambda x: torch.trapezoid(x, dim=1), "tokens")
between("diff", lambda x: x.diff(dim=1, prepend=x[:, :1].sin()), "tokens")
for op, name in ((functional.cosine_similarity, "cosine_similarity"), (torch.linalg.vecdot, "linalg_vecdot")):
    between(name, lambda x, f=op: f(x, x.sin(), dim=1), "tokens")
    between(name, lambda x, f=op: x * f(x, x.sin(), dim=2).unsqueeze(2), "tokens")
between("pairwise_distance", lambda x: x * functional.pairwise_distance(x, x.sin()).unsqueeze(2), "tokens")
between("pairwise_distance", lambda x: functional.pairwise_distance(x.mT, x.mT.sin()), "tokens")
between("cdist", lambda x: torch.cdist(x, x.sin()) @ x, "tokens")
between("cdist", lambda x: torch.cdist(x.mT, x.mT.sin()).sum(1), "tokens")

for op in ("softmax", "log_softmax"):
    between(op, lambda x, op=op: getattr(torch, op)(x, 2), "tokens")
    between(op, lambda x, op=op: getattr(torch, op)(x, 1), "tokens")
    between(f"_{op}", lambda x, op=op: getattr(A, f"_{op}")(x, 2, False), "square")
for op in ("cumsum", "cumprod", "logcumsumexp"):
    between(op, lambda x, op=op: getattr(torch, op)(x, 2), "square")
    between(op, lambda x, op=op: getattr(torch, op)(x, 1), "tokens")
for op in ("cummax", "cummin"):
    between(op, lambda x, op=op: getattr(torch, op)(x, 2)[0], "tokens")
    between(op, lambda x, op=op: getattr(torch, op)(x, 1)[0], "tokens")
between("layer_norm", lambda x: functional.layer_norm(x, (UNITS,)), "tokens")
between("rms_norm", lambda x: functional.rms_norm(x, (UNITS,)), "tokens")
between("layer_norm", lambda x: functional.layer_norm(x, (UNITS, 6, 6)), "maps")
between("group_norm", lambda x: functional.group_norm(x, 3), "maps")
between("group_norm", lambda x: functional.group_norm(x, UNITS), "maps")
between("group_norm", lambda x: functional.group_norm(x, 1), "signals")
between("instance_norm", lambda x: functional.instance_norm(x), "maps")
between("renorm", lambda x: x.renorm(2, 0, 0.5), "tokens")
between("renorm", lambda x: x.renorm(2, 2, 0.5), "tokens")
for name, norm, kind in (
    ("layer_norm", lambda: nn.LayerNorm(12), "tokens"),
    ("rms_norm", lambda: nn.RMSNorm(12), "tokens"),
    ("batch_norm", lambda: nn.BatchNorm1d(12), "features"),
    ("batch_norm", lambda: nn.BatchNorm2d(12, track_running_stats=False), "maps"),
    ("group_norm", lambda: nn.GroupNorm(3, 12), "maps"),
    ("instance_norm", lambda: nn.InstanceNorm2d(12, affine=True), "maps"),
):
    layer = KINDS[kind].layer
    network(
        name, lambda m, x: m.two(m.norm(m.one(x)).relu()), KINDS[kind].shape,
        one=lambda layer=layer: layer(4, 12), norm=norm, two=lambda layer=layer: layer(12, 3),
    )  # fmt: skip
network(
    "_weight_norm", lambda m, x: m.two(functional.linear(x, torch._weight_norm(m.v, m.g, 0)).relu()),
    (3, 4), v=parameter(12, 4), g=parameter(12, 1), two=linear(12, 3),
)  # fmt: skip
network(
    "_weight_norm", lambda m, x: functional.linear(m.one(x).relu(), torch._weight_norm(m.v, m.g, 0)),
    (3, 4), v=parameter(3, 12), g=parameter(3, 1), one=linear(4, 12),
)  # fmt: skip

# --- two branches -----------------------------------------------------------------------------------------------------
branches("cdist", lambda a, b: torch.cdist(a, b) @ b, "tokens")
branches("cosine_similarity", lambda a, b: functional.cosine_similarity(a, b, 1), "tokens")
branches("cosine_similarity", lambda a, b: b * functional.cosine_similarity(a, b, 2).unsqueeze(2), "tokens")
branches("pairwise_distance", lambda a, b: b * functional.pairwise_distance(a, b).unsqueeze(2), "tokens")
branches("linalg_vecdot", lambda a, b: b * torch.linalg.vecdot(a, b, dim=2).unsqueeze(2), "tokens")
branches("diff", lambda a, b: a.diff(dim=1, prepend=b[:, :1]), "tokens")
