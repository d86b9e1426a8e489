"""Calls of the library run by themselves: one after another, and outside of torch's inference mode."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

_LOCK = threading.RLock()


@contextmanager
def run_exclusively() -> Iterator[None]:
    """Wait for calls under way in other threads, and have further ones wait; also a decorator.

    While a model is captured or compared, settings of the whole process are changed for a while: torch's default dtype
    and its "exporting" flag, filters of warnings, levels of loggers; and the model's own mode. Two calls at once would
    see and restore each other's settings. Inference mode is left, see `outside_inference_mode`.
    """
    with _LOCK, outside_inference_mode():
        yield


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave `torch.inference_mode` for a while, in which all new tensors are unfit for training; also a decorator."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield
