"""Roles where a parameter takes the place of a computed value: learned queries, and experts that indices choose."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import torchshear

LATENTS, WIDTH, VALUES = 12, 16, 20


class Pooled(nn.Module):
    """Learned queries read the tokens, and the tokens read these (as Perceiver, Q-Former and CoCa have them)."""

    def __init__(self, read: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.latents = nn.Linear(8, 32), nn.Parameter(torch.randn(LATENTS, WIDTH))
        self.k, self.v = nn.Linear(32, WIDTH), nn.Linear(32, VALUES)
        self.q2, self.k2, self.v2 = nn.Linear(32, 6), nn.Linear(VALUES, 6), nn.Linear(VALUES, 10)
        self.head, self.read = nn.Linear(10, 5), read

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x)
        pooled = self.read(self.latents, self.k(tokens), self.v(tokens))
        return self.head(scaled_dot_product_attention(self.q2(tokens), self.k2(pooled), self.v2(pooled)))


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q.expand(len(k), -1, -1), k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(1, 2)) / 4).softmax(-1) @ v


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.T).mul(0.25).softmax(1).transpose(1, 2) @ v


@pytest.mark.parametrize("read", [expanded, by_hand, keys_first])
@pytest.mark.parametrize("batch", [1, 2])
def test_learned_queries(read: Callable[[Tensor, Tensor, Tensor], Tensor], batch: int) -> None:
    groups = torchshear.analyze(torchshear.trace(Pooled(read).eval(), (torch.randn(batch, 9, 8),)))
    roles = {group.width: group.role for group in groups}
    assert roles == {LATENTS: "queries", WIDTH: "qk_dim", VALUES: "v_dim", 32: "rank", 6: "qk_dim", 10: "v_dim"}


def test_queries_are_pruned_where_asked() -> None:
    """Fewer latents are the network with those latents alone: compared with one whose rows were taken by hand."""
    model = Pooled(by_hand).eval()
    x = torch.randn(2, 9, 8)
    result = torchshear.prune(model, (x,), roles="queries")
    kept = torch.from_numpy(result.plan.kept["latents[0]"])
    assert len(kept) == LATENTS // 2
    model.latents = nn.Parameter(model.latents[kept])
    torch.testing.assert_close(result.model(x), model(x))


def test_a_router_is_no_attention() -> None:
    """A softmax over what a weight makes is that of a router or classifier."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.table, self.head = nn.Linear(8, 16), nn.Parameter(torch.randn(16, 7)), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.stem(x) @ self.table).softmax(-1))

    groups = torchshear.analyze(torchshear.trace(Routed().eval(), (torch.randn(2, 9, 8),)))
    assert {group.width: group.role for group in groups} == {16: "rank", 7: "ffn"}


class Chosen(nn.Module):
    """Each token has one expert, whose weights and biases are rows of parameters (as gpt-oss has them)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 5)
        self.up, self.up_bias = nn.Parameter(torch.randn(4, 16, 24)), nn.Parameter(torch.randn(4, 24))
        self.down, self.down_bias = nn.Parameter(torch.randn(4, 24, 16)), nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        best = self.router(h).argmax(-1)
        inner = (torch.bmm(h[:, None], self.up[best]) + self.up_bias[best][:, None]).relu()
        return self.head(h + (inner.bmm(self.down[best]) + self.down_bias[best][:, None])[:, 0])


def test_experts_that_indices_choose() -> None:
    groups = torchshear.analyze(torchshear.trace(Chosen().eval(), (torch.randn(6, 8),)))
    assert {group.width: group.role for group in groups} == {16: "residual", 24: "expert_ffn", 4: "experts"}
