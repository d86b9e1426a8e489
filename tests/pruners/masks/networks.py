"""Attention and feed-forward networks of the tests of masks."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Separate(nn.Module):
    """Attention with layers of their own for queries, keys and values; several queries may share a key."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, inner: int = 6, width: int = 16) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.inner = heads, kv_heads, inner
        self.q = nn.Linear(width, heads * inner)
        self.k, self.v = nn.Linear(width, kv_heads * inner), nn.Linear(width, kv_heads * inner)
        self.out = nn.Linear(heads * inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as the input, (batch, tokens, width)."""
        b, n, _ = x.shape
        q = self.q(x).reshape(b, n, self.heads, self.inner).transpose(1, 2)
        k, v = (layer(x).reshape(b, n, self.kv_heads, self.inner).transpose(1, 2) for layer in (self.k, self.v))
        share = self.heads // self.kv_heads
        k, v = (one[:, :, None].expand(b, -1, share, n, self.inner).reshape(b, -1, n, self.inner) for one in (k, v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class FeedForward(nn.Module):
    """A gated or plain feed-forward block beside a residual stream with a norm."""

    def __init__(self, is_gated: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.gate = nn.Linear(16, 24) if is_gated else None

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as the input, (batch, tokens, 16)."""
        y = self.norm(x)
        hidden = functional.gelu(self.up(y)) if self.gate is None else functional.silu(self.gate(y)) * self.up(y)
        return x + self.down(hidden)


class TwoReaders(nn.Module):
    """Hidden units that a linear layer reads, and something else as well."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (batch, 5)."""
        hidden = torch.relu(self.up(x))
        if self.other == "sum":
            return self.down(hidden) + hidden.sum(-1, keepdim=True)
        if self.other == "largest":
            return self.down(hidden) + hidden.amax(-1, keepdim=True)
        return self.down(hidden) + (hidden @ hidden.T).sum(-1, keepdim=True)
