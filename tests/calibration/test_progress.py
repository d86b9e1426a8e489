"""Progress of work over batches: a bar on a terminal, a line in a notebook, calls of a function, or nothing."""

import io
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
from torch import nn

import torchshear
from tests.networks import Net
from torchshear.calibration._progress import with_progress
from torchshear.errors import ArgumentError
from torchshear.pruners import channel_means

Told = list[tuple[int, int, str]]


class Screen(io.StringIO):
    """An error stream that is a terminal."""

    def isatty(self) -> bool:
        return True


class Notebook:
    """A console that finds itself in a notebook."""

    is_jupyter, is_terminal = True, False

    def __init__(self, stderr: bool) -> None:
        assert stderr


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass between one look at the clock of the bar and the next."""
    step, now = [0.0], [100.0]

    def monotonic() -> float:
        now[0] += step[0]
        return now[0]

    monkeypatch.setattr("torchshear.calibration._progress.monotonic", monotonic)
    return step


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the environment say that a terminal takes colours."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def run(progress: Any, stream: io.StringIO) -> str:
    """Return what is drawn while three items are passed on."""
    with redirect_stderr(stream):
        assert list(with_progress("abc", 3, "collecting", progress)) == ["a", "b", "c"]
    return stream.getvalue()


def test_a_terminal_shows_a_bar_for_work_over_a_second(clock: list[float]) -> None:
    assert run(True, Screen()) == ""
    clock[0] = 2.0
    assert "collecting" in run(True, Screen())


def test_no_bar_is_drawn_where_nobody_sees_it(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    clock[0] = 2.0
    assert run(False, Screen()) == ""
    assert run(True, io.StringIO()) == ""
    assert capsys.readouterr().out == ""


def test_a_notebook_shows_a_line(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchshear.calibration._progress.Console", Notebook)
    assert run(True, io.StringIO()) == ""
    clock[0] = 2.0
    lines = run(True, io.StringIO()).split("\r")
    assert lines[1:4] == ["collecting: 1 of 3", "collecting: 2 of 3", "collecting: 3 of 3"]
    assert not "".join(lines[4:]).strip()


def test_an_end_before_the_last_item_takes_the_bar_away(clock: list[float]) -> None:
    clock[0] = 2.0
    with redirect_stderr(Screen()) as screen:
        items = with_progress(iter("abc"), 3, "collecting", True)
        next(items)
        next(items)
        items.close()  # type: ignore[attr-defined]
    assert screen.getvalue().endswith("\x1b[2K")


def normed() -> Net:
    return Net(
        lambda m, x: m.two(m.norm(m.one(x)).relu()), one=nn.Linear(3, 8), norm=nn.BatchNorm1d(8), two=nn.Linear(8, 2)
    )


def collected(model: nn.Module, loader: Any, progress: Any) -> None:
    torchshear.collect(torchshear.trace(model, (torch.randn(4, 3),)), loader, None, len(loader), progress)


def averaged(model: nn.Module, loader: Any, progress: Any) -> None:
    channel_means(torchshear.trace(model, (torch.randn(4, 3),)), loader, len(loader), progress)


def recalibrated(model: nn.Module, loader: Any, progress: Any) -> None:
    torchshear.recalibrate(model, loader, len(loader), progress)


@pytest.mark.parametrize("work", [collected, averaged, recalibrated], ids=lambda work: work.__name__)
def test_all_work_on_data_reports_alike(work: Any) -> None:
    told: Told = []
    work(normed(), [torch.randn(4, 3)] * 2, lambda *args: told.append(args))
    assert [(done, total) for done, total, _ in told] == [(1, 2), (2, 2)]
    assert {what for _, _, what in told} == {"recalibrating" if work is recalibrated else "collecting"}
    with pytest.raises(ArgumentError, match="progress='bar'; expected True, False, or a function"):
        work(normed(), [torch.randn(4, 3)], "bar")


@pytest.mark.parametrize("work", [collected, recalibrated], ids=lambda work: work.__name__)
def test_what_the_function_raises_is_raised(work: Any) -> None:
    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt(f"{done} of {total}")

    with pytest.raises(KeyboardInterrupt, match="1 of 2"):
        work(normed(), [torch.randn(4, 3)] * 2, stop)
