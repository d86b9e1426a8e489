"""Small networks for `mutations.py`: for each operator that has a rule at least one that can be cut through it.

Mostly a layer of 12 units, a call, and a layer that reads each of them: what comes out of a call is read as it is, since
`x * call(x)` would tie a mirrored result to its operand, which couples more than is needed and is no fault.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

A = torch.ops.aten
Run = Callable[..., Any]


class Network(nn.Module):
    """A module whose forward is `run(self, *args)`; parts become modules, parameters or buffers."""

    def __init__(self, run: Run, **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Tensor) -> Any:
        """Whatever `run` makes of it."""
        return self.run(self, *args)


@dataclass(frozen=True)
class Case:
    """A network for some operators.

    Attributes:
        operators: names as in the registry, with an overload where the network calls that one.
        run: forward of the network, `run(module, *inputs)`.
        parts: makes layers, parameters and buffers.
        inputs: shapes of the inputs, the batch first; or one tensor itself.
        name: said beside the operator where it has several networks.
    """

    operators: tuple[str, ...]
    run: Run
    parts: Callable[[], dict[str, Any]]
    inputs: tuple[Any, ...]
    name: str = ""


@dataclass(frozen=True)
class Kind:
    """What lies between two layers: the shape of inputs, the layers, and the dimension of the 12 units."""

    shape: tuple[int, ...]
    layer: Callable[[int, int], nn.Module]
    dim: int


UNITS = 12
KINDS = {
    "features": Kind((3, 4), nn.Linear, -1),
    "tokens": Kind((3, 5, 4), nn.Linear, -1),
    "square": Kind((3, UNITS, 4), nn.Linear, -1),
    "rows": Kind((3, 4, 5, 4), nn.Linear, -1),
    "signals": Kind((3, 4, 8), lambda i, o: nn.Conv1d(i, o, 1), 1),
    "maps": Kind((3, 4, 6, 6), lambda i, o: nn.Conv2d(i, o, 1), 1),
    "volumes": Kind((3, 4, 4, 4, 4), lambda i, o: nn.Conv3d(i, o, 1), 1),
}
CASES: list[Case] = []


def full_name(name: str) -> str:
    """Name of an operator as in the registry; "@" in front says that it reads positions."""
    if name.startswith("@"):
        return f"positions:aten.{name[1:]}"
    return name if name.split(".")[0] in ("python", "torchvision", "mutations") else f"aten.{name}"


def between(operators: str, call: Callable[[Tensor], Tensor], kind: str = "features", read: Any = None) -> None:
    """Add two networks: a layer, the call and a layer; and the same with a softmax over the units behind the call.

    Args:
        operators: names without "aten.", separated by spaces.
        call: what is made of the hidden values.
        kind: one of `KINDS`.
        read: makes the layer behind the call, where it is not that of the kind; its units are then the last dimension.
    """
    given = KINDS[kind]
    dim = given.dim if read is None else -1

    def parts() -> dict[str, nn.Module]:
        return {"one": given.layer(4, UNITS), "two": given.layer(UNITS, 3) if read is None else read()}

    def plain(m: Any, x: Tensor) -> Tensor:
        return m.two(call(m.one(x)))

    def mixed(m: Any, x: Tensor) -> Tensor:
        return m.two(call(m.one(x)).softmax(dim))

    names = tuple(map(full_name, operators.split()))
    CASES.append(Case(names, plain, parts, (given.shape,), "plain"))
    CASES.append(Case(names, mixed, parts, (given.shape,), "before a softmax"))


def network(operators: str, run: Run, *inputs: Any, **parts: Callable[[], Any]) -> None:
    """Add a network of its own."""
    names = tuple(map(full_name, operators.split()))
    CASES.append(Case(names, run, lambda: {name: make() for name, make in parts.items()}, inputs))


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    """Makes a parameter."""
    return lambda: nn.Parameter(torch.zeros(shape))


def linear(n_in: int, n_out: int) -> Callable[[], nn.Module]:
    """Makes a linear layer."""
    return lambda: nn.Linear(n_in, n_out)


def index(*positions: int) -> Tensor:
    """A constant vector of positions."""
    return torch.tensor(positions)


def along(x: Tensor, *positions: int) -> Tensor:
    """An index along dimension 1 of tokens, the same for every feature."""
    return index(*positions).view(1, -1, 1).expand(x.shape[0], -1, x.shape[2])


def to(x: Tensor, like: Tensor) -> Tensor:
    """In the type of another value."""
    return x.to(like.dtype)


# --- elementwise ------------------------------------------------------------------------------------------------------
for op in "relu sigmoid tanh gelu silu exp sin abs neg square softplus hardtanh elu".split():
    between(f"{op}", getattr(A, op))
between("add.Tensor", lambda x: x + x.sin())
between("mul.Tensor sub.Tensor", lambda x: x.sin() * x.cos() - x)
between("add.Tensor", lambda x: x + x.mean(2, keepdim=True), "tokens")
between("mul.Tensor", lambda x: x.sin() * x[:, :1], "tokens")
between("div.Tensor", lambda x: x / (1 + x.square().mean(1, keepdim=True)), "tokens")
between("add.Scalar mul.Scalar", lambda x: A.mul.Scalar(A.add.Scalar(x, 1), 2))
between("where.self", lambda x: torch.where(x > 0, x, x.cos()))
between("gt.Scalar", lambda x: to(x > 0, x))
between("masked_fill.Scalar", lambda x: x.masked_fill(x < 0, 0.5))
between("clamp pow.Tensor_Scalar", lambda x: x.clamp(-0.4, 0.5) ** 2)
between("lerp.Tensor addcmul", lambda x: torch.addcmul(torch.lerp(x, x.sin(), x.cos()), x, x.sin()))
between("maximum", lambda x: torch.maximum(x, x.cos()))
network(
    "add.Tensor mul.Tensor",
    lambda m, x: m.two(m.one(x) * m.scale + m.shift),
    (3, 4), one=linear(4, 12), two=linear(12, 3), scale=parameter(12), shift=parameter(1, 12),
)  # fmt: skip
between("add_.Tensor mul_.Tensor", lambda x: x.clone().add_(x.sin()).mul_(2))
between("__and__ __or__ __xor__", lambda x: to((A.__and__(x > 0, x < 1)), x) + to(A.__or__(x > 1, x < -1), x) + to(A.__xor__(x > 0, x < 0.5), x))
between("__and__", lambda x: to(A.__and__(x > 0, x < 1), x))
between("__or__", lambda x: to(A.__or__(x > 1, x < 0), x))
between("__xor__", lambda x: to(A.__xor__(x > 0, x < 0.3), x))
between("complex", lambda x: torch.complex(x, x.sin()).abs())
between("polar", lambda x: torch.polar(x, x.sin()).imag)
between("imag", lambda x: torch.imag(torch.complex(x, x.sin())))
between("real", lambda x: torch.real(torch.complex(x, x.sin())))
between("floor_divide", lambda x: torch.floor_divide(x, 0.2))
between("fmod remainder", lambda x: torch.fmod(x, 0.7) + torch.remainder(x, 0.4))
between("fmod", lambda x: torch.fmod(x, 0.7))
between("remainder", lambda x: torch.remainder(x, 0.7))
between("round", lambda x: (3 * x).round())
for op in "gelu_ hardswish_ mish_ relu6_".split():
    between(op, lambda x, op=op: getattr(A, op)(x.clone()))
between("hardswish", A.hardswish)
between("threshold_", lambda x: A.threshold_(x.clone(), 0.1, 0.5))
between("isclose", lambda x: to(torch.isclose(x, x.relu()), x))
between("isnan", lambda x: to(torch.isnan((x + 0.05).sqrt()), x))
between("log_sigmoid", A.log_sigmoid)
between("masked_fill.Tensor", lambda x: x.masked_fill(x < 0, torch.tensor(0.5, dtype=x.dtype)))
between("masked_fill_", lambda x: x.clone().masked_fill_(x < 0, 0.5))
between("where.Scalar", lambda x: to(A.where.Scalar(x > 0, 1.0, 2.0), x))
between("where.ScalarOther", lambda x: A.where.ScalarOther(x > 0, x, 2.0))
between("where.ScalarSelf", lambda x: A.where.ScalarSelf(x > 0, 2.0, x))
for op in "alias clone detach contiguous lift_fresh_copy".split():
    between(op, lambda x, op=op: getattr(A, op)(x).sin())
between("detach_", lambda x: A.detach_(x.clone()))
for op in "dropout alpha_dropout feature_dropout feature_alpha_dropout".split():
    between(op, lambda x, op=op: getattr(A, op)(x, 0.5, False).sin(), "tokens")
    between(f"{op}_", lambda x, op=op: getattr(A, f"{op}_")(x.clone(), 0.5, False), "tokens")
for op in "ones_like zeros_like".split():
    between(op, lambda x, op=op: getattr(A, op)(x) + 0.5 * x)
    between(op, lambda x, op=op: getattr(A, op)(x) + 0.5)
between("empty_like fill_", lambda x: A.fill_(torch.empty_like(x), 0.5))
between("full_like", lambda x: torch.full_like(x, 2.0))
between("zero_", lambda x: A.zero_(x.clone()) + 0.3)
between("fill_", lambda x: x.clone().fill_(0.3))
between("to", lambda x: (4 * x).to(torch.int64).to(x.dtype))
between("_to_copy", lambda x: A._to_copy(4 * x, dtype=torch.int32).double())
between("type_as", lambda x: (x > 0).type_as(x))
between("copy_", lambda x: torch.empty_like(x).copy_(x.sin()))
between("copy_", lambda x: torch.zeros_like(x).copy_(x[:, :1].sin()), "tokens")
network(
    "prelu", lambda m, x: m.two(functional.prelu(m.one(x), m.slope)),
    (3, 4), one=linear(4, 12), two=linear(12, 3), slope=parameter(12),
)  # fmt: skip
network(
    "glu", lambda m, x: m.two(functional.glu(m.one(x), 1)), (3, 4), one=linear(4, 24), two=linear(12, 3)
)  # fmt: skip

# --- reductions -------------------------------------------------------------------------------------------------------
for op in "sum mean amax amin logsumexp nansum nanmean std var prod median nanmedian max min mode".split():
    def values(x: Tensor, dim: int, keep: bool, op: str = op) -> Tensor:
        """A reduction over one dimension."""
        result = getattr(torch, op)(x, dim, keepdim=keep)
        return result if isinstance(result, Tensor) else result[0]

    name = f"{op}.dim" if op in ("median", "nanmedian", "max", "min") else op
    between(name, lambda x, f=values: f(x, 1, False), "tokens")
    between(name, lambda x, f=values: x * f(x, 2, True), "tokens")
for op in "sum mean std var prod median nanmedian max min nansum".split():
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
between("var_mean std_mean", lambda x: x * torch.var_mean(x, 2, keepdim=True)[0] + torch.std_mean(x, 2, keepdim=True)[1], "tokens")
between("aminmax", lambda x: torch.aminmax(x, dim=1)[1], "tokens")
between("aminmax", lambda x: x - torch.aminmax(x, dim=2, keepdim=True)[0], "tokens")
for op in "quantile nanquantile".split():
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
between("cdist", lambda x: torch.cdist(x.mT, x.mT.sin()), "tokens")

# --- norms ------------------------------------------------------------------------------------------------------------
for op in "softmax log_softmax".split():
    between(op, lambda x, op=op: getattr(torch, op)(x, 2), "tokens")
    between(op, lambda x, op=op: getattr(torch, op)(x, 1), "tokens")
    between(f"_{op}", lambda x, op=op: getattr(A, f"_{op}")(x, 2, False), "square")
for op in "cumsum cumprod logcumsumexp".split():
    between(op, lambda x, op=op: getattr(torch, op)(x, 2), "square")
    between(op, lambda x, op=op: getattr(torch, op)(x, 1), "tokens")
for op in "cummax cummin".split():
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
for name, norm, one, two, shape in (
    ("layer_norm", lambda: nn.LayerNorm(12), linear(4, 12), linear(12, 3), (3, 5, 4)),
    ("rms_norm", lambda: nn.RMSNorm(12), linear(4, 12), linear(12, 3), (3, 5, 4)),
    ("batch_norm", lambda: nn.BatchNorm1d(12), linear(4, 12), linear(12, 3), (3, 4)),
    ("batch_norm", lambda: nn.BatchNorm2d(12, track_running_stats=False), lambda: nn.Conv2d(4, 12, 1), lambda: nn.Conv2d(12, 3, 1), (3, 4, 6, 6)),
    ("group_norm", lambda: nn.GroupNorm(3, 12), lambda: nn.Conv2d(4, 12, 1), lambda: nn.Conv2d(12, 3, 1), (3, 4, 6, 6)),
    ("instance_norm", lambda: nn.InstanceNorm2d(12, affine=True), lambda: nn.Conv2d(4, 12, 1), lambda: nn.Conv2d(12, 3, 1), (3, 4, 6, 6)),
):  # fmt: skip
    network(name, lambda m, x: m.two(m.norm(m.one(x)).relu()), shape, one=one, norm=norm, two=two)
network(
    "_weight_norm", lambda m, x: m.two(functional.linear(x, torch._weight_norm(m.v, m.g, 0)).relu()),
    (3, 4), v=parameter(12, 4), g=parameter(12, 1), two=linear(12, 3),
)  # fmt: skip
network(
    "_weight_norm", lambda m, x: functional.linear(m.one(x).relu(), torch._weight_norm(m.v, m.g, 0)),
    (3, 4), v=parameter(3, 12), g=parameter(3, 1), one=linear(4, 12),
)  # fmt: skip

# --- layout -----------------------------------------------------------------------------------------------------------
between("permute", lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), "maps")
between("permute", lambda x: x.permute(0, 2, 1), "square", lambda: nn.Linear(12, 3))
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
between("rot90", lambda x: x.rot90(1, (1, 2)), "square", lambda: nn.Linear(12, 3))
between("rot90", lambda x: x.rot90(1, (1, 2)).rot90(2, (1, 2)), "square")
between("diagonal", lambda x: x.diagonal(dim1=1, dim2=2) , "square")
between("diag_embed", lambda x: torch.diag_embed(x).sum(1), "features")
between("diag_embed", lambda x: torch.diag_embed(x).cumsum(2), "features")
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

# --- joining ----------------------------------------------------------------------------------------------------------
for op in "cat concat concatenate".split():
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

# --- made values ------------------------------------------------------------------------------------------------------
for name, made in {
    "full": lambda x: torch.full((UNITS,), 0.7, dtype=x.dtype),
    "ones": lambda x: torch.ones(UNITS, dtype=x.dtype),
    "zeros": lambda x: torch.zeros(5, UNITS, dtype=x.dtype),
    "empty.memory_format": lambda x: torch.empty(UNITS, dtype=x.dtype).fill_(0.3),
    "new_empty": lambda x: x.new_empty(UNITS).fill_(0.3),
    "new_full": lambda x: x.new_full((UNITS,), 0.3),
    "new_ones": lambda x: x.new_ones(5, UNITS),
    "new_zeros": lambda x: x.new_zeros(UNITS),
}.items():
    between(name, lambda x, f=made: x.sin() + f(x), "tokens")
for name, made in {
    "arange": lambda x: torch.arange(5, dtype=x.dtype),
    "linspace": lambda x: torch.linspace(0, 1, 5, dtype=x.dtype),
    "eye": lambda x: torch.eye(5, dtype=x.dtype)[1],
    "meshgrid": lambda x: torch.meshgrid(x[0, :, 0], x[0, :, 1], indexing="ij")[1][1],
    "tril_indices": lambda x: to(torch.tril_indices(2, 2)[0].sum(), x),
    "triu_indices": lambda x: to(torch.triu_indices(2, 2)[0].sum(), x),
    "scalar_tensor": lambda x: A.scalar_tensor(2.0, dtype=x.dtype),
    "rand": lambda x: 0 * torch.rand(5, dtype=x.dtype),
    "randn": lambda x: 0 * torch.randn(5, dtype=x.dtype),
    "rand_like": lambda x: 0 * torch.rand_like(x[0, :, 0]),
    "randn_like": lambda x: 0 * torch.randn_like(x[0, :, 0]),
    "bernoulli": lambda x: 0 * torch.bernoulli(x[0, :, 0].sigmoid()),
}.items():
    between(name, lambda x, f=made: (x.mT * f(x)).mT, "tokens")
for op in "rand_like randn_like bernoulli".split():
    between(op, lambda x, op=op: x + 0 * getattr(torch, op)(x.sigmoid()))
for op in "exponential_ normal_ uniform_ random_ bernoulli_".split():
    between(op, lambda x, op=op: x + 0 * getattr(A, op)(torch.empty_like(x)))
between("tril", lambda x: x.movedim(2, 1).unsqueeze(3).mul(torch.ones(5, 5, dtype=x.dtype)).tril().sum(3).mT, "tokens")
between("triu", lambda x: x.movedim(2, 1).unsqueeze(3).mul(torch.ones(5, 5, dtype=x.dtype)).triu().sum(3).mT, "tokens")
network("sym_size", lambda m, x: m.two(m.one(x) * x.shape[0]), (3, 4), one=linear(4, 12), two=linear(12, 3))
