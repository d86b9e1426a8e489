"""Who may measure, and who may work on candidates, at a time: against other processes that try."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import torchshear
from tests.speedup.latency.making_tables import ALIGNMENT, joined, probes_of, table_of_probes
from torchshear.searching import _request as searched
from torchshear.speedup.latency._cache import cache_folder, only_measurement, only_work_on, while_none_measures

TRY = """
import sys
from filelock import FileLock, ReadWriteLock, Timeout
kind, path = sys.argv[1:]
lock = FileLock(path) if kind == "acquire" else ReadWriteLock(path)
try:
    getattr(lock, kind)(timeout=0.05)
    print("free")
except Timeout:
    print("taken")
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path))


def another_process_may(what: str, name: str = "measuring.lock") -> bool:
    path = str(cache_folder() / name)
    done = subprocess.run([sys.executable, "-c", TRY, what, path], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "free"


def test_one_measures_and_many_work() -> None:
    assert another_process_may("acquire_write")
    with only_measurement():
        assert not another_process_may("acquire_write")
        assert not another_process_may("acquire_read")
    with while_none_measures():
        assert not another_process_may("acquire_write")
        assert another_process_may("acquire_read")
        with while_none_measures(), only_measurement():  # by the function of a user that scores a candidate
            assert not another_process_may("acquire_read")
            with while_none_measures(), only_measurement():
                assert not another_process_may("acquire_read")
        assert another_process_may("acquire_read")
        assert not another_process_may("acquire_write")
    assert another_process_may("acquire_write")


def test_a_gpu_is_worked_on_by_one() -> None:
    with only_work_on({"gpu-1", "gpu-2"}):
        assert not another_process_may("acquire", "gpu-1.lock")
        assert not another_process_may("acquire", "gpu-2.lock")
        assert another_process_may("acquire", "gpu-3.lock")
    assert another_process_may("acquire", "gpu-1.lock")


def test_candidates_of_a_search_for_a_latency_hold_measurements_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, groups = joined()
    table, seen = table_of_probes(groups, probes_of(groups)), list[bool]()
    monkeypatch.setattr(searched, "table_of", lambda *_: table)

    def evaluate(small: nn.Module) -> float:
        seen.append(another_process_may("acquire_write"))
        return 0.5

    asked: dict[str, Any] = {"evaluate": evaluate, "method": "uniform", "align": ALIGNMENT, "progress": False}
    torchshear.search(model, args, target_latency=0.7, **asked)
    assert seen == [False]
    torchshear.search(model, args, target_params=0.5, **asked)
    assert seen == [False, True]
    assert another_process_may("acquire_write")
