"""Progress of work over batches: a bar, nothing, or calls of a function."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress as Bar

from torchshear._arguments import quote
from torchshear.errors import ArgumentError

Progress = bool | Callable[[int, int, str], None]
"""True draws a bar, False nothing; a function is called with what is done, the total, and the name of the work."""

Report = Callable[[int, int, str], None]

_T = TypeVar("_T")
_SECONDS = 1.0  # work that takes less shows no bar


def check_progress(progress: object) -> None:
    """Raise ArgumentError for what is neither a truth value nor a function."""
    if not isinstance(progress, bool | np.bool_) and not callable(progress):
        raise ArgumentError(f"progress={quote(progress)}; expected True, False, or a function of (done, total, what).")


@contextmanager
def reporting(progress: Progress) -> Iterator[Report]:
    """Give a function that reports `(done, total, what)`, as a user asked for.

    Args:
        progress: True draws a bar on the error stream if that is a terminal or a notebook, once the work takes longer
            than a second; False draws nothing; a function is called itself.
    """
    bar = _bar() if progress and not callable(progress) else None
    try:
        yield bar.update if bar is not None else progress if callable(progress) else _say_nothing
    finally:
        if bar is not None:
            bar.close()


def with_progress(items: Iterable[_T], total: int, what: str, progress: Progress) -> Iterator[_T]:
    """Yield items, and report each when the next one is asked for.

    Args:
        items: the items, as batches.
        total: number of items.
        what: name of the work, as "collecting".
        progress: as for `reporting`; a function is called as `progress(done, total, what)` after each item.
    """
    with reporting(progress) as report:
        for done, item in enumerate(items, 1):
            yield item
            report(done, total, what)


def _say_nothing(done: int, total: int, what: str) -> None:
    """Report nothing."""


class _TerminalBar:
    """A bar of rich, which is gone at the end. It is drawn by `update` alone: a thread would disturb what is timed."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(console=console, transient=True, auto_refresh=False)
        self._begin = self._drawn = monotonic()

    def update(self, done: int, total: int, what: str) -> None:
        """Show what is done."""
        now = monotonic()
        if not self._bar.tasks and now - self._begin >= _SECONDS:
            self._bar.add_task(what, total=total)
            self._bar.start()
        if now - self._drawn >= _SECONDS / 10:
            self._drawn = now
            for task in self._bar.tasks:
                self._bar.update(task.id, completed=done, description=what, refresh=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


class _NotebookLine:
    """A line that is written over and over, since a notebook shows no bar of rich without widgets."""

    def __init__(self) -> None:
        self._begin = monotonic()
        self._length = 0

    def update(self, done: int, total: int, what: str) -> None:
        """Show what is done."""
        if monotonic() - self._begin >= _SECONDS:
            text = f"{what}: {done} of {total}"
            self._length = max(self._length, len(text))
            sys.stderr.write(f"\r{text:{self._length}}")
            sys.stderr.flush()

    def close(self) -> None:
        """Take the line away."""
        if self._length:
            sys.stderr.write(f"\r{'':{self._length}}\r")


def _bar() -> _TerminalBar | _NotebookLine | None:
    """Return a bar for the kind of error stream; None where nobody would see one."""
    console = Console(stderr=True)
    if console.is_jupyter:
        return _NotebookLine()
    return _TerminalBar(console) if console.is_terminal else None
