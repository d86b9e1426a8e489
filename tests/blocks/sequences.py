"""Blocks over tokens (B, N, C) and vectors (B, C)."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.blocks._base import ACTIVATIONS, Shape, block, is_even
from tests.blocks._choices import Picker
from tests.networks import Net


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


@block("vector", lambda s: s[1] <= 32 and is_even(s))
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
