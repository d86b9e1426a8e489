"""Execution providers of onnxruntime: any that is installed is asked for, and what does not start is said.

That of Azure comes with onnxruntime for the CPU, and leaves to the CPU all operators of ordinary models.
"""

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import torchshear
from torchshear.errors import ArgumentError, LatencyError
from torchshear.speedup.latency import Device, measure_staircase, measure_table
from torchshear.speedup.latency import _staircase as staircase
from torchshear.speedup.onnx._session import open_session

AZURE = "AzureExecutionProvider"
X = torch.randn(1, 3, 16, 16)

pytestmark = pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(), reason="this onnxruntime has no second provider"
)


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The providers of every session that is opened."""
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path / "cache"))
    seen, session = [], onnxruntime.InferenceSession

    def opened(*args: object, **kwargs: object) -> onnxruntime.InferenceSession:
        made = session(*args, **kwargs)
        seen.append(made.get_providers())
        return made

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    return seen


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 32, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()


def test_files_are_compared_with_a_provider(tmp_path: Path, asked: list[list[str]]) -> None:
    path = torchshear.export_onnx(small(), tmp_path / "model.onnx", X).path
    asked.clear()
    found = torchshear.compare_latency({"a": path}, provider=AZURE, rounds=2, progress=False)
    assert asked == [[AZURE, "CPUExecutionProvider"]]
    assert found.runtime == f"onnxruntime {onnxruntime.__version__}, {AZURE}"
    assert torchshear.compare_latency({"a": path}, rounds=2, progress=False).runtime.endswith(onnxruntime.__version__)
    assert asked[1:] == [["CPUExecutionProvider"]]


@pytest.mark.zoo
def test_a_target_with_a_provider(asked: list[list[str]]) -> None:
    result = torchshear.prune(
        small(), X, target_latency=0.95, device=Device(provider=AZURE), align=16, must_be_faster=False, progress=False
    )
    assert result.latency is not None
    assert result.latency.runtime.endswith(AZURE)
    assert result.plan.request["device"]["provider"] == AZURE
    assert [AZURE, "CPUExecutionProvider"] in asked


def test_a_table_with_a_provider_has_the_kernels_that_the_cpu_runs_for_it() -> None:
    table = measure_table(small(), X, device=Device(provider=AZURE), align=16, probes=4, progress=False)
    assert {kernel.operator for kernel in table.kernels} >= {"Conv", "Gemm"}
    assert table.identity["provider"] == AZURE


def test_a_staircase_with_a_provider(monkeypatch: pytest.MonkeyPatch, asked: list[list[str]]) -> None:
    monkeypatch.setattr(staircase, "_ROUNDS", 4)
    measure_staircase(Device(provider=AZURE), use_cache=False)
    assert {tuple(one) for one in asked} == {(AZURE, "CPUExecutionProvider")}


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of CUDA on a machine without its libraries, where onnxruntime takes the CPU instead."""
    path = torchshear.export_onnx(small(), tmp_path / "model.onnx", X).path
    with pytest.raises(LatencyError, match="CUDAExecutionProvider is installed, but does not start"):
        open_session(path, provider="CUDAExecutionProvider")
    with pytest.raises(ArgumentError, match="provider='CUDAExecutionProvider' is not installed"):
        torchshear.compare_latency({"a": path}, provider="CUDAExecutionProvider")
