"""One target of latency on this machine, from end to end; what the times are is not looked at."""

from pathlib import Path

import pytest
import torch
from torch import nn

import torchshear
from torchshear.speedup.latency import Device


def test_a_target_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path))
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)).eval()
    x = torch.randn(1, 3, 24, 24)
    result = torchshear.prune(
        model, x, target_latency=0.6, device=Device(batch=2), align=16, must_be_faster=False,
        data=[torch.randn(16, 3, 24, 24)], batches=1, compensate="refit",
    )  # fmt: skip
    assert result.latency is not None
    assert result.allocation is not None
    assert list(result.latency.results) == ["dense", "pruned"]
    assert result.latency.batch == 2
    assert result.allocation.rounds
    assert all(width % 16 == 0 for width in result.allocation.widths.values())
    assert sum(result.allocation.widths.values()) < 128
    assert result.report.latency["pruned_ms"] == result.latency["pruned"].median_ms
    assert "latency     " in str(result.report)
    assert "at most 0.6 requested" in str(result.report)
    assert result.refit is not None
    assert result.model(x).shape == (1, 5)
    again = torchshear.shrink(model, result.plan)
    assert [p.shape for p in again.parameters()] == [p.shape for p in result.model.parameters()]
