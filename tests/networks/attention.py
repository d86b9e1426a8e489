"""Attention in its spellings, and mixers of tokens."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.networks._base import Net, network, noise, picture


class FusedAttention(nn.Module):
    """Fused qkv as timm writes it; `taking` chooses unbind or indices, `is_explicit` the matmul-softmax form."""

    def __init__(self, width: int, heads: int, taking: str = "unbind", is_explicit: bool = False) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.scale, self.taking, self.is_explicit = self.head_width**-0.5, taking, is_explicit
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0) if self.taking == "unbind" else (qkv[0], qkv[1], qkv[2])
        if self.is_explicit:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


def _attention_net(taking: str, is_explicit: bool) -> tuple:
    attention = FusedAttention(24, 4, taking, is_explicit)

    def run(m, x):
        x = m.stem(x)
        return m.last(x + m.attention(x))

    return Net(run, stem=nn.Linear(10, 24), attention=attention, last=nn.Linear(24, 5)), noise(2, 7, 10)


@network(
    "fused qkv, reshape and unbind, SDPA: heads and head dimensions are separate groups",
    "attention residual traced",
    widths=(4, 6, 24),
)
def qkv_unbind_sdpa():
    return _attention_net("unbind", is_explicit=False)


@network("fused qkv taken by index, explicit softmax", "attention residual traced", widths=(4, 6, 24))
def qkv_select_explicit():
    return _attention_net("index", is_explicit=True)


@network("fused qkv, unbind, explicit softmax", "attention residual traced", widths=(4, 6, 24))
def qkv_unbind_explicit():
    return _attention_net("unbind", is_explicit=True)


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), FusedAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@network(
    "Vision Transformer: patches, class token, positions, pre-norm block",
    "attention residual norm parameters cross_channel traced",
    widths=(4, 6, 24, 96),
)
def vit():
    def run(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
        return m.head(m.norm(m.block(x))[:, 0])

    return Net(
        run,
        patches=nn.Conv2d(3, 24, 4, 4),
        token=nn.Parameter(torch.zeros(1, 1, 24)),
        position=nn.Parameter(torch.zeros(1, 17, 24)),
        block=ViTBlock(24, 4),
        norm=nn.LayerNorm(24),
        head=nn.Linear(24, 10),
    ), picture()


@network("attention whose values are wider than its keys", "attention traced", widths=(2, 4, 6))
def attention_unequal_widths():
    def run(m, x, context):
        b, n, _ = x.shape
        q = m.q(x).view(b, n, 2, 4).transpose(1, 2)
        k = m.k(context).view(b, -1, 2, 4).transpose(1, 2)
        v = m.v(context).view(b, -1, 2, 6).transpose(1, 2)
        weights = torch.matmul(q, k.transpose(2, 3)).div(2.0).softmax(-1)
        return m.out(torch.matmul(weights, v).transpose(1, 2).reshape(b, n, 12))

    layers = {"q": nn.Linear(10, 8), "k": nn.Linear(9, 8), "v": nn.Linear(9, 12), "out": nn.Linear(12, 5)}
    return Net(run, **layers), (noise(2, 6, 10), noise(2, 4, 9))


@network("cross dimensions by einsum and bmm", "attention", widths=(8, 12))
def einsum_cross():
    def run(m, x):
        q, k, v = m.q(x), m.k(x), m.v(x)
        state = torch.einsum("bnd,bne->bde", k, v)
        return m.out(torch.bmm(q, state))

    layers = {"q": nn.Linear(10, 8), "k": nn.Linear(10, 8), "v": nn.Linear(10, 12), "out": nn.Linear(12, 5)}
    return Net(run, **layers), noise(2, 6, 10)


@network("MLP-Mixer without norms: tokens and channels are mixed in turn", "residual", widths=(20, 24, 48))
def mixer():
    def run(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = x + m.token2(F.gelu(m.token1(x.transpose(1, 2)))).transpose(1, 2)
        x = x + m.channel2(F.gelu(m.channel1(x)))
        return m.head(x.mean(1))

    return Net(
        run,
        patches=nn.Conv2d(3, 24, 4, 4),
        token1=nn.Linear(16, 20),
        token2=nn.Linear(20, 16),
        channel1=nn.Linear(24, 48),
        channel2=nn.Linear(48, 24),
        head=nn.Linear(24, 10),
    ), picture()


@network("MLP-Mixer as published", "residual norm cross_channel", widths=(20, 24))
def mixer_normed():
    def run(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = x + m.token2(F.gelu(m.token1(m.norm1(x).transpose(1, 2)))).transpose(1, 2)
        return m.head(m.norm2(x).mean(1))

    return Net(
        run,
        patches=nn.Conv2d(3, 24, 4, 4),
        norm1=nn.LayerNorm(24),
        token1=nn.Linear(16, 20),
        token2=nn.Linear(20, 16),
        norm2=nn.LayerNorm(24),
        head=nn.Linear(24, 10),
    ), picture()


def _grouped_query(repeat: Callable[[Tensor], Tensor]) -> tuple:
    def run(m, x):
        b, n, _ = x.shape
        q = m.q(x).view(b, n, 4, 6).transpose(1, 2)
        k, v = (repeat(layer(x).view(b, n, 2, 6).transpose(1, 2)) for layer in (m.k, m.v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.out(x.transpose(1, 2).reshape(b, n, 24))

    layers = {"q": nn.Linear(10, 24), "k": nn.Linear(10, 12), "v": nn.Linear(10, 12), "out": nn.Linear(24, 5)}
    return Net(run, **layers), noise(2, 7, 10)


@network("grouped-query attention by repeat_interleave", "attention copied traced", widths=(2, 2, 6, 6))
def gqa_repeat():
    return _grouped_query(lambda x: x.repeat_interleave(2, dim=1))


@network(
    "grouped-query attention by expand and reshape, as Hugging Face does",
    "attention copied traced",
    widths=(2, 2, 6, 6),
)
def gqa_expand():
    def repeat(x):
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)

    return _grouped_query(repeat)


@network("attention by nn.MultiheadAttention", "attention residual traced", widths=(4, 6, 24))
def multihead_attention():
    attention = nn.MultiheadAttention(24, 4, batch_first=True)

    def run(m, x):
        x = m.stem(x)
        return m.last(x + m.attention(x, x, x, need_weights=False)[0] / math.sqrt(2))

    return Net(run, stem=nn.Linear(10, 24), attention=attention, last=nn.Linear(24, 5)), noise(2, 7, 10)


class Attention(nn.Module):
    """Self-attention with fused qkv, as vision transformers write it."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Separate(nn.Module):
    """Attention with layers of their own for queries, keys and values; several queries may share a key."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, inner: int = 6, width: int = 16) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.inner = heads, kv_heads, inner
        self.q = nn.Linear(width, heads * inner)
        self.k, self.v = nn.Linear(width, kv_heads * inner), nn.Linear(width, kv_heads * inner)
        self.out = nn.Linear(heads * inner, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).reshape(b, n, self.heads, self.inner).transpose(1, 2)
        k, v = (layer(x).reshape(b, n, self.kv_heads, self.inner).transpose(1, 2) for layer in (self.k, self.v))
        share = self.heads // self.kv_heads
        k, v = (one[:, :, None].expand(b, -1, share, n, self.inner).reshape(b, -1, n, self.inner) for one in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


@network("layers for queries, keys and values; two queries share a key", "attention copied", widths=(2, 2, 6, 6))
def separate_projections():
    return Separate(kv_heads=2), noise(2, 5, 16)


class EncoderBlock(nn.Module):
    """Attention of six query heads, of which three share a key and value head, and a feed-forward part."""

    def __init__(self, kv_heads: int = 6) -> None:
        super().__init__()
        self.kv_heads, self.n_shared = kv_heads, 6 // kv_heads
        self.q, self.kv, self.o = nn.Linear(12, 24), nn.Linear(12, 8 * kv_heads), nn.Linear(24, 12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor, xi: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).reshape(batch, tokens, self.kv_heads, self.n_shared, 4).permute(0, 2, 3, 1, 4)
        k, v = self.kv(x).reshape(batch, tokens, 2, self.kv_heads, 1, 4).permute(2, 0, 3, 4, 1, 5).unbind(0)
        heads = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        heads = heads if xi is None else heads * xi[:, :, None, None]
        x = x + self.o(heads.permute(0, 3, 1, 2, 4).reshape(batch, tokens, 24))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


@network(
    "an encoder block whose query heads share keys, and a classifier", "attention residual traced", widths=(2, 3, 4, 20)
)
def encoder_block():
    return EncoderBlock(2), noise(2, 5, 12)
