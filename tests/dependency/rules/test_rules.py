"""Operator rules one by one: a call between two layers, pruned at random, must equal the masked network."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import torchshear
from tests.dependency.rules.calls import Case, between_layers, check_rule, example
from torchshear.pruners import plan_from_kept


def attention(heads: int, key_heads: int, masked: bool) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        q = x.unflatten(2, (heads, -1)).transpose(1, 2)
        k = x.unflatten(2, (heads, -1))[:, :, :key_heads].transpose(1, 2)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if masked else None
        out = functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=heads != key_heads)
        return out.transpose(1, 2).flatten(2)

    return call


CASES = (
    Case("einsum_explicit", lambda x: torch.einsum("bi,bj->bij", x, x[:, :1]).flatten(1)),
    Case("slice_of_one", lambda x: x * x[:, 3:4], sizes=True),
    Case("einsum_scores", lambda x: torch.einsum("bti,bsi->bts", x, x) @ x, kind="tokens"),
    Case("einsum_implicit", lambda x: x + torch.einsum("ij,ji", x[:3, :3], x[:3, :3])),
    Case("einsum_ellipsis", lambda x: torch.einsum("...i,...i->...i", x, x), kind="tokens"),
    Case("einsum_diagonal_sum", lambda x: x * torch.einsum("bi->b", x).unsqueeze(1)),
    Case("bmm", lambda x: torch.bmm(torch.bmm(x, x.transpose(1, 2)), x), kind="tokens"),
    Case("baddbmm", lambda x: torch.baddbmm(x, x @ x.transpose(1, 2), x), kind="tokens"),
    Case("matmul_vector", lambda x: x * (x @ x.mean((0, 1))).unsqueeze(2), kind="tokens"),
    Case("attention", attention(3, 3, False), 2, "tokens", sizes=True),
    Case("attention_masked", attention(3, 3, True), 2, "tokens", sizes=True),
    Case("attention_grouped_queries", attention(4, 2, False), 1, "tokens", sizes=True),
    Case("amax_gate", lambda x: x * x.amax(1, keepdim=True)),
    Case("max_values", lambda x: x * x.max(1, keepdim=True).values),
    Case("max_positions", lambda x: x * x.max(1, keepdim=True).indices, 0),
    Case("argmax", lambda x: x * x.argmax(1, keepdim=True), 0),
    Case("max_of_all", lambda x: x / (1 + x.abs().max())),
    Case("variance", lambda x: x / (1 + x.var(1, keepdim=True))),
    Case("sum_of_all", lambda x: x + x.sum()),
    Case("logsumexp", lambda x: x - x.logsumexp(1, keepdim=True)),
    Case("vector_norm", lambda x: functional.normalize(x, dim=1)),
    Case("softmax", lambda x: x.softmax(1)),
    Case("cumsum", lambda x: x.cumsum(1)),
    Case("sort", lambda x: x.sort(1).values, 0),
    Case("index_select", lambda x: x.index_select(1, torch.tensor([5, 3, 3, 0, 11, 7, 1, 2, 4, 6, 8, 10])), sizes=True),
    Case("index_literal", lambda x: x[:, [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]], sizes=True),
    Case("index_pair", lambda x: x[:, :, [0, 2, 4], [1, 3, 5]].mean(2)[:, :, None, None], kind="maps"),
    Case("index_mask", lambda x: x * (torch.arange(12) > 5), 0),
    Case("zeros_added", lambda x: x + torch.zeros(x.shape[0], 12), sizes=True),
    Case("full_like", lambda x: x * torch.full_like(x, 2.0)),
    Case("new_ones", lambda x: x - x.new_ones(12), sizes=True),
    Case("arange_added", lambda x: x + torch.arange(12), 0),
    Case("stack_and_pick", lambda x: torch.stack([x, 2 * x], 2)[:, :, 1]),
    Case("narrow", lambda x: torch.cat([x.narrow(1, 4, 8), x.narrow(1, 0, 4)], 1), 2, sizes=True),
    Case("slice_step", lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1)),
    Case("slice_step_uneven", lambda x: torch.cat([x[:, 1:11:3], x[:, 2:10]], 1), 0),
    Case("windows", lambda x: x + x.unfold(1, 1, 1).squeeze(2), 0),
    Case("tensor_split", lambda x: torch.cat(torch.tensor_split(x, [5], 1)[::-1], 1), 2, sizes=True),
    Case("chunk_uneven", lambda x: torch.cat(x.chunk(5, 1)[::-1], 1), 4, sizes=True),
    Case("movedim", lambda x: x.movedim(1, -1).relu().movedim(-1, 1), kind="maps"),
    Case("movedim_pair", lambda x: x.movedim((1, 2), (2, 1)).relu().movedim((2, 1), (1, 2)), kind="maps"),
    Case("swapaxes", lambda x: x.swapaxes(1, 3).relu().swapaxes(1, 3), kind="maps"),
    Case("matrix_transpose", lambda x: x.mT.relu().mT, kind="tokens"),
    Case("squeeze_all", lambda x: x.unsqueeze(2).squeeze()),
    Case("expand_as", lambda x: x * x.mean(1, keepdim=True).expand_as(x)),
    Case("expand_literal", lambda x: x * x.mean(1, keepdim=True).expand(-1, 12), sizes=True),
    Case("repeat_ones", lambda x: x * x.mean(1, keepdim=True).repeat(1, 12), sizes=True),
    Case("repeat_and_fold", lambda x: x.repeat(1, 2).reshape(x.shape[0], 2, 12).sum(1), sizes=True),
    Case("repeat_interleave", lambda x: x.repeat_interleave(3, 1).reshape(x.shape[0], 12, 3).mean(2), sizes=True),
    Case("view_as", lambda x: x.reshape(-1, 3, 4).relu().view_as(x), 2, sizes=True),
    Case("unflatten", lambda x: x.unflatten(1, (2, 6)).transpose(1, 2).flatten(1), 2, sizes=True),
    Case("reshape_no_common_factors", lambda x: x.reshape(-1, 3, 4).relu().reshape(-1, 4, 3).flatten(1), 0),
    Case("where", lambda x: torch.where(x > 0, x, x.flip(1))),
    Case("masked_fill", lambda x: x.masked_fill(x < 0, 0.5)),
    Case("glu", lambda x: torch.cat([functional.glu(x, 1)] * 2, 1)),
    Case("clamp", lambda x: x.clamp(-0.1, 0.3)),
    Case("roll_back", lambda x: x.roll(-5, 1), sizes=True),
    Case("roll_flat", lambda x: x.roll(1), 0),
    Case("pixel_shuffle_back", lambda x: functional.pixel_unshuffle(functional.pixel_shuffle(x, 2), 2), kind="maps"),
    Case("channel_shuffle", lambda x: functional.channel_shuffle(x, 3), 2, "maps", sizes=True),
    Case("unfold_fold", lambda x: functional.fold(functional.unfold(x, 2, stride=2), 6, 2, stride=2), kind="maps"),
    Case("pool_and_resize", lambda x: functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2), kind="maps"),
    Case("pool_beside", lambda x: functional.avg_pool2d(x.unsqueeze(1), (2, 1), 1).squeeze(1), kind="tokens"),
    Case("max_pool_beside", lambda x: functional.max_pool2d(x.mT, (1, 2), 1).mT, kind="tokens"),
    Case("pool_padded", lambda x: functional.max_pool1d(x, 3, 1, 1), 0, "tokens"),
    Case("max_pool_with_positions", lambda x: functional.adaptive_max_pool2d(x, 6, True)[0], kind="maps"),
    Case("pad_reflect_space", lambda x: functional.pad(x, (1, 1, 1, 1), "reflect")[:, :, 1:-1, 1:-1], kind="maps"),
    Case("pad_channels", lambda x: functional.pad(x[:, :10], (0, 0, 0, 0, 1, 1)), 3, "maps", sizes=True),
    Case("instance_norm", lambda x: functional.instance_norm(x), kind="maps"),
    Case("group_norm", lambda x: functional.group_norm(x, 3), kind="maps"),
    Case("rms_norm", lambda x: functional.rms_norm(x, (12,)), sizes=True),
    Case("dropout2d", lambda x: functional.dropout2d(x, 0.5, False), kind="maps"),
    Case("detached", lambda x: x * x.detach().sigmoid()),
    Case("in_place_half", lambda x: torch.cat([x[:, :6].mul_(2), x[:, 6:]], 1), 2, sizes=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_rule_is_exact(case: Case) -> None:
    check_rule(case)


def test_every_channel_count_down_to_one_runs() -> None:
    model, x = between_layers(lambda x: x.unsqueeze(2).squeeze().relu()), example("features")
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    for kept in range(1, 12):
        plan = plan_from_kept(groups, {groups[0].name: np.arange(kept)})
        assert torchshear.verify(model, torchshear.shrink(model, plan, verify=False), plan, (x,)).max_error <= 1e-9
