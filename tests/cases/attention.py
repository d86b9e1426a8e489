"""Cases 17 to 19: attention and mixers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.blocks import Net
from tests.cases._base import case, image, noise


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

    return Net(run, stem=nn.Linear(10, 24), attention=attention, last=nn.Linear(24, 5)), (noise(2, 7, 10),)


@case(17, "fused qkv, reshape and unbind, SDPA: heads and head dimensions are separate groups")
def qkv_unbind_sdpa():
    return _attention_net("unbind", is_explicit=False)


@case(17, "fused qkv taken by index, explicit softmax")
def qkv_select_explicit():
    return _attention_net("index", is_explicit=True)


@case(17, "fused qkv, unbind, explicit softmax")
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


@case(17, "Vision Transformer: patches, class token, positions, pre-norm block", expect="mixed")
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
    ), (image(),)


@case(18, "attention whose values are wider than its keys")
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


@case(18, "cross dimensions by einsum and bmm")
def einsum_cross():
    def run(m, x):
        q, k, v = m.q(x), m.k(x), m.v(x)
        state = torch.einsum("bnd,bne->bde", k, v)
        return m.out(torch.bmm(q, state))

    layers = {"q": nn.Linear(10, 8), "k": nn.Linear(10, 8), "v": nn.Linear(10, 12), "out": nn.Linear(12, 5)}
    return Net(run, **layers), (noise(2, 6, 10),)


@case(18, "MLP-Mixer without norms: tokens and channels are mixed in turn")
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
    ), (image(),)


@case(18, "MLP-Mixer as published", expect="mixed")
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
    ), (image(),)


def _grouped_query(repeat: Callable[[Tensor], Tensor]) -> tuple:
    def run(m, x):
        b, n, _ = x.shape
        q = m.q(x).view(b, n, 4, 6).transpose(1, 2)
        k, v = (repeat(layer(x).view(b, n, 2, 6).transpose(1, 2)) for layer in (m.k, m.v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.out(x.transpose(1, 2).reshape(b, n, 24))

    layers = {"q": nn.Linear(10, 24), "k": nn.Linear(10, 12), "v": nn.Linear(10, 12), "out": nn.Linear(24, 5)}
    return Net(run, **layers), (noise(2, 7, 10),)


@case(19, "grouped-query attention by repeat_interleave")
def gqa_repeat():
    return _grouped_query(lambda x: x.repeat_interleave(2, dim=1))


@case(19, "grouped-query attention by expand and reshape, as Hugging Face does")
def gqa_expand():
    def repeat(x):
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)

    return _grouped_query(repeat)
