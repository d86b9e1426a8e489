"""Random small networks and random kept sets, for Hypothesis and for plain random numbers alike.

A network is described by plain data (dicts, lists, strings, numbers), so a failure can be printed, stored and rebuilt.
One function per kind of block both chooses its numbers and builds the module: it asks a `Picker` for every choice by
name. A `Recorder` draws the answers and notes them, a `Replay` reads them from the description.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import strategies as st
from torch import Tensor, nn

Shape = tuple[int, ...]
Description = dict[str, Any]

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
FUNCTIONAL_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "cos": torch.cos,
    "identity": lambda x: x,
}


class Net(nn.Module):
    """A module whose forward is `run(self, *args)`; parts become sub-modules, parameters or plain attributes."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and floating buffer distinct random values of a sensible size, in place.

    Matrices and kernels are scaled by their fan-in, scales scatter around 1, running variances are positive. The global
    random state is not touched.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                values = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            elif name.endswith("weight") and tensor.ndim == 1:
                values = 1 + 0.3 * normal(tensor)
            elif tensor.ndim >= 2:
                values = normal(tensor) / max(1, tensor[0].numel()) ** 0.5
            else:
                values = 0.3 * normal(tensor)
            tensor.copy_(values)
    return model


# --- where choices come from ------------------------------------------------------------------------------------------


class Source(Protocol):
    """Draws one value; Hypothesis and `random.Random` both can."""

    def integer(self, low: int, high: int) -> int: ...

    def choice(self, options: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class RandomSource:
    """Plain random numbers."""

    rng: random.Random

    def integer(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def choice(self, options: Sequence[Any]) -> Any:
        return self.rng.choice(options)


@dataclass(frozen=True)
class HypothesisSource:
    """The `draw` function of a Hypothesis composite."""

    draw: Callable[..., Any]

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def choice(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))


class Picker(Protocol):
    """Answers the named choices of one block."""

    def integer(self, name: str, low: int, high: int) -> int: ...

    def choice(self, name: str, options: Sequence[Any]) -> Any: ...


class Recorder:
    """Draws every choice and notes it in `values`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.values: Description = {}

    def integer(self, name: str, low: int, high: int) -> int:
        self.values[name] = self.source.integer(low, high)
        return self.values[name]

    def choice(self, name: str, options: Sequence[Any]) -> Any:
        self.values[name] = self.source.choice(list(options))
        return self.values[name]


class Replay:
    """Reads every choice from a description."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, name: str, low: int, high: int) -> int:
        return self.values[name]

    def choice(self, name: str, options: Sequence[Any]) -> Any:
        return self.values[name]


# --- the blocks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """One kind of block: the layout it takes, when it fits, and whether it mixes channels by a statistic."""

    kind: str
    layout: str
    build: Callable[[Picker, Shape], nn.Module]
    fits: Callable[[Shape], bool]
    is_mixing: bool


BLOCKS: dict[str, Block] = {}


def block(layout: str, fits: Callable[[Shape], bool] = lambda s: True, is_mixing: bool = False) -> Callable:
    """Register a block that takes values of a layout: "map" (B, C, *space), "tokens" (B, N, C) or "vector" (B, C)."""

    def register(build: Callable[[Picker, Shape], nn.Module]) -> Callable[[Picker, Shape], nn.Module]:
        assert build.__name__ not in BLOCKS
        BLOCKS[build.__name__] = Block(build.__name__, layout, build, fits, is_mixing)
        return build

    return register


def divisors(number: int, low: int = 2) -> list[int]:
    """The divisors of a number from `low` to the number itself."""
    return [d for d in range(low, number + 1) if number % d == 0]


def _is_small(s: Shape) -> bool:
    return s[1] <= 16


def _is_even(s: Shape) -> bool:
    return s[1] % 2 == 0


def _is_composite(s: Shape) -> bool:
    return len(divisors(s[1])) > 1


def _rank(s: Shape) -> int:
    return len(s) - 2


def _conv(s: Shape, c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Module:
    return CONV[_rank(s)](c_in, c_out, kernel, padding=options.pop("padding", kernel // 2), **options)


def _per_channel(s: Shape, channels: int | None = None) -> Tensor:
    """A zero tensor that broadcasts over batch and space of a map."""
    return torch.zeros(1, channels or s[1], *(1,) * _rank(s))


@block("map")
def conv(pick: Picker, s: Shape) -> nn.Module:
    rank, width = _rank(s), pick.integer("width", 4, 16)
    norms = {"none": nn.Identity, "batch": BATCH_NORM[rank], "batch_plain": BATCH_NORM[rank]}
    norm = pick.choice("norm", sorted(norms))
    stride = pick.choice("stride", [1, 1, 2]) if min(s[2:]) >= 6 else 1
    options = {"affine": False} if norm == "batch_plain" else {}
    return Net(
        lambda m, x: ACTIVATIONS[m.activation](m.norm(m.conv(x))),
        conv=_conv(
            s, s[1], width, pick.choice("kernel", [1, 3]), stride=stride, bias=pick.choice("bias", [True, False])
        ),
        norm=norms[norm](width, **options),
        activation=pick.choice("activation", sorted(ACTIVATIONS)),
    )


@block("map")
def residual(pick: Picker, s: Shape) -> nn.Module:
    mid = pick.integer("mid", 2, 10)
    return Net(
        lambda m, x: F.relu(x + m.b(F.relu(m.norm(m.a(x))))),
        a=_conv(s, s[1], mid),
        norm=BATCH_NORM[_rank(s)](mid),
        b=_conv(s, mid, s[1], 1),
    )


@block("map", _is_small)
def dense(pick: Picker, s: Shape) -> nn.Module:
    growth, first = pick.integer("growth", 2, 6), pick.choice("input_first", [True, False])

    def run(m: Net, x: Tensor) -> Tensor:
        new = m.a(F.relu(m.norm(x)))
        x = torch.cat([x, new] if first else [new, x], 1)
        return torch.cat([m.b(x), x], 1)

    return Net(run, norm=BATCH_NORM[_rank(s)](s[1]), a=_conv(s, s[1], growth), b=_conv(s, s[1] + growth, 3))


@block("map")
def inception(pick: Picker, s: Shape) -> nn.Module:
    a, b, c = (pick.integer(name, 2, 6) for name in "abc")

    def run(m: Net, x: Tensor) -> Tensor:
        pooled = POOL[_rank(s)](x, 3, stride=1, padding=1)
        return torch.cat([m.a(x), m.b2(F.relu(m.b1(x))), m.c(pooled)], 1)

    return Net(run, a=_conv(s, s[1], a, 1), b1=_conv(s, s[1], b, 1), b2=_conv(s, b, b), c=_conv(s, s[1], c, 1))


@block("map", lambda s: _is_composite(s) and s[1] <= 16)
def chunk_reused(pick: Picker, s: Shape) -> nn.Module:
    n_parts = pick.choice("n_parts", divisors(s[1])[:2])
    order = [pick.integer(f"part{i}", 0, n_parts - 1) for i in range(n_parts)]
    part = s[1] // n_parts

    def run(m: Net, x: Tensor) -> Tensor:
        parts = x.chunk(n_parts, 1)
        return torch.cat([*(parts[i] for i in order), m.a(parts[-1]) + parts[0]], 1)

    return Net(run, a=_conv(s, part, part))


@block("map", lambda s: s[1] >= 4)
def split_uneven(pick: Picker, s: Shape) -> nn.Module:
    first, width = pick.integer("first", 1, s[1] - 1), pick.integer("width", 3, 12)

    def run(m: Net, x: Tensor) -> Tensor:
        a, b = torch.split(x, [first, s[1] - first], 1)
        return m.b(b) + m.a(a)

    return Net(run, a=_conv(s, first, width), b=_conv(s, s[1] - first, width, 1))


@block("map", lambda s: s[1] >= 6 and s[1] <= 16)
def split_reordered(pick: Picker, s: Shape) -> nn.Module:
    a = pick.integer("a", 1, s[1] // 3)
    b = pick.integer("b", 1, s[1] // 3)
    uses_twice = pick.choice("uses_twice", [True, False])

    def run(m: Net, x: Tensor) -> Tensor:
        p, q, r = x.split([a, b, s[1] - a - b], 1)
        return torch.cat([F.relu(r), m.a(p), q, p] if uses_twice else [r, m.a(p), q], 1)

    return Net(run, a=_conv(s, a, 4, 1))


@block("map", _is_composite)
def channel_shuffle(pick: Picker, s: Shape) -> nn.Module:
    groups = pick.choice("groups", divisors(s[1])[:-1])

    def run(m: Net, x: Tensor) -> Tensor:
        x = x.view(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
        return x.transpose(1, 2).flatten(1, 2)

    return Net(run)


@block("map", _is_composite)
def channel_shuffle_module(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: m.shuffle(x), shuffle=nn.ChannelShuffle(pick.choice("groups", divisors(s[1])[:-1])))


@block("map", _is_even)
def shuffle_unit(pick: Picker, s: Shape) -> nn.Module:
    """The ShuffleNetV2 unit: one half passes, the other goes through depthwise and 1x1 convolutions, then a shuffle."""
    half = s[1] // 2

    def run(m: Net, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        x = torch.cat([a, m.out(m.depthwise(F.relu(m.into(b))))], 1)
        x = x.reshape(x.shape[0], 2, half, *x.shape[2:]).transpose(1, 2)
        return x.reshape(x.shape[0], 2 * half, *x.shape[3:])

    return Net(
        run, into=_conv(s, half, half, 1), depthwise=_conv(s, half, half, groups=half), out=_conv(s, half, half, 1)
    )


@block("map", _is_composite)
def grouped(pick: Picker, s: Shape) -> nn.Module:
    groups = pick.choice("groups", divisors(s[1])[:2])
    width = groups * pick.integer("per_group", 1, 4)
    return Net(lambda m, x: F.relu(m.a(x)), a=_conv(s, s[1], width, pick.choice("kernel", [1, 3]), groups=groups))


@block("map", _is_composite)
def grouped_residual(pick: Picker, s: Shape) -> nn.Module:
    """The ResNeXt bottleneck."""
    groups, per_group = pick.choice("groups", [2, 3, 4]), pick.integer("per_group", 2, 4)
    mid = groups * per_group
    return Net(
        lambda m, x: x + m.c(F.relu(m.norm(m.b(F.relu(m.a(x)))))),
        a=_conv(s, s[1], mid, 1),
        b=_conv(s, mid, mid, groups=groups),
        norm=BATCH_NORM[_rank(s)](mid),
        c=_conv(s, mid, s[1], 1),
    )


@block("map", _is_small)
def depthwise(pick: Picker, s: Shape) -> nn.Module:
    multiplier = pick.choice("multiplier", [1, 1, 2])
    return Net(
        lambda m, x: F.relu(m.norm(m.a(x))),
        a=_conv(s, s[1], multiplier * s[1], groups=s[1], bias=False),
        norm=BATCH_NORM[_rank(s)](multiplier * s[1]),
    )


@block("map")
def squeeze_excitation(pick: Picker, s: Shape) -> nn.Module:
    mid, uses_linear = pick.integer("mid", 2, 6), pick.choice("uses_linear", [True, False])
    space = tuple(range(2, len(s)))

    def run(m: Net, x: Tensor) -> Tensor:
        if uses_linear:
            gate = m.b(F.relu(m.a(x.mean(space)))).sigmoid().reshape(x.shape[0], -1, *(1,) * _rank(s))
        else:
            gate = m.b(F.relu(m.a(x.mean(space, keepdim=True)))).sigmoid()
        return gate * x

    if uses_linear:
        return Net(run, a=nn.Linear(s[1], mid), b=nn.Linear(mid, s[1]))
    return Net(run, a=_conv(s, s[1], mid, 1), b=_conv(s, mid, s[1], 1))


@block("map")
def gate_one_channel(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: x * m.a(x).sigmoid(), a=_conv(s, s[1], 1, 1))


@block("map")
def flip(pick: Picker, s: Shape) -> nn.Module:
    joins = pick.choice("joins", [True, False])
    return Net(lambda m, x: m.a(x) + x.flip(1) if joins else m.a(x.flip(1)), a=_conv(s, s[1], s[1], 1))


@block("map", lambda s: s[1] >= 4)
def roll(pick: Picker, s: Shape) -> nn.Module:
    shift, width = pick.integer("shift", -3, 3), pick.integer("width", 4, 10)
    return Net(lambda m, x: m.a(x.roll(shift, 1)), a=_conv(s, s[1], width, 1))


@block("map", lambda s: len(s) == 4 and max(s[2:]) <= 6)
def pixel_shuffle(pick: Picker, s: Shape) -> nn.Module:
    width = pick.integer("width", 2, 4)
    return Net(lambda m, x: m.shuffle(F.relu(m.a(x))), a=_conv(s, s[1], 4 * width, 1), shuffle=nn.PixelShuffle(2))


@block("map", lambda s: len(s) == 4 and s[1] <= 12 and all(n % 2 == 0 for n in s[2:]))
def pixel_unshuffle(pick: Picker, s: Shape) -> nn.Module:
    width = pick.integer("width", 4, 12)
    return Net(lambda m, x: m.a(m.unshuffle(x)), a=_conv(s, 4 * s[1], width, 1), unshuffle=nn.PixelUnshuffle(2))


@block("map")
def transposed(pick: Picker, s: Shape) -> nn.Module:
    groups = pick.choice("groups", [1, *divisors(s[1])[:2]])
    stride = pick.choice("stride", [1, 2]) if max(s[2:]) <= 4 and len(s) < 5 else 1
    layer = TRANSPOSED[_rank(s)](s[1], groups * pick.integer("per_group", 1, 4), 2, stride=stride, groups=groups)
    return Net(lambda m, x: F.relu(m.a(x)), a=layer)


@block("map", _is_small)
def pad_shortcut(pick: Picker, s: Shape) -> nn.Module:
    """Option A of the CIFAR ResNet: the shortcut gains zero channels."""
    front, back = pick.integer("front", 0, 4), pick.integer("back", 1, 4)
    mid = pick.integer("mid", 2, 8)
    pads = (0, 0) * _rank(s) + (front, back)
    return Net(
        lambda m, x: F.relu(F.pad(x, pads) + m.b(F.relu(m.a(x)))),
        a=_conv(s, s[1], mid),
        b=_conv(s, mid, front + s[1] + back, 1),
    )


@block("map", lambda s: s[1] >= 4)
def channel_slice(pick: Picker, s: Shape) -> nn.Module:
    start, stop = pick.integer("start", 0, s[1] // 2), pick.integer("stop", s[1] // 2 + 1, s[1])
    step = pick.choice("step", [1, 2])
    return Net(lambda m, x: m.a(x[:, start:stop:step]), a=_conv(s, len(range(start, stop, step)), 6, 1))


@block("map", lambda s: s[1] >= 4)
def slice_update(pick: Picker, s: Shape) -> nn.Module:
    """The partial convolution of FasterNet: a slice is transformed and joined with the rest."""
    part = pick.integer("part", 1, s[1] - 1)
    return Net(lambda m, x: torch.cat([m.a(x[:, :part]), x[:, part:]], 1), a=_conv(s, part, part))


@block("map", lambda s: 3 <= s[1] <= 16)
def channel_index(pick: Picker, s: Shape) -> nn.Module:
    indices = [pick.integer(f"index{i}", 0, s[1] - 1) for i in range(pick.integer("length", 2, 6))]
    return Net(lambda m, x: m.a(x[:, indices]), a=_conv(s, len(indices), 5, 1))


@block("map")
def layer_scale(pick: Picker, s: Shape) -> nn.Module:
    scale = nn.Parameter(_per_channel(s)[0])
    return Net(lambda m, x: x + m.gamma * m.a(x), a=_conv(s, s[1], s[1]), gamma=scale)


@block("map")
def prelu(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: m.act(x), act=nn.PReLU(pick.choice("n", [1, s[1]])))


@block("map", lambda s: min(s[2:]) > 1)
def instance_norm(pick: Picker, s: Shape) -> nn.Module:
    tracks = pick.choice("tracks", [True, False])
    norm = INSTANCE_NORM[_rank(s)](s[1], affine=pick.choice("affine", [True, False]), track_running_stats=tracks)
    return Net(lambda m, x: m.b(m.norm(m.a(x))), a=_conv(s, s[1], s[1], 1), norm=norm, b=_conv(s, s[1], 6, 1))


@block("map", _is_composite, is_mixing=True)
def group_norm(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: m.norm(x), norm=nn.GroupNorm(pick.choice("groups", [1, *divisors(s[1])]), s[1]))


@block("map", is_mixing=True)
def layer_norm_channels_last(pick: Picker, s: Shape) -> nn.Module:
    """The ConvNeXt block."""
    mid = pick.integer("mid", 3, 10)

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.b(F.gelu(m.a(m.norm(m.depthwise(x).movedim(1, -1)))))
        return x + (m.gamma * y).movedim(-1, 1)

    return Net(
        run,
        depthwise=_conv(s, s[1], s[1], groups=s[1]),
        norm=nn.LayerNorm(s[1]),
        a=nn.Linear(s[1], mid),
        b=nn.Linear(mid, s[1]),
        gamma=nn.Parameter(torch.zeros(s[1])),
    )


@block("map", is_mixing=True)
def channel_statistics(pick: Picker, s: Shape) -> nn.Module:
    """The spatial half of CBAM."""

    def run(m: Net, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * m.b(F.relu(m.a(pooled))).sigmoid()

    return Net(run, a=_conv(s, 2, 3), b=_conv(s, 3, 1))


@block("map", is_mixing=True)
def channel_softmax(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: x + m.a(x.softmax(1)), a=_conv(s, s[1], s[1], 1))


@block("map")
def shared(pick: Picker, s: Shape) -> nn.Module:
    """One convolution applied twice."""
    return Net(lambda m, x: x + m.a(F.relu(m.a(x))), a=_conv(s, s[1], s[1]))


@block("map")
def tied(pick: Picker, s: Shape) -> nn.Module:
    """Two convolutions of one weight."""
    mid = pick.integer("mid", 3, 8)
    a, b, c = _conv(s, s[1], mid), _conv(s, s[1], mid), _conv(s, 2 * mid, 5, 1)
    b.weight = a.weight
    return Net(lambda m, x: m.c(torch.cat([m.b(x), F.relu(m.a(x))], 1)), a=a, b=b, c=c)


@block("map")
def raw_parameters(pick: Picker, s: Shape) -> nn.Module:
    width = pick.integer("width", 3, 10)
    kernel = (3,) * _rank(s)
    return Net(
        lambda m, x: FUNCTIONAL_CONV[_rank(s)](x, m.kernel, m.shift, padding=1) * m.scale + m.constant,
        kernel=nn.Parameter(torch.zeros(width, s[1], *kernel)),
        shift=nn.Parameter(torch.zeros(width)),
        scale=nn.Parameter(_per_channel(s, width)),
        constant=_per_channel(s, width),
    )


@block("map")
def frozen_batch_norm(pick: Picker, s: Shape) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        scale = m.weight * (m.running_var + 1e-5).rsqrt()
        shift = m.bias - m.running_mean * scale
        shape = (1, -1) + (1,) * _rank(s)
        return x * scale.reshape(shape) + shift.reshape(shape)

    names = ("weight", "bias", "running_mean", "running_var")
    return Net(run, **{name: torch.zeros(s[1]) for name in names})


@block("map")
def position_map(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: x + m.position, position=nn.Parameter(torch.zeros(1, *s[1:])))


@block("map")
def gated_linear(pick: Picker, s: Shape) -> nn.Module:
    width, uses_module = pick.integer("width", 3, 8), pick.choice("uses_module", [True, False])

    def run(m: Net, x: Tensor) -> Tensor:
        if uses_module:
            return m.glu(m.a(x))
        value, gate = m.a(x).chunk(2, 1)
        return value * F.gelu(gate)

    return Net(run, a=_conv(s, s[1], 2 * width), glu=nn.GLU(1))


@block("map", lambda s: s[1] <= 8)
def repeat(pick: Picker, s: Shape) -> nn.Module:
    times = pick.choice("times", [2, 3])
    return Net(lambda m, x: F.relu(x.repeat(1, times, *(1,) * _rank(s)) + m.shift), shift=_per_channel(s, times * s[1]))


@block("map", lambda s: s[1] <= 8)
def interleave(pick: Picker, s: Shape) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return torch.stack([x, m.a(x)], 2).reshape(x.shape[0], 2 * s[1], *x.shape[2:])

    return Net(run, a=_conv(s, s[1], s[1]))


@block("map", _is_small)
def expanded_context(pick: Picker, s: Shape) -> nn.Module:
    """A pooled vector is broadcast over the map and joined with it."""
    space = tuple(range(2, len(s)))

    def run(m: Net, x: Tensor) -> Tensor:
        context = m.a(x.mean(space, keepdim=True)).expand(-1, -1, *x.shape[2:])
        return torch.cat([context, x], 1)

    return Net(run, a=_conv(s, s[1], pick.integer("width", 2, 6), 1))


@block("map", lambda s: len(s) == 4 and all(n % 2 == 0 for n in s[2:]) and s[1] <= 16)
def encoder_decoder(pick: Picker, s: Shape) -> nn.Module:
    """One level of a U-Net, joined with its own input."""
    mid, mode = pick.integer("mid", 3, 8), pick.choice("mode", ["nearest", "bilinear", "transposed"])

    def run(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.down(F.avg_pool2d(x, 2)))
        y = m.up(y) if mode == "transposed" else F.interpolate(y, scale_factor=2.0, mode=mode)
        return torch.cat([y, x], 1)

    return Net(run, down=_conv(s, s[1], mid), up=nn.ConvTranspose2d(mid, mid, 2, 2))


@block("map", lambda s: min(s[2:]) >= 4)
def spatial_crop(pick: Picker, s: Shape) -> nn.Module:
    start, step = pick.integer("start", 0, 2), pick.choice("step", [1, 2])
    return Net(lambda m, x: F.relu(x)[:, :, start::step])


@block("map", lambda s: len(s) == 4 and s[1] <= 8)
def unfold(pick: Picker, s: Shape) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1)
        return m.a(columns.reshape(x.shape[0], 9 * s[1], *x.shape[2:]))

    return Net(run, a=_conv(s, 9 * s[1], pick.integer("width", 4, 8), 1))


# --- from maps to tokens or vectors -----------------------------------------------------------------------------------


@block("map")
def to_vector(pick: Picker, s: Shape) -> nn.Module:
    how = pick.choice("how", ["mean", "pool", "flatten", "flatten_channels_last", "view"])
    space = tuple(range(2, len(s)))

    def run(m: Net, x: Tensor) -> Tensor:
        if how == "mean":
            return x.mean(space)
        if how == "pool":
            return torch.flatten(m.pools[len(s) - 3](x), 1)
        if how == "view":
            return x.reshape(x.shape[0], -1)
        return (x if how == "flatten" else x.movedim(1, -1)).flatten(1)

    pools = nn.ModuleList([nn.AdaptiveAvgPool1d(1), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool3d(1)])
    return Net(run, pools=pools)


@block("map")
def to_tokens(pick: Picker, s: Shape) -> nn.Module:
    if pick.choice("how", ["transpose", "permute"]) == "transpose":
        return Net(lambda m, x: x.flatten(2).transpose(1, 2))
    return Net(lambda m, x: x.movedim(1, -1).reshape(x.shape[0], -1, x.shape[1]))


# --- tokens -----------------------------------------------------------------------------------------------------------


@block("tokens")
def token_linear(pick: Picker, s: Shape) -> nn.Module:
    activation = pick.choice("activation", sorted(ACTIVATIONS))
    layer = nn.Linear(s[2], pick.integer("width", 4, 12), bias=pick.choice("bias", [True, False]))
    return Net(lambda m, x: ACTIVATIONS[activation](m.a(x)), a=layer)


@block("tokens")
def token_mlp(pick: Picker, s: Shape) -> nn.Module:
    mid = pick.integer("mid", 3, 12)
    return Net(
        lambda m, x: x + m.gamma * m.b(F.gelu(m.a(x))),
        a=nn.Linear(s[2], mid),
        b=nn.Linear(mid, s[2]),
        gamma=nn.Parameter(torch.zeros(s[2])),
    )


def _scaled_attention(q: Tensor, k: Tensor, v: Tensor, is_explicit: bool) -> Tensor:
    if is_explicit:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


@block("tokens")
def attention_fused(pick: Picker, s: Shape) -> nn.Module:
    heads, width = pick.integer("heads", 1, 3), pick.integer("head_width", 2, 5)
    taking = pick.choice("taking", ["unbind", "index", "chunk"])
    is_explicit, is_residual = pick.choice("is_explicit", [True, False]), pick.choice("is_residual", [True, False])

    def run(m: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if taking == "chunk":
            q, k, v = (y.view(b, n, heads, width).transpose(1, 2) for y in m.qkv(x).chunk(3, dim=2))
        else:
            qkv = m.qkv(x).reshape(b, n, 3, heads, width).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0) if taking == "unbind" else (qkv[0], qkv[1], qkv[2])
        y = m.out(_scaled_attention(q, k, v, is_explicit).transpose(1, 2).reshape(b, n, heads * width))
        return x + y if is_residual else y

    return Net(run, qkv=nn.Linear(s[2], 3 * heads * width), out=nn.Linear(heads * width, s[2]))


@block("tokens")
def attention_separate(pick: Picker, s: Shape) -> nn.Module:
    heads, is_explicit = pick.integer("heads", 1, 3), pick.choice("is_explicit", [True, False])
    qk_width, v_width = pick.integer("qk_width", 2, 4), pick.integer("v_width", 2, 4)

    def run(m: Net, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k = (layer(x).view(b, n, heads, qk_width).transpose(1, 2) for layer in (m.q, m.k))
        v = m.v(x).view(b, n, heads, v_width).transpose(1, 2)
        y = _scaled_attention(q, k, v, is_explicit) if is_explicit or qk_width == v_width else q @ (k.mT @ v)
        return x + m.out(y.transpose(1, 2).flatten(2))

    return Net(
        run,
        q=nn.Linear(s[2], heads * qk_width),
        k=nn.Linear(s[2], heads * qk_width),
        v=nn.Linear(s[2], heads * v_width),
        out=nn.Linear(heads * v_width, s[2]),
    )


@block("tokens", lambda s: s[1] <= 64)
def mixer(pick: Picker, s: Shape) -> nn.Module:
    mid = pick.integer("mid", 2, 8)
    return Net(
        lambda m, x: x + m.b(F.gelu(m.a(x.transpose(1, 2)))).transpose(1, 2),
        a=nn.Linear(s[1], mid),
        b=nn.Linear(mid, s[1]),
    )


@block("tokens", is_mixing=True)
def layer_norm(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: m.norm(x), norm=nn.LayerNorm(s[2], elementwise_affine=pick.choice("affine", [True, False])))


@block("tokens", is_mixing=True)
def rms_norm(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: m.norm(x), norm=nn.RMSNorm(s[2], eps=1e-6))


@block("tokens")
def token_position(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: x + m.position, position=nn.Parameter(torch.zeros(1, s[1], s[2])))


@block("tokens", lambda s: s[2] <= 12)
def token_cat(pick: Picker, s: Shape) -> nn.Module:
    width = pick.integer("width", 2, 6)
    return Net(lambda m, x: torch.cat([m.a(x), x, m.b(x)], 2), a=nn.Linear(s[2], width), b=nn.Linear(s[2], 3))


@block("tokens", lambda s: 2 <= s[1] <= 64)
def token_split(pick: Picker, s: Shape) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        first, rest = m.a(x).split([1, s[1] - 1], dim=1)
        return torch.cat([rest * first, first], 1)

    return Net(run, a=nn.Linear(s[2], pick.integer("width", 3, 10)))


@block("tokens")
def token_gate(pick: Picker, s: Shape) -> nn.Module:
    width = pick.integer("width", 3, 8)

    def run(m: Net, x: Tensor) -> Tensor:
        gate, value = m.a(x).split(width, dim=-1)
        return m.b(F.silu(gate) * value)

    return Net(run, a=nn.Linear(s[2], 2 * width), b=nn.Linear(width, s[2]))


@block("tokens", lambda s: s[1] * s[2] <= 1024)
def tokens_to_vector(pick: Picker, s: Shape) -> nn.Module:
    how = pick.choice("how", ["mean", "first", "flatten"])
    if how == "mean":
        return Net(lambda m, x: x.mean(1))
    return Net(lambda m, x: x[:, 0] if how == "first" else x.reshape(x.shape[0], s[1] * s[2]))


# --- vectors ----------------------------------------------------------------------------------------------------------


@block("vector")
def linear(pick: Picker, s: Shape) -> nn.Module:
    width = pick.integer("width", 4, 16)
    norm = nn.BatchNorm1d(width) if pick.choice("norm", [True, False]) else nn.Identity()
    activation = pick.choice("activation", sorted(ACTIVATIONS))
    return Net(lambda m, x: ACTIVATIONS[activation](m.norm(m.a(x))), a=nn.Linear(s[1], width), norm=norm)


@block("vector", lambda s: s[1] <= 32)
def mlp_skip(pick: Picker, s: Shape) -> nn.Module:
    mid = pick.integer("mid", 3, 12)
    return Net(lambda m, x: x + m.b(F.relu(m.a(x))), a=nn.Linear(s[1], mid), b=nn.Linear(mid, s[1]))


@block("vector", lambda s: s[1] <= 32)
def mlp_dense(pick: Picker, s: Shape) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return torch.cat([y, x, m.b(torch.cat([x, y], -1))], -1)

    mid = pick.integer("mid", 3, 8)
    return Net(run, a=nn.Linear(s[1], mid), b=nn.Linear(s[1] + mid, 4))


@block("vector")
def reshape_heads(pick: Picker, s: Shape) -> nn.Module:
    """Rows of (heads, width) meet a parameter per head and a matrix shared by the heads."""
    heads, width, out = pick.integer("heads", 2, 4), pick.integer("width", 2, 5), pick.integer("out", 2, 4)
    uses_einsum = pick.choice("uses_einsum", [True, False])

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.a(x).view(-1, heads, width) * m.per_head
        y = torch.einsum("bhd,de->bhe", x, m.matrix) if uses_einsum else x @ m.matrix
        return y.flatten(1)

    return Net(
        run,
        a=nn.Linear(s[1], heads * width),
        per_head=nn.Parameter(torch.zeros(heads, 1)),
        matrix=nn.Parameter(torch.zeros(width, out)),
    )


@block("vector")
def reshape_twice(pick: Picker, s: Shape) -> nn.Module:
    """Two factorisations of one axis, joined by a sum."""
    a, b = pick.integer("a", 2, 4), pick.integer("b", 2, 4)

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        y = x.view(-1, a, b).transpose(1, 2).reshape(-1, a * b)
        return m.b(x) + y if a != b else m.b(y)

    return Net(run, a=nn.Linear(s[1], a * b), b=nn.Linear(a * b, a * b))


@block("vector")
def vector_to_map(pick: Picker, s: Shape) -> nn.Module:
    channels, out = pick.integer("channels", 2, 6), pick.integer("out", 2, 4)
    return Net(
        lambda m, x: m.b(F.relu(m.a(x).view(-1, channels, 2, 2))).flatten(1),
        a=nn.Linear(s[1], channels * 4),
        b=nn.ConvTranspose2d(channels, out, 2),
    )


@block("vector", lambda s: s[1] <= 32 and _is_even(s))
def vector_halves(pick: Picker, s: Shape) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        a, b = x.tensor_split(2, -1) if pick_split else x.chunk(2, -1)
        return torch.cat([b, m.a(a) * b], 1)

    pick_split = pick.choice("tensor_split", [True, False])
    return Net(run, a=nn.Linear(s[1] // 2, s[1] // 2))


@block("vector", lambda s: s[1] <= 32)
def bilinear(pick: Picker, s: Shape) -> nn.Module:
    width = pick.integer("width", 3, 8)
    matrix = nn.Parameter(torch.zeros(width, s[1]))
    return Net(lambda m, x: F.linear(x, m.matrix) * m.a(x), matrix=matrix, a=nn.Linear(s[1], width))


@block("vector", lambda s: 4 <= s[1] <= 32, is_mixing=True)
def vector_norm(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: m.norm(x), norm=nn.LayerNorm(s[1]))


@block("vector", lambda s: s[1] <= 32, is_mixing=True)
def vector_softmax(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: m.a(x) * x.softmax(-1), a=nn.Linear(s[1], s[1]))


# --- networks ---------------------------------------------------------------------------------------------------------

INPUTS: dict[str, Sequence[Shape]] = {
    "map": ((2, 3, 6, 6), (2, 4, 8, 8), (2, 3, 4, 4), (2, 3, 12), (2, 2, 4, 4, 4)),
    "tokens": ((2, 5, 6), (2, 9, 8)),
    "vector": ((2, 6), (3, 10)),
}
CONVERSIONS = {"to_vector": "vector", "to_tokens": "tokens", "tokens_to_vector": "vector"}
MAX_CHANNELS = 32
OUTPUTS = ("plain", "head", "head", "head", "tuple", "dict")


def _layout_of(description: Description) -> str:
    layout = description["layout"]
    for item in description["blocks"]:
        layout = CONVERSIONS.get(item["kind"], layout)
    return layout


class RandomNetwork(nn.Module):
    """The network of a description; float64, its weights drawn from the description's seed."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.blocks, self.outputs = nn.ModuleList(), description["outputs"]
        shape = tuple(description["input"])
        self.channel_dim = -1 if _layout_of(description) == "tokens" else 1
        # Default initialisation draws from the global random state, which building must not move.
        with torch.random.fork_rng(devices=[]):
            for item in description["blocks"]:
                module = BLOCKS[item["kind"]].build(Replay(item), shape)
                shape = _shape_after(module, shape)
                self.blocks.append(module)
            self.head = nn.Identity() if self.outputs == "plain" else nn.Linear(shape[self.channel_dim], 5)
        randomise(self.double().eval(), description["seed"])

    def forward(self, x: Tensor) -> Any:
        for module in self.blocks:
            x = module(x)
        if self.outputs == "plain":
            return x
        y = self.head(x.movedim(self.channel_dim, -1))
        if self.outputs == "tuple":
            return y, None, x[:, :1]
        return {"logits": y, "n_classes": 5} if self.outputs == "dict" else y


def _shape_after(module: nn.Module, shape: Shape) -> Shape:
    with torch.no_grad():
        device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
        return tuple(module.eval()(torch.zeros(shape, device=device)).shape)


def describe_network(source: Source) -> Description:
    """Draw the description of a network; `RandomNetwork` builds it."""
    layout = source.choice(["map", "map", "map", "map", "tokens", "vector"])
    shape = source.choice(list(INPUTS[layout]))
    may_mix = source.choice([False, True])
    description: Description = {
        "layout": layout,
        "input": list(shape),
        "seed": source.integer(0, 2**16),
        "outputs": source.choice(list(OUTPUTS)),
        "blocks": [],
    }
    for _ in range(source.integer(2, 7)):
        kinds = [
            b.kind
            for b in BLOCKS.values()
            if b.layout == layout and (may_mix or not b.is_mixing) and b.fits(shape)
            for _ in range(3 if b.is_mixing or b.kind in CONVERSIONS else 1)
        ]
        kind = _first_map_block(description, layout, source) or source.choice(kinds)
        recorder = Recorder(source)
        with torch.device("meta"):
            shape_after = _shape_after(BLOCKS[kind].build(recorder, shape), shape)
        if layout == "map" and shape_after[1] > MAX_CHANNELS:
            continue
        shape = shape_after
        description["blocks"].append({"kind": kind, **recorder.values})
        layout = CONVERSIONS.get(kind, layout)
    return description


def _first_map_block(description: Description, layout: str, source: Source) -> str | None:
    """Networks begin with a layer of weights, mostly: what follows the input directly can seldom be cut."""
    if description["blocks"] or source.integer(0, 4) == 0:
        return None
    return {"map": "conv", "tokens": "token_linear", "vector": "linear"}[layout]


def example_input(description: Description) -> Tensor:
    """A random input for the network of a description."""
    generator = torch.Generator().manual_seed(description["seed"] + 1)
    return torch.randn(tuple(description["input"]), generator=generator, dtype=torch.float64)


def has_mixing(description: Description) -> bool:
    """Whether a block computes a statistic over channels, so that zeroing channels is not cutting them."""
    return any(BLOCKS[item["kind"]].is_mixing for item in description["blocks"])


def random_description(seed: int) -> Description:
    """The description that a seed of `random.Random` gives."""
    return describe_network(RandomSource(random.Random(seed)))


@st.composite
def networks(draw: Callable[..., Any]) -> Description:
    """Hypothesis strategy for descriptions of networks."""
    return describe_network(HypothesisSource(draw))


# --- kept sets --------------------------------------------------------------------------------------------------------


def kept_sets(groups: Iterable[Any], seed: int) -> dict[str, np.ndarray]:
    """A random kept set for every prunable group: one unit at least is kept, every block of a group loses as many.

    Most groups lose something wherever they can; one in six keeps everything.
    """
    rng = np.random.default_rng(seed)
    kept = {}
    for group in groups:
        if not group.is_prunable:
            continue
        labels = np.zeros(group.width, dtype=int) if group.balance is None else np.asarray(group.balance)
        blocks = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        most = min(len(positions) for positions in blocks) - 1
        n_cut = 0 if most < 1 or rng.random() < 1 / 6 else int(rng.integers(1, most + 1))
        kept[group.name] = np.sort(np.concatenate([rng.permutation(p)[n_cut:] for p in blocks]))
    return kept
