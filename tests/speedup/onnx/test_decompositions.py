"""Operators that the exporter does not take are written otherwise, and compute the same in onnxruntime."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.networks import Net
from torchshear import export_onnx
from torchshear.speedup.onnx._decompositions import _grouped_product, _histogram, _padding


def windows(masked: bool) -> Net:
    """Attention inside windows: five dimensions."""

    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(x.shape[0], 3, 4, 2, 12).transpose(2, 3).chunk(3, -1)
        mask = torch.ones(4, 4, dtype=torch.bool, device=x.device).tril() if m.masked else None
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)

    return Net(run, masked=masked, qkv=nn.Linear(8, 24))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_five_dimensions(tmp_path: Path, masked: bool) -> None:
    file = export_onnx(windows(masked), tmp_path / "model.onnx", torch.randn(2, 12, 8))
    assert file.dynamic_batch
    assert file.max_error < 1e-5


def test_counts_in_bins(tmp_path: Path) -> None:
    values = torch.tensor([0.0, 0.4, 1.0, 2.0, 3.0, 3.1, -0.1, 1.999])
    assert torch.equal(_histogram(values, 4, 0, 3), torch.histc(values, 4, 0, 3))

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.histc(x, 4, 0, 3)

    assert export_onnx(Counting(), tmp_path / "model.onnx", torch.rand(2, 4) * 3).max_error < 1e-6


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_maximum_over_constants_at_the_border(tmp_path: Path, value: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConstantPad2d((1, 0, 2, 1), value), nn.MaxPool2d(3, 2)).eval()
    with torch.no_grad():
        model[0].bias.sub_(5)  # all values are negative, so that the border is the largest
    file = export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 8, 8))
    assert file.dynamic_batch
    assert file.max_error < 1e-5
    padded = functional.pad(torch.ones(1, 2, 3), (1, 2, 0, 1), value=value)
    torch.testing.assert_close(_padding(torch.ones(1, 2, 3), [1, 2, 0, 1], value=value), padded)


def test_runs_of_rows_times_the_matrix_of_their_group() -> None:
    rows, matrices = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 3, 5, dtype=torch.float64)
    ends = torch.tensor([2, 2, 6])  # the second group is empty, and the last row in none
    expected = torch.cat([rows[:2] @ matrices[0], rows[2:6] @ matrices[2], torch.zeros(1, 5, dtype=torch.float64)])
    torch.testing.assert_close(_grouped_product(rows, matrices, ends), expected)
