"""Alignments from times that are written down, and the cache of those that are measured; no time is looked at."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from torchshear.dependency import Alignment
from torchshear.errors import ArgumentError
from torchshear.speedup.latency import Device, Staircase, measure_staircase
from torchshear.speedup.latency import _staircase as module
from torchshear.speedup.latency._alignment_profiles import resolve_alignment
from torchshear.speedup.latency._staircase import WIDTHS


def staircase(block: int, granule: int, linear: int, noise: float = 0.0) -> Staircase:
    """Times in blocks; below the granule a convolution is twice as slow."""
    rng = np.random.default_rng(0)

    def times(size: int, least: int) -> tuple[float, ...]:
        exact = [0.1 + 0.01 * math.ceil(width / size) * size * (2 if width < least else 1) for width in WIDTHS]
        return tuple((np.array(exact) * np.exp(rng.normal(0, noise, len(exact)))).tolist())

    kinds = dict.fromkeys(("pointwise", "spatial", "depthwise"), 0.0)
    return Staircase(Device(threads=2), {kind: times(block, granule) for kind in kinds} | {"product": times(linear, 1)})


@pytest.mark.parametrize(
    ("block", "granule", "linear", "expected"),
    [
        (8, 8, 4, (8, 8, 4)),
        (16, 16, 4, (16, 16, 4)),
        (16, 16, 8, (16, 16, 8)),
        (8, 16, 8, (8, 8, 8)),  # eight cost as much as sixteen, but there is no block of sixteen
        (4, 4, 4, (4, 4, 4)),
        (32, 32, 16, (32, 32, 16)),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_steps_are_found(block: int, granule: int, linear: int, expected: tuple[int, ...], noise: float) -> None:
    assert staircase(block, granule, linear, noise).alignment == Alignment(
        *expected[:2], "measured, 2 threads", expected[2]
    )


def test_times_without_steps_give_the_largest_blocks() -> None:
    flat = dict.fromkeys(("pointwise", "spatial", "depthwise", "product"), (1.0,) * len(WIDTHS))
    one = Staircase(Device(), flat, noise=0.2).alignment
    assert (one.block, one.granule, one.linear) == (32, 32, 32)
    assert "20% apart" in Staircase(Device(), flat, noise=0.2).notes[0]
    assert str(Staircase(Device(), flat, noise=0.2)).startswith("blocks of 32, granules of 32 and 32 between")


def test_it_is_measured_once_and_a_damaged_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_ROUNDS", 2)
    first = measure_staircase()
    assert set(first.times_ms) == {"pointwise", "spatial", "depthwise", "product"}
    assert all(len(times) == len(WIDTHS) and min(times) > 0 for times in first.times_ms.values())
    assert measure_staircase().times_ms == first.times_ms
    assert resolve_alignment("measured") == first.alignment
    assert measure_staircase(use_cache=False).times_ms != first.times_ms
    (file,) = (tmp_path / "latency").glob("*.json")
    assert json.loads(file.read_text())["key"]["threads"] == 1
    file.write_text(file.read_text()[:100])
    again = measure_staircase()
    assert "damaged" in again.notes[0]
    assert measure_staircase().times_ms == again.times_ms


def test_a_model_runs_at_every_width_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROUNDS", 2)
    assert measure_staircase(Device(batch=3, threads=2), use_cache=False).device.batch == 3


def test_another_device_is_refused() -> None:
    with pytest.raises(ArgumentError, match="Device"):
        measure_staircase("cpu")  # type: ignore[arg-type]
