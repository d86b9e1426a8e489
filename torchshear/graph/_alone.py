"""Calls from several threads run one after another."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Wait for calls under way in other threads, and have further ones wait; also a decorator.

    While a model is captured or compared, settings of the whole process are changed for a while: torch's default dtype
    and its "exporting" flag, filters of warnings, levels of loggers; and the model's own mode. Two calls at once would
    see and restore each other's settings.
    """
    with _LOCK:
        yield
