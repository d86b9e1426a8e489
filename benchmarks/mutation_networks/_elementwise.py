"""Networks with operators that compute each value from those at the same position, or make values."""

import torch
from torch.nn import functional

from mutation_networks._base import UNITS, A, between, branches, linear, network, parameter, to

for op in [
    "relu",
    "sigmoid",
    "tanh",
    "gelu",
    "silu",
    "exp",
    "sin",
    "abs",
    "neg",
    "square",
    "softplus",
    "hardtanh",
    "elu",
]:
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
between("lerp.Tensor", lambda x: torch.lerp(x, x.sin(), x.cos()))
between("addcmul", lambda x: torch.addcmul(x.cos(), x, x.sin()))
between("maximum", lambda x: torch.maximum(x, x.cos()))
network(
    "add.Tensor mul.Tensor",
    lambda m, x: m.two(m.one(x) * m.norm_scale + m.shift),
    (3, 4), one=linear(4, 12), two=linear(12, 3), scale=parameter(12), shift=parameter(1, 12),
)  # fmt: skip
between("add_.Tensor mul_.Tensor", lambda x: x.clone().add_(x.sin()).mul_(2))
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
for op in ("gelu_", "hardswish_", "mish_", "relu6_"):
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
for op in ("alias", "clone", "detach", "contiguous", "lift_fresh_copy"):
    between(op, lambda x, op=op: getattr(A, op)(x).sin())
between("detach_", lambda x: A.detach_(x.clone()))
for op in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"):
    between(op, lambda x, op=op: getattr(A, op)(x, 0.5, False).sin(), "tokens")
    between(f"{op}_", lambda x, op=op: getattr(A, f"{op}_")(x.clone(), 0.5, False), "tokens")
for op in ("ones_like", "zeros_like"):
    between(op, lambda x, op=op: getattr(A, op)(x) + 0.5 * x)
    between(op, lambda x, op=op: getattr(A, op)(x) + 0.5, mixes=False)
between("empty_like fill_", lambda x: A.fill_(torch.empty_like(x), 0.5), mixes=False)
between("full_like", lambda x: torch.full_like(x, 2.0), mixes=False)
between("zero_", lambda x: A.zero_(x.clone()) + 0.3, mixes=False)
between("fill_", lambda x: x.clone().fill_(0.3), mixes=False)
between("to", lambda x: (4 * x).to(torch.int64).to(x.dtype))
between("_to_copy", lambda x: A._to_copy(4 * x, dtype=torch.int32).double())
between("type_as", lambda x: (x > 0).type_as(x))
between("copy_", lambda x: torch.empty_like(x).copy_(x.sin()))
between("copy_", lambda x: torch.zeros_like(x).copy_(x[:, :1].sin()), "tokens")
network(
    "prelu", lambda m, x: m.two(functional.prelu(m.one(x), m.slope)),
    (3, 4), one=linear(4, 12), two=linear(12, 3), slope=parameter(12),
)  # fmt: skip
between("fake_quantize_per_tensor_affine", lambda x: torch.fake_quantize_per_tensor_affine(x, 0.05, 7, 0, 255))
network(
    "glu", lambda m, x: m.two(functional.glu(m.one(x), 1)), (3, 4), one=linear(4, 24), two=linear(12, 3)
)  # fmt: skip

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
for op in ("rand_like", "randn_like", "bernoulli"):
    between(op, lambda x, op=op: x + 0 * getattr(torch, op)(x.sigmoid()))
for op in ("exponential_", "normal_", "uniform_", "random_", "bernoulli_"):
    between(op, lambda x, op=op: x + 0 * getattr(A, op)(torch.empty_like(x)))
between("tril", lambda x: x.movedim(2, 1).unsqueeze(3).mul(torch.ones(5, 5, dtype=x.dtype)).tril().sum(3).mT, "tokens")
between("triu", lambda x: x.movedim(2, 1).unsqueeze(3).mul(torch.ones(5, 5, dtype=x.dtype)).triu().sum(3).mT, "tokens")
network("sym_size", lambda m, x: m.two(m.one(x) * x.shape[0]), (3, 4), one=linear(4, 12), two=linear(12, 3))

# --- two branches -----------------------------------------------------------------------------------------------------
branches("add.Tensor", lambda a, b: a + b)
branches("mul.Tensor", lambda a, b: a * b, "tokens")
branches("where.self", lambda a, b: torch.where(a > 0, a, b))
branches("maximum", torch.maximum, "tokens")
branches("copy_", lambda a, b: a.clone().copy_(b))
branches("masked_fill_", lambda a, b: a.clone().masked_fill_(b > 0, 0.5))
branches("isclose", lambda a, b: to(torch.isclose(a, b, 0.5), a))
branches("complex", lambda a, b: torch.complex(a, b).abs())
branches("expand_as", lambda a, b: a[:, :1].expand_as(b) + b, "tokens")
