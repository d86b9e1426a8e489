"""Targets of latency in torch, also for models that onnxruntime cannot run; what the times are is not looked at."""

from pathlib import Path

import pytest
import torch
from torch import nn

import torchshear
from torchshear.dependency import operator_rule
from torchshear.errors import ExportError
from torchshear.speedup.latency import Device, _torch_kernels, _torch_runtime

X = torch.randn(1, 3, 64, 64)
ANYHOW = {"must_be_faster": False, "align": 8, "progress": False}


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for a short time, into an empty cache."""
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path / "cache"))
    for module in (_torch_runtime, _torch_kernels):
        monkeypatch.setattr(module, "_SECONDS", 0.01)


@torch.library.custom_op("torchshear_tests::flip_channels", mutates_args=())
def flip_channels(x: torch.Tensor) -> torch.Tensor:
    """An operator that ONNX does not have."""
    return x.flip(1)


@flip_channels.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@operator_rule("torchshear_tests.flip_channels")
def flip_channels_rule(call: torchshear.dependency.Call) -> object:
    batch, channels, *others = call.axes("x")
    return (batch, call.algebra.take(channels, slice(None, None, -1)), *others)


class Flipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 48, 3), nn.Conv2d(48, 32, 3), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(flip_channels(self.one(x).relu())).relu().mean((2, 3)))


class Deciding(nn.Module):
    """Looks at values between two parts, so that it cannot be captured whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 32, 3), nn.ReLU())
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x).mean((2, 3))
        return self.head(h if h.sum() > 0 else -h)


def test_what_has_no_onnx_has_a_target_in_torch() -> None:
    torch.manual_seed(0)
    model = Flipping().eval()
    with pytest.raises(ExportError):
        torchshear.prune(model, X, target_latency=0.8, **ANYHOW)
    result = torchshear.prune(model, X, target_latency=0.8, device=Device(runtime="torch", batch=2), **ANYHOW)
    assert result.latency is not None
    assert result.allocation is not None
    assert result.verification is not None
    assert result.verification.max_error < 1e-9
    assert list(result.latency.results) == ["dense", "pruned"]
    assert (result.latency.runtime, result.latency.batch) == (f"torch {torch.__version__}", 2)
    assert result.allocation.rounds
    assert sum(result.allocation.widths.values()) < 80
    assert result.report.speed.is_measured
    assert result.plan.request["device"]["runtime"] == f"torch {torch.__version__}"
    assert result.model(X).shape == (1, 5)


def test_parts_of_a_model_that_cannot_be_captured_have_a_target_in_torch() -> None:
    torch.manual_seed(0)
    model, device = Deciding().eval(), Device(runtime="torch")
    result = torchshear.prune(model, X, target_latency=0.8, submodules=["body"], device=device, **ANYHOW)
    assert result.allocation is not None
    assert result.latency is not None
    assert result.model.body[0].weight.shape[0] == result.allocation.widths["body.0.weight[0]"] < 48
    assert result.model(X).shape == (1, 5)


@pytest.mark.zoo
def test_a_family_in_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = torchshear.prune_family(Flipping().eval(), X, targets=[0.9, 0.7], device=Device(runtime="torch"), **ANYHOW)
    assert list(family.latency.results) == ["dense", "0.9", "0.7"]
    assert family.latency.runtime == f"torch {torch.__version__}"
    family.save(tmp_path / "family")
    written = {path.name for path in (tmp_path / "family").iterdir()}
    assert {"plan-0.7.json", "model-0.7.safetensors", "family.json"} <= written
    assert not any(name.endswith(".onnx") for name in written)


@pytest.mark.parametrize("runtime", ["torch", pytest.param("torch.compile", marks=pytest.mark.zoo)])
def test_any_request_is_measured_by_the_runtime_that_is_asked_for(runtime: str) -> None:
    torch.manual_seed(0)
    result = torchshear.prune(Flipping().eval(), X, ratio=0.5, device=Device(runtime=runtime), progress=False)
    assert result.latency is not None
    assert result.latency.runtime.startswith(f"{runtime} ")
    assert result.report.latency["pruned_ms"] == result.latency["pruned"].median_ms
    assert result.report.speed.is_measured
