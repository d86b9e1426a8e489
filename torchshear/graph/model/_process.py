"""Settings of the whole process that are changed for a while: by one thread at a time, and put back afterwards."""

import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import torch
from torch import nn

_LOCK = threading.RLock()
_NOISY_LOGGERS: Final = ("torch", "torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
_FAKE_TENSORS: Final = "torch._subclasses.fake_tensor"  # logs as errors what we try out: sizes that do not fit
# Files of torch that read the exporting flag in every call and compute the same either way.
_FLAG_READERS = (nn.Module.__call__.__code__.co_filename, str(Path(torch.__file__).parent / "_dynamo"))


@contextmanager
def run_exclusively() -> Iterator[None]:
    """Run a block while other threads wait to run theirs, and outside of torch's inference mode; also a decorator.

    Capture and comparison change settings of the whole process: torch's default dtype and its "exporting" flag, warning
    filters, logger levels and the mode of the model. Two calls at once would see and restore each other's settings.
    """
    with _LOCK, outside_inference_mode():
        yield


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave `torch.inference_mode` for a block, since tensors made in it can never be trained; also a decorator."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield


class _StreamOfOtherThreads(io.TextIOBase):
    """An error stream that drops what the current thread writes and passes on what other threads write."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        """Pass on the text of another thread."""
        if threading.get_ident() != self._thread and self._stream is not None:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream behind this one."""
        if self._stream is not None:
            self._stream.flush()


@contextmanager
def silence_torch() -> Iterator[None]:
    """Silence torch's export messages, its dumps of failed graphs, and its warnings about its own code."""
    loggers = [logging.getLogger(name) for name in (*_NOISY_LOGGERS, _FAKE_TENSORS)]
    levels = [logger.level for logger in loggers]
    with run_exclusively(), warnings.catch_warnings(), redirect_stderr(_StreamOfOtherThreads(sys.stderr)):
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|onnx|onnxscript|onnx_ir)(\.|$)")
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The tensor attributes? self\.([\w.]+\.)?_flat_weights\[")  # nn.LSTM
        for logger in loggers:
            logger.setLevel(logging.CRITICAL if logger.name == _FAKE_TENSORS else logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def set_exporting_flag(value: Any = True) -> Iterator[None]:
    """Have `torch.compiler.is_exporting()` return True, so that a model takes the branches that it takes in a capture.

    Args:
        value: what the flag is set to.
    """
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    with run_exclusively():
        before = {name: getattr(torch.compiler, name) for name in flags if hasattr(torch.compiler, name)}
        try:
            for name in before:
                setattr(torch.compiler, name, value)
            yield
        finally:
            for name, old in before.items():
                setattr(torch.compiler, name, old)


@dataclass(frozen=True, slots=True, eq=False)
class _RecordingFlag:
    """A false flag that records the file of the code that reads it."""

    readers: list[str]

    def __bool__(self) -> bool:
        reader = sys._getframe(1).f_code.co_filename
        if not reader.startswith(_FLAG_READERS):
            self.readers.append(reader)
        return False


@contextmanager
def record_export_queries(readers: list[str]) -> Iterator[None]:
    """Record the code that asks torch whether it is compiling or exporting; the answer is no.

    Args:
        readers: receives the file of the asking code, once for each question.
    """
    with set_exporting_flag(_RecordingFlag(readers)):
        yield
