"""Blocks over maps (B, C, *space) that route channels: convolutions, concatenation, split, shuffle, gates."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.blocks._base import (
    ACTIVATIONS,
    BATCH_NORM,
    POOL,
    TRANSPOSED,
    Shape,
    block,
    conv_of,
    divisors,
    is_composite,
    is_even,
    is_small,
    rank_of,
)
from tests.blocks._choices import Picker
from tests.networks import Net


@block("map")
def conv(pick: Picker, s: Shape) -> nn.Module:
    rank, width = rank_of(s), pick.integer("width", 4, 16)
    norms = {"none": nn.Identity, "batch": BATCH_NORM[rank], "batch_plain": BATCH_NORM[rank]}
    norm = pick.choice("norm", sorted(norms))
    stride = pick.choice("stride", [1, 1, 2]) if min(s[2:]) >= 6 else 1
    options = {"affine": False} if norm == "batch_plain" else {}
    return Net(
        lambda m, x: ACTIVATIONS[m.activation](m.norm(m.conv(x))),
        conv=conv_of(
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
        a=conv_of(s, s[1], mid),
        norm=BATCH_NORM[rank_of(s)](mid),
        b=conv_of(s, mid, s[1], 1),
    )


@block("map", is_small)
def dense(pick: Picker, s: Shape) -> nn.Module:
    growth, first = pick.integer("growth", 2, 6), pick.choice("input_first", [True, False])

    def run(m: Net, x: Tensor) -> Tensor:
        new = m.a(F.relu(m.norm(x)))
        x = torch.cat([x, new] if first else [new, x], 1)
        return torch.cat([m.b(x), x], 1)

    return Net(run, norm=BATCH_NORM[rank_of(s)](s[1]), a=conv_of(s, s[1], growth), b=conv_of(s, s[1] + growth, 3))


@block("map")
def inception(pick: Picker, s: Shape) -> nn.Module:
    a, b, c = (pick.integer(name, 2, 6) for name in "abc")

    def run(m: Net, x: Tensor) -> Tensor:
        pooled = POOL[rank_of(s)](x, 3, stride=1, padding=1)
        return torch.cat([m.a(x), m.b2(F.relu(m.b1(x))), m.c(pooled)], 1)

    return Net(run, a=conv_of(s, s[1], a, 1), b1=conv_of(s, s[1], b, 1), b2=conv_of(s, b, b), c=conv_of(s, s[1], c, 1))


@block("map", lambda s: is_composite(s) and s[1] <= 16)
def chunk_reused(pick: Picker, s: Shape) -> nn.Module:
    n_parts = pick.choice("n_parts", divisors(s[1])[:2])
    order = [pick.integer(f"part{i}", 0, n_parts - 1) for i in range(n_parts)]
    part = s[1] // n_parts

    def run(m: Net, x: Tensor) -> Tensor:
        parts = x.chunk(n_parts, 1)
        return torch.cat([*(parts[i] for i in order), m.a(parts[-1]) + parts[0]], 1)

    return Net(run, a=conv_of(s, part, part))


@block("map", lambda s: s[1] >= 4)
def split_uneven(pick: Picker, s: Shape) -> nn.Module:
    first, width = pick.integer("first", 1, s[1] - 1), pick.integer("width", 3, 12)

    def run(m: Net, x: Tensor) -> Tensor:
        a, b = torch.split(x, [first, s[1] - first], 1)
        return m.b(b) + m.a(a)

    return Net(run, a=conv_of(s, first, width), b=conv_of(s, s[1] - first, width, 1))


@block("map", lambda s: s[1] >= 6 and s[1] <= 16)
def split_reordered(pick: Picker, s: Shape) -> nn.Module:
    a = pick.integer("a", 1, s[1] // 3)
    b = pick.integer("b", 1, s[1] // 3)
    uses_twice = pick.choice("uses_twice", [True, False])

    def run(m: Net, x: Tensor) -> Tensor:
        p, q, r = x.split([a, b, s[1] - a - b], 1)
        return torch.cat([F.relu(r), m.a(p), q, p] if uses_twice else [r, m.a(p), q], 1)

    return Net(run, a=conv_of(s, a, 4, 1))


@block("map", is_composite)
def channel_shuffle(pick: Picker, s: Shape) -> nn.Module:
    groups = pick.choice("groups", divisors(s[1])[:-1])

    def run(m: Net, x: Tensor) -> Tensor:
        x = x.view(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
        return x.transpose(1, 2).flatten(1, 2)

    return Net(run)


@block("map", is_composite)
def channel_shuffle_module(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: m.shuffle(x), shuffle=nn.ChannelShuffle(pick.choice("groups", divisors(s[1])[:-1])))


@block("map", is_even)
def shuffle_unit(pick: Picker, s: Shape) -> nn.Module:
    """The ShuffleNetV2 unit: one half passes, the other goes through depthwise and 1x1 convolutions, then a shuffle."""
    half = s[1] // 2

    def run(m: Net, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        x = torch.cat([a, m.out(m.depthwise(F.relu(m.into(b))))], 1)
        x = x.reshape(x.shape[0], 2, half, *x.shape[2:]).transpose(1, 2)
        return x.reshape(x.shape[0], 2 * half, *x.shape[3:])

    return Net(
        run,
        into=conv_of(s, half, half, 1),
        depthwise=conv_of(s, half, half, groups=half),
        out=conv_of(s, half, half, 1),
    )


@block("map", is_composite)
def grouped(pick: Picker, s: Shape) -> nn.Module:
    groups = pick.choice("groups", divisors(s[1])[:2])
    width = groups * pick.integer("per_group", 1, 4)
    return Net(lambda m, x: F.relu(m.a(x)), a=conv_of(s, s[1], width, pick.choice("kernel", [1, 3]), groups=groups))


@block("map", is_composite)
def grouped_residual(pick: Picker, s: Shape) -> nn.Module:
    """The ResNeXt bottleneck."""
    groups, per_group = pick.choice("groups", [2, 3, 4]), pick.integer("per_group", 2, 4)
    mid = groups * per_group
    return Net(
        lambda m, x: x + m.c(F.relu(m.norm(m.b(F.relu(m.a(x)))))),
        a=conv_of(s, s[1], mid, 1),
        b=conv_of(s, mid, mid, groups=groups),
        norm=BATCH_NORM[rank_of(s)](mid),
        c=conv_of(s, mid, s[1], 1),
    )


@block("map", is_small)
def depthwise(pick: Picker, s: Shape) -> nn.Module:
    multiplier = pick.choice("multiplier", [1, 1, 2])
    return Net(
        lambda m, x: F.relu(m.norm(m.a(x))),
        a=conv_of(s, s[1], multiplier * s[1], groups=s[1], bias=False),
        norm=BATCH_NORM[rank_of(s)](multiplier * s[1]),
    )


@block("map")
def squeeze_excitation(pick: Picker, s: Shape) -> nn.Module:
    mid, uses_linear = pick.integer("mid", 2, 6), pick.choice("uses_linear", [True, False])
    space = tuple(range(2, len(s)))

    def run(m: Net, x: Tensor) -> Tensor:
        if uses_linear:
            gate = m.b(F.relu(m.a(x.mean(space)))).sigmoid().reshape(x.shape[0], -1, *(1,) * rank_of(s))
        else:
            gate = m.b(F.relu(m.a(x.mean(space, keepdim=True)))).sigmoid()
        return gate * x

    if uses_linear:
        return Net(run, a=nn.Linear(s[1], mid), b=nn.Linear(mid, s[1]))
    return Net(run, a=conv_of(s, s[1], mid, 1), b=conv_of(s, mid, s[1], 1))


@block("map")
def gate_one_channel(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: x * m.a(x).sigmoid(), a=conv_of(s, s[1], 1, 1))


@block("map")
def flip(pick: Picker, s: Shape) -> nn.Module:
    joins = pick.choice("joins", [True, False])
    return Net(lambda m, x: m.a(x) + x.flip(1) if joins else m.a(x.flip(1)), a=conv_of(s, s[1], s[1], 1))


@block("map", lambda s: s[1] >= 4)
def roll(pick: Picker, s: Shape) -> nn.Module:
    shift, width = pick.integer("shift", -3, 3), pick.integer("width", 4, 10)
    return Net(lambda m, x: m.a(x.roll(shift, 1)), a=conv_of(s, s[1], width, 1))


@block("map", lambda s: len(s) == 4 and max(s[2:]) <= 6)
def pixel_shuffle(pick: Picker, s: Shape) -> nn.Module:
    width = pick.integer("width", 2, 4)
    return Net(lambda m, x: m.shuffle(F.relu(m.a(x))), a=conv_of(s, s[1], 4 * width, 1), shuffle=nn.PixelShuffle(2))


@block("map", lambda s: len(s) == 4 and s[1] <= 12 and all(n % 2 == 0 for n in s[2:]))
def pixel_unshuffle(pick: Picker, s: Shape) -> nn.Module:
    width = pick.integer("width", 4, 12)
    return Net(lambda m, x: m.a(m.unshuffle(x)), a=conv_of(s, 4 * s[1], width, 1), unshuffle=nn.PixelUnshuffle(2))


@block("map")
def transposed(pick: Picker, s: Shape) -> nn.Module:
    groups = pick.choice("groups", [1, *divisors(s[1])[:2]])
    stride = pick.choice("stride", [1, 2]) if max(s[2:]) <= 4 and len(s) < 5 else 1
    layer = TRANSPOSED[rank_of(s)](s[1], groups * pick.integer("per_group", 1, 4), 2, stride=stride, groups=groups)
    return Net(lambda m, x: F.relu(m.a(x)), a=layer)


@block("map", is_small)
def pad_shortcut(pick: Picker, s: Shape) -> nn.Module:
    """Option A of the CIFAR ResNet: the shortcut gains zero channels."""
    front, back = pick.integer("front", 0, 4), pick.integer("back", 1, 4)
    mid = pick.integer("mid", 2, 8)
    pads = (0, 0) * rank_of(s) + (front, back)
    return Net(
        lambda m, x: F.relu(F.pad(x, pads) + m.b(F.relu(m.a(x)))),
        a=conv_of(s, s[1], mid),
        b=conv_of(s, mid, front + s[1] + back, 1),
    )


@block("map", lambda s: s[1] >= 4)
def channel_slice(pick: Picker, s: Shape) -> nn.Module:
    start, stop = pick.integer("start", 0, s[1] // 2), pick.integer("stop", s[1] // 2 + 1, s[1])
    step = pick.choice("step", [1, 2])
    return Net(lambda m, x: m.a(x[:, start:stop:step]), a=conv_of(s, len(range(start, stop, step)), 6, 1))


@block("map", lambda s: s[1] >= 4)
def slice_update(pick: Picker, s: Shape) -> nn.Module:
    """The partial convolution of FasterNet: a slice is transformed and joined with the rest."""
    part = pick.integer("part", 1, s[1] - 1)
    return Net(lambda m, x: torch.cat([m.a(x[:, :part]), x[:, part:]], 1), a=conv_of(s, part, part))


@block("map", lambda s: 3 <= s[1] <= 16)
def channel_index(pick: Picker, s: Shape) -> nn.Module:
    indices = [pick.integer(f"index{i}", 0, s[1] - 1) for i in range(pick.integer("length", 2, 6))]
    return Net(lambda m, x: m.a(x[:, indices]), a=conv_of(s, len(indices), 5, 1))
