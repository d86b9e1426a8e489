"""Measuring for real, once; and what a cache keeps when measuring ends early or its file is damaged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchshear.errors import ArgumentError, OutputError
from torchshear.speedup.latency import Device, LatencyTable, measure_table
from torchshear.speedup.latency import _candidates as candidates


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency"


def small() -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)).eval(), (
        torch.randn(1, 3, 16, 16),
    )


def measure(**options: Any) -> LatencyTable:
    return measure_table(*small(), align=16, probes=4, progress=False, **options)


def test_a_network_is_measured_once_and_read_afterwards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    prepare = candidates.Candidates.prepare

    def counted(self: candidates.Candidates, model: Any, name: str) -> Any:
        calls.append(name)
        return prepare(self, model, name)

    monkeypatch.setattr(candidates.Candidates, "prepare", counted)
    table = measure()
    assert calls == ["dense", "probe", "probe", "probe"]
    assert {kernel.operator for kernel in table.kernels} >= {"Conv", "Gemm"}
    assert table.known_share > 0.8
    assert 0 < table.predict_ms({group.name: 16 for group in table.groups}) < table.dense_ms
    again = measure()
    assert len(calls) == 4
    assert again.form.terms == table.form.terms
    assert [path.suffix for path in folder.iterdir() if path.suffix != ".lock"] == [".json"]
    measure(use_cache=False)
    assert len(calls) == 8


def test_what_was_measured_before_an_end_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, made = candidates.Candidates.prepare_widths, []

    def ends(self: candidates.Candidates, widths: Mapping[str, int], name: str) -> Any:
        made.append(dict(widths))
        if len(made) == 2:
            raise KeyboardInterrupt
        return prepare(self, widths, name)

    monkeypatch.setattr(candidates.Candidates, "prepare_widths", ends)
    with pytest.raises(KeyboardInterrupt):
        measure()
    measure()
    assert len(made) == 4  # one, the one that was cut short twice, and the last
    assert made[1] == made[2]


def test_a_damaged_cache_is_measured_anew_and_said(folder: Path) -> None:
    measure()
    file = next(path for path in folder.iterdir() if path.suffix == ".json")
    file.write_text(file.read_text()[:-40])
    table = measure()
    assert any("was damaged" in note and "measured again" in note for note in table.notes)
    assert not any("damaged" in note for note in measure().notes)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="Name another in the environment variable TORCHSHEAR_CACHE"):
        measure()


@pytest.mark.parametrize(
    ("options", "match"),
    [({"device": "cpu"}, "device"), ({"probes": 3}, "probes"), ({"use_cache": "yes"}, "use_cache")],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        measure_table(*small(), **options)


def test_the_batch_of_the_device_is_that_of_the_inputs() -> None:
    table = measure(device=Device(batch=2))
    assert table.device.batch == table.identity["batch"] == 2
