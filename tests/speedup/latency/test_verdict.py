"""Verdicts on speed, predicted and measured."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import torchshear
from torchshear.dependency import ChannelGroups
from torchshear.speedup import LatencyComparison
from torchshear.speedup.latency import _verdict as module
from torchshear.speedup.latency._comparison import LatencyResult
from torchshear.speedup.latency._verdict import speed_verdict


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, groups=2), nn.ReLU(), nn.Conv2d(64, 6, 1), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Conv2d(6, 8, 1), nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 3)
    ).eval()


@pytest.fixture(scope="module")
def groups(model: nn.Module) -> ChannelGroups:
    return torchshear.analyze(torchshear.trace(model, torch.randn(1, 3, 6, 6)))


def times(dense: float, pruned: float) -> LatencyComparison:
    found = {
        name: LatencyResult(name, Path(f"{name}.onnx"), (ms, ms * 1.01, ms))
        for name, ms in (("dense", dense), ("pruned", pruned))
    }
    return LatencyComparison(found, "dense")


@pytest.mark.parametrize(
    ("profile", "widths", "off"),
    [
        ("cpu-avx2", {"0.weight[0]": 16}, []),
        ("cpu-avx512", {"0.weight[0]": 24}, ["0.weight[0]"]),  # 12 in each of two groups are no block of 16
        ("cpu-avx512", {"0.weight[0]": 16}, []),  # 8 in each are faster than 16 were
        ("cpu-avx512", {"2.weight[0]": 32}, []),
        ("cpu-avx2", {"2.weight[0]": 24}, ["2.weight[0]"]),  # 12 in each
        ("cpu-avx2", {"4.weight[0]": 4}, []),  # it read fewer than a block before
        ("cpu-avx2", {"6.weight[0]": 7}, []),  # a convolution makes it, and none reads it
        ("cpu-avx2", {"8.weight[0]": 7}, []),
        ("cuda-fp16", {"0.weight[0]": 24}, ["0.weight[0]"]),
        ("ascend-fp16:8", {"0.weight[0]": 16, "2.weight[0]": 20}, ["0.weight[0]", "2.weight[0]"]),
    ],
)
def test_widths_off_the_fast_path(groups: ChannelGroups, profile: str, widths: dict[str, int], off: list[str]) -> None:
    dense = {group.name: group.width for group in groups}
    found = speed_verdict(groups, dense | widths, profile, None)
    assert list(found.off_fast_path) == off
    assert found.is_faster is (None if off else True)
    assert not found.is_measured
    if off:
        assert found.text.startswith("may be slower than before: not measured;")
        assert f"{off[0]} with {widths[off[0]]}" in found.text
    else:
        assert found.text.startswith("faster, as predicted: no convolution leaves its fast path on cpu-avx")


def test_this_machine_counts_where_the_alignment_is_none_of_a_device(
    groups: ChannelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "detect_profile", lambda: "cpu-avx512")
    widths = {group.name: group.width for group in groups} | {"2.weight[0]": 36}
    for profile in ("none", "multiple of 4", "measured, 1 threads"):
        assert "on cpu-avx512 (2.weight[0] with 36)" in speed_verdict(groups, widths, profile, None).text


@pytest.mark.parametrize(
    ("pruned", "is_faster", "text"),
    [
        (1.0, True, "faster, as measured: 2.00 times the speed of before"),
        (2.0, False, "not measurably faster, as measured: 1.00 times"),
        (4.0, False, "slower, as measured: 0.50 times"),
    ],
)
def test_measured(groups: ChannelGroups, pruned: float, is_faster: bool, text: str) -> None:
    widths = {group.name: group.width for group in groups} | {"2.weight[0]": 48}
    found = speed_verdict(groups, widths, "cpu-avx2", times(2.0, pruned))
    assert (found.is_faster, found.is_measured) == (is_faster, True)
    assert found.text.startswith(text)


def test_the_report_has_it_and_a_result_that_may_be_slower_is_logged(
    model: nn.Module, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "detect_profile", lambda: "cpu-avx2")
    x = torch.randn(1, 3, 6, 6)
    with caplog.at_level(logging.WARNING, "torchshear"):
        good = torchshear.prune(model, x, ratio=0.5, align="cpu-avx2")
    assert "speed       faster, as predicted: no convolution leaves its fast path on cpu-avx2" in str(good.report)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "torchshear"):
        bad = torchshear.prune(model, x, ratio=0.3)
    assert "speed       may be slower than before" in str(bad.report)
    assert "align='auto' avoids that" in caplog.text
    assert bad.report.to_dict()["speed"]["off_fast_path"] == ("0.weight[0]", "2.weight[0]")


def test_a_device_measures_any_request(model: nn.Module) -> None:
    result = torchshear.prune(
        model, torch.randn(1, 3, 6, 6), ratio=0.5, align=16, device=torchshear.speedup.latency.Device()
    )
    assert result.latency is not None
    assert result.report.speed is not None
    assert result.report.speed.is_measured
    found = result.report.latency
    ratio = result.report.before.macs / result.report.after.macs
    assert found["realised_share"] == pytest.approx(found["speedup"] / ratio)
    assert "realised share of the MACs ratio" in str(result.report)
    assert "as measured" in str(result.report)
