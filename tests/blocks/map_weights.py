"""Blocks over maps (B, C, *space) with norms, shared and raw tensors, copies, and the ways from maps to the rest."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.blocks._base import (
    FUNCTIONAL_CONV,
    INSTANCE_NORM,
    Shape,
    block,
    conv_of,
    divisors,
    is_composite,
    is_small,
    per_channel,
    rank_of,
)
from tests.blocks._choices import Picker
from tests.networks import Net


@block("map")
def layer_scale(pick: Picker, s: Shape) -> nn.Module:
    scale = nn.Parameter(per_channel(s)[0])
    return Net(lambda m, x: x + m.gamma * m.a(x), a=conv_of(s, s[1], s[1]), gamma=scale)


@block("map")
def prelu(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: m.act(x), act=nn.PReLU(pick.choice("n", [1, s[1]])))


@block("map", lambda s: min(s[2:]) > 1)
def instance_norm(pick: Picker, s: Shape) -> nn.Module:
    tracks = pick.choice("tracks", [True, False])
    norm = INSTANCE_NORM[rank_of(s)](s[1], affine=pick.choice("affine", [True, False]), track_running_stats=tracks)
    return Net(lambda m, x: m.b(m.norm(m.a(x))), a=conv_of(s, s[1], s[1], 1), norm=norm, b=conv_of(s, s[1], 6, 1))


@block("map", is_composite, is_mixing=True)
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
        depthwise=conv_of(s, s[1], s[1], groups=s[1]),
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

    return Net(run, a=conv_of(s, 2, 3), b=conv_of(s, 3, 1))


@block("map", is_mixing=True)
def channel_softmax(pick: Picker, s: Shape) -> nn.Module:
    return Net(lambda m, x: x + m.a(x.softmax(1)), a=conv_of(s, s[1], s[1], 1))


@block("map")
def shared(pick: Picker, s: Shape) -> nn.Module:
    """One convolution applied twice."""
    return Net(lambda m, x: x + m.a(F.relu(m.a(x))), a=conv_of(s, s[1], s[1]))


@block("map")
def tied(pick: Picker, s: Shape) -> nn.Module:
    """Two convolutions of one weight."""
    mid = pick.integer("mid", 3, 8)
    a, b, c = conv_of(s, s[1], mid), conv_of(s, s[1], mid), conv_of(s, 2 * mid, 5, 1)
    b.weight = a.weight
    return Net(lambda m, x: m.c(torch.cat([m.b(x), F.relu(m.a(x))], 1)), a=a, b=b, c=c)


@block("map")
def raw_parameters(pick: Picker, s: Shape) -> nn.Module:
    width = pick.integer("width", 3, 10)
    kernel = (3,) * rank_of(s)
    return Net(
        lambda m, x: FUNCTIONAL_CONV[rank_of(s)](x, m.kernel, m.shift, padding=1) * m.scale + m.constant,
        kernel=nn.Parameter(torch.zeros(width, s[1], *kernel)),
        shift=nn.Parameter(torch.zeros(width)),
        scale=nn.Parameter(per_channel(s, width)),
        constant=per_channel(s, width),
    )


@block("map")
def frozen_batch_norm(pick: Picker, s: Shape) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        scale = m.weight * (m.running_var + 1e-5).rsqrt()
        shift = m.bias - m.running_mean * scale
        shape = (1, -1) + (1,) * rank_of(s)
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

    return Net(run, a=conv_of(s, s[1], 2 * width), glu=nn.GLU(1))


@block("map", lambda s: s[1] <= 8)
def repeat(pick: Picker, s: Shape) -> nn.Module:
    times = pick.choice("times", [2, 3])
    return Net(
        lambda m, x: F.relu(x.repeat(1, times, *(1,) * rank_of(s)) + m.shift), shift=per_channel(s, times * s[1])
    )


@block("map", lambda s: s[1] <= 8)
def interleave(pick: Picker, s: Shape) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        return torch.stack([x, m.a(x)], 2).reshape(x.shape[0], 2 * s[1], *x.shape[2:])

    return Net(run, a=conv_of(s, s[1], s[1]))


@block("map", is_small)
def expanded_context(pick: Picker, s: Shape) -> nn.Module:
    """A pooled vector is broadcast over the map and joined with it."""
    space = tuple(range(2, len(s)))

    def run(m: Net, x: Tensor) -> Tensor:
        context = m.a(x.mean(space, keepdim=True)).expand(-1, -1, *x.shape[2:])
        return torch.cat([context, x], 1)

    return Net(run, a=conv_of(s, s[1], pick.integer("width", 2, 6), 1))


@block("map", lambda s: len(s) == 4 and all(n % 2 == 0 for n in s[2:]) and s[1] <= 16)
def encoder_decoder(pick: Picker, s: Shape) -> nn.Module:
    """One level of a U-Net, joined with its own input."""
    mid, mode = pick.integer("mid", 3, 8), pick.choice("mode", ["nearest", "bilinear", "transposed"])

    def run(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.down(F.avg_pool2d(x, 2)))
        y = m.up(y) if mode == "transposed" else F.interpolate(y, scale_factor=2.0, mode=mode)
        return torch.cat([y, x], 1)

    return Net(run, down=conv_of(s, s[1], mid), up=nn.ConvTranspose2d(mid, mid, 2, 2))


@block("map", lambda s: min(s[2:]) >= 4)
def spatial_crop(pick: Picker, s: Shape) -> nn.Module:
    start, step = pick.integer("start", 0, 2), pick.choice("step", [1, 2])
    return Net(lambda m, x: F.relu(x)[:, :, start::step])


@block("map", lambda s: len(s) == 4 and s[1] <= 8)
def unfold(pick: Picker, s: Shape) -> nn.Module:
    def run(m: Net, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1)
        return m.a(columns.reshape(x.shape[0], 9 * s[1], *x.shape[2:]))

    return Net(run, a=conv_of(s, 9 * s[1], pick.integer("width", 4, 8), 1))


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
