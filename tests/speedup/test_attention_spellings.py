"""Attention as people write it: nn.MultiheadAttention with every option, and heads folded into the batch by hand."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Net, randomise
from tests.oracle import assert_equals_masked, n_elements
from torchshear.errors import ArgumentError

TOKENS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CAUSAL = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)


class OfTorch(nn.Module):
    """nn.MultiheadAttention between two layers, called in one of its ways; gives the weights too where asked."""

    def __init__(self, built: dict[str, Any], called: dict[str, Any], *, gives_weights: bool = False) -> None:
        super().__init__()
        self.stem, self.out, self.called, self.gives_weights = nn.Linear(3, 16), nn.Linear(16, 4), called, gives_weights
        self.attention = nn.MultiheadAttention(16, 4, **built)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Any:
        t = self.stem(x)
        keys = x if self.attention.kdim == 3 else t
        y, weights = self.attention(t, keys, keys, key_padding_mask=hidden, **self.called)
        return (self.out(y), weights) if self.gives_weights else self.out(y)


def _prune_exactly(model: nn.Module, args: tuple[Tensor, ...], **asked: Any) -> torchshear.PruneResult:
    """Prune by half and compare with the model whose cut weights are zero, also on another batch."""
    model = randomise(model.double()).eval()
    result = torchshear.prune(model, args, **{"ratio": 0.5, **asked})
    assert n_elements(result.model) < 0.7 * n_elements(model)
    assert_equals_masked(model, result.model, result.plan, args)
    return result


@pytest.mark.parametrize(
    ("built", "called"),
    [
        *product([{"batch_first": True}, {"batch_first": False}], [{}, {"need_weights": False}]),
        ({"batch_first": True}, {"average_attn_weights": False}),
        ({"batch_first": False}, {"attn_mask": CAUSAL}),
        (
            {"batch_first": True},
            {"attn_mask": torch.zeros(5, 5, dtype=torch.float64).masked_fill(CAUSAL, -torch.inf), "is_causal": True},
        ),
        ({"batch_first": True, "bias": False}, {}),
        ({"batch_first": True, "add_bias_kv": True}, {}),
        ({"batch_first": True, "add_zero_attn": True}, {}),
        ({"batch_first": True, "kdim": 3, "vdim": 3}, {}),
    ],
    ids=str,
)
def test_multihead_attention_is_cut_however_it_is_called(built: dict, called: dict) -> None:
    tokens = TOKENS if built["batch_first"] or "attn_mask" not in called else TOKENS.transpose(0, 1)
    result = _prune_exactly(OfTorch(built, called), (tokens,))
    assert {len(g.kept) for g in result.plan.groups if g.role in ("head_dim", "qk_dim", "v_dim")} == {2}
    result.model.train()(tokens).sum().backward()


class Pooling(nn.Module):
    """A learned query looks at all tokens, so that one projection makes queries and another keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(3, 16), nn.Linear(16, 4)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        t = self.stem(x)
        return self.out(self.attention(self.query.expand(len(t), 1, 16), t, t)[0])


def test_heads_are_halved_where_queries_are_projected_apart() -> None:
    """The rows of `in_proj_weight` for queries and those for keys and values are the same heads and dimensions."""
    result = _prune_exactly(Pooling(), (TOKENS,))
    assert {group.role: (group.width, len(group.kept)) for group in result.plan.groups if "head" in group.role} == {
        "heads": (4, 2),
        "head_dim": (4, 2),
    }


@pytest.mark.parametrize("called", [{}, {"average_attn_weights": False}], ids=str)
def test_attention_weights_that_are_given_keep_their_shape(called: dict) -> None:
    model = randomise(OfTorch({"batch_first": True}, called, gives_weights=True).double()).eval()
    small = torchshear.prune(model, (TOKENS,), ratio=0.5).model
    assert [out.shape for out in small(TOKENS)] == [out.shape for out in model(TOKENS)]
    assert n_elements(small) < 0.5 * n_elements(model)


@pytest.mark.parametrize(
    "hidden",
    [
        torch.tensor([[False, False, False, True, True], [False, False, False, False, True]]),
        torch.tensor([[0.0, 0.0, 0.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0, 0.0, -torch.inf]], dtype=torch.float64),
        torch.tensor([[False, True, True, True, True], [True, True, True, True, False]]),
    ],
    ids=["truth values", "infinities", "one key left"],
)
@pytest.mark.parametrize("attn_mask", [None, CAUSAL & (torch.arange(5) != 4)], ids=["", "also causal"])
def test_a_mask_of_padding_may_be_an_input(hidden: Tensor, attn_mask: Tensor | None) -> None:
    mask = (
        attn_mask
        if attn_mask is None or hidden.dtype is torch.bool
        else torch.zeros(5, 5, dtype=torch.float64).masked_fill(CAUSAL, -9.0)
    )
    model = randomise(OfTorch({"batch_first": True}, {"attn_mask": mask}).double()).eval()
    result = torchshear.prune(model, (TOKENS, hidden), ratio=0.5)
    assert n_elements(result.model) < 0.5 * n_elements(model)


def test_a_sample_that_is_padding_throughout_is_no_reason_to_refuse() -> None:
    hidden = torch.tensor([[False, False, False, True, True], [True] * 5])
    model = randomise(OfTorch({"batch_first": True}, {}).double()).eval()
    assert model(TOKENS, hidden).isnan().any((1, 2)).tolist() == [False, True]
    small = torchshear.prune(model, (TOKENS, hidden), ratio=0.5).model
    assert small(TOKENS, hidden).isnan().any((1, 2)).tolist() == [False, True]


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_with_padding_is_cut(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    parts = {"stem": nn.Linear(3, 16), "encoder": encoder, "out": nn.Linear(16, 4)}
    model = Net(lambda m, x, hidden: m.out(m.encoder(m.stem(x), src_key_padding_mask=hidden)), **parts)
    hidden = torch.tensor([[False, False, False, True, True], [False, False, False, False, True]])
    model = randomise(model.double()).eval()
    small = torchshear.prune(model, (TOKENS, hidden), ratio=0.5).model
    assert n_elements(small) < 0.3 * n_elements(model)


class ByHand(nn.Module):
    """Attention with the heads in the batch of a bmm, written in one of the usual ways."""

    def __init__(self, split: Callable, scaled: Callable, multiply: Callable, *, named: bool) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(3, 16), nn.Linear(16, 4)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.heads, self.width = 4, 4 if named else -1
        self.split, self.scaled, self.multiply = split, scaled, multiply

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        t = self.stem(x)
        q, k, v = (self.split(layer(t), self.heads, self.width) for layer in (self.q, self.k, self.v))
        weights = self.multiply(self.scaled(q), k).softmax(-1)
        y = torch.bmm(weights, v).view(b, self.heads, n, self.width).transpose(1, 2)
        return self.out(y.reshape(b, n, -1))


SPLITS = {
    "reshape": lambda t, h, d: t.view(*t.shape[:2], h, d).transpose(1, 2).reshape(t.shape[0] * h, t.shape[1], d),
    "view -1": lambda t, h, d: t.view(*t.shape[:2], h, -1).permute(0, 2, 1, 3).contiguous().view(-1, t.shape[1], 4),
    "flatten": lambda t, h, d: t.unflatten(-1, (h, d)).transpose(1, 2).flatten(0, 1),
    "in time": lambda t, h, d: t.transpose(0, 1).reshape(t.shape[1], t.shape[0] * h, d).transpose(0, 1),
}
SCALES = {
    "q * size": lambda q: q * q.shape[-1] ** -0.5,
    "q * number": lambda q: q * 0.5,
    "q / root": lambda q: q / q.shape[-1] ** 0.5,
}
PRODUCTS = {
    "bmm": lambda q, k: torch.bmm(q, k.transpose(1, 2)),
    "baddbmm": lambda q, k: torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=1.0),
    "einsum": lambda q, k: torch.einsum("bid,bjd->bij", q, k),
    "matmul": lambda q, k: q @ k.transpose(-1, -2),
}


@pytest.mark.parametrize(
    ("split", "scaled", "multiply", "named"),
    [
        *(("reshape", "q * size", multiply, False) for multiply in PRODUCTS),
        *(("reshape", scaled, "bmm", True) for scaled in SCALES),
        *((split, "q * size", "bmm", False) for split in SPLITS if split != "reshape"),
    ],
)
def test_heads_in_the_batch_are_cut(split: str, scaled: str, multiply: str, named: bool) -> None:
    model = ByHand(SPLITS[split], SCALES[scaled], PRODUCTS[multiply], named=named)
    result = _prune_exactly(model, (TOKENS,))
    assert result.model(torch.randn(3, 5, 3, dtype=torch.float64)).shape == (3, 5, 4)


def test_names_are_not_taken_twice_where_sizes_are_computed() -> None:
    """A computed size is multiplied in the graph; so are values, in calls that may be named the same."""
    model = randomise(ByHand(SPLITS["reshape"], SCALES["q * size"], PRODUCTS["bmm"], named=True).double()).eval()
    result = torchshear.prune(model, (TOKENS,), roles=("heads", "head_dim"), ratio=0.5)
    assert [len(group.kept) for group in result.plan.groups if group.role != "rank"] == [2, 2, 2]
    assert_equals_masked(model, result.model, result.plan, (TOKENS,))


def test_head_dimensions_stay_whole_by_either_spelling() -> None:
    """What the README says to do for the user's own class; this model has no feed-forward layer."""
    model = randomise(OfTorch({"batch_first": True}, {"need_weights": False}).double()).eval()
    for asked in ({"roles": ("residual", "ffn", "heads")}, {"ratio": {"head_dim": 0, "*": 0.5}}):
        result = torchshear.prune(model, (TOKENS,), **asked)
        assert [len(g.kept) for g in result.plan.groups if g.role == "head_dim"] == [4]
    assert result.form == "native"
    assert_equals_masked(model, result.model, result.plan, (TOKENS,))
    with pytest.raises(ArgumentError, match="'experts' or 'state'"):
        torchshear.prune(model, (TOKENS,), roles=("experts", "state"))
