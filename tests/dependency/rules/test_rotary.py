"""Rotary positions of neighbouring pairs, on a part of each head: as many pairs go as the caller says, and no more."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from torchshear.pruners import plan_from_kept

HEADS, PAIRS, PASSED = 2, 4, 6
HEAD = 2 * PAIRS + PASSED


class Rotary(nn.Module):
    """The table holds each angle twice; half of it is read, and each angle repeated for both of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, HEADS * HEAD) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD, 5)
        self.register_buffer("frequency", 10.0 ** -torch.arange(PAIRS).double())

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[2]).double(), self.frequency)
        table = torch.cat([angles, angles], -1)
        cos, sin = (value[..., : PAIRS * 2 // 2].repeat_interleave(2, -1) for value in (table.cos(), table.sin()))
        turned, passed = x[..., : 2 * PAIRS], x[..., 2 * PAIRS :]
        other = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
        return torch.cat([turned * cos + other * sin, passed], -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], -1, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, scale=0.3)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kept", [[0, 2], [1], [0, 1, 2, 3]])
def test_pairs_go_one_by_one(kept: list[int]) -> None:
    torch.manual_seed(0)
    model = Rotary().double().eval()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    pairs = next(g for g in groups if any(member.name == "frequency" for member in g.members))
    assert pairs.is_prunable
    assert pairs.width == PAIRS
    small = torchshear.shrink(model, plan_from_kept(groups, {pairs.name: kept}))
    width = HEADS * (2 * len(kept) + PASSED)
    assert dict(small.named_parameters())["q.weight"].shape == (width, 5)
    gone = torch.ones(HEADS, HEAD, dtype=torch.bool)
    gone[:, 2 * PAIRS :] = False
    gone[:, [2 * pair + place for pair in kept for place in (0, 1)]] = False
    with torch.no_grad():
        for layer in (model.q, model.k):
            layer.weight[gone.flatten()] = 0
            layer.bias[gone.flatten()] = 0
        torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
