"""Layers of tokens and features: feed-forward blocks and experts."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.networks._base import network, noise


class FeedForward(nn.Module):
    """A gated or plain feed-forward block beside a residual stream with a norm."""

    def __init__(self, is_gated: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.gate = nn.Linear(16, 24) if is_gated else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        hidden = F.gelu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.down(hidden)


@network("a feed-forward block beside a residual stream", "residual norm", widths=(24,))
def feed_forward():
    return FeedForward(), noise(2, 5, 16)


@network("a gated feed-forward block beside a residual stream", "residual norm gate", widths=(24,))
def feed_forward_gated():
    return FeedForward(is_gated=True), noise(2, 5, 16)


class TwoReaders(nn.Module):
    """Hidden units that a linear layer reads, and something else as well."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        if self.other == "sum":
            return self.down(hidden) + hidden.sum(-1, keepdim=True)
        if self.other == "largest":
            return self.down(hidden) + hidden.amax(-1, keepdim=True)
        return self.down(hidden) + (hidden @ hidden.T).sum(-1, keepdim=True)


class Experts(nn.Module):
    """Weights of all experts in one tensor, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(6, 4), nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.zeros(4, 6, 9)), nn.Parameter(torch.zeros(4, 9, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bnd,edf->benf", x, self.up).relu()
        y = torch.einsum("benf,efd->bend", y, self.down)
        return self.head((y * self.router(x).softmax(-1).permute(0, 2, 1)[..., None]).sum(1))


@network("weights of all experts in one tensor, and a router", "experts cross_channel layer", widths=(4, 6, 9))
def experts():
    return Experts(), noise(3, 4, 6)


class GatedFeedForward(nn.Module):
    """A feed-forward part with a gate beside it, so that two layers make its units."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 9), nn.Linear(12, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@network("two layers that make the same units, one a gate", "gate", widths=(9,))
def gated_units():
    return GatedFeedForward(), noise(3, 12)
