"""Multiply-accumulate operations against counts by hand and published ones."""

import pytest
import torch
from torch import nn

import torchshear
from torchshear.dependency.plans._cut import Cut, dense_cost
from torchshear.graph._operator_record import node_macs


@pytest.mark.parametrize(
    ("target", "operands", "result", "macs"),
    [
        ("aten.conv2d.default", [(1, 3, 8, 8), (16, 3, 3, 3)], (1, 16, 6, 6), 16 * 36 * 27),
        ("aten.conv2d.default", [(1, 8, 8, 8), (8, 1, 3, 3)], (1, 8, 6, 6), 8 * 36 * 9),
        ("aten.conv_transpose2d.input", [(1, 4, 5, 5), (4, 6, 2, 2)], (1, 6, 10, 10), 4 * 25 * 24),
        ("aten.linear.default", [(2, 7, 5), (3, 5)], (2, 7, 3), 2 * 7 * 15),
        ("aten.matmul.default", [(2, 4, 5), (2, 5, 6)], (2, 4, 6), 2 * 4 * 30),
        ("aten.addmm.default", [(6,), (4, 5), (5, 6)], (4, 6), 120),
        ("aten.scaled_dot_product_attention.default", [(1, 2, 4, 8), (1, 2, 6, 8), (1, 2, 6, 3)], (1, 2, 4, 3), 528),
        ("aten.relu.default", [(4, 5)], (4, 5), 0),
    ],
)
def test_macs_by_hand(target: str, operands: list, result: tuple, macs: int) -> None:
    assert node_macs(target, operands, result) == macs


def test_cost_is_for_one_sample_and_falls_with_the_cut() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(4, 10),)))
    assert dense_cost(groups.graph).macs == 300
    assert dense_cost(groups.graph).n_params == 325
    cost = Cut(groups, {"0.weight[0]": torch.arange(8).numpy()}).cost()
    assert cost.macs == 120
    assert cost.n_params == 88 + 45
