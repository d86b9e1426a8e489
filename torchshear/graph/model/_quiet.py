"""Silence for what torch says of its own while it captures or exports a model."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from threading import get_ident
from typing import Final, TextIO

from torchshear.graph.model._alone import run_exclusively

_NOISY_LOGGERS: Final = ("torch", "torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
_TRIED = "torch._subclasses.fake_tensor"  # tells of sizes that do not fit as errors, which is what is tried out


class _Silenced(io.TextIOBase):
    """An error stream without what this thread writes to it; other threads are heard."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._silenced = get_ident()

    def write(self, text: str) -> int:
        """Hand on what another thread writes."""
        if get_ident() != self._silenced and self._stream is not None:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream behind this one."""
        if self._stream is not None:
            self._stream.flush()


@contextmanager
def silence_torch() -> Iterator[None]:
    """Silence the exporter's messages, its dumps of failed graphs and warnings about its own code, not the model's."""
    loggers = [logging.getLogger(name) for name in (*_NOISY_LOGGERS, _TRIED)]
    levels = [one.level for one in loggers]
    with run_exclusively(), warnings.catch_warnings(), redirect_stderr(_Silenced(sys.stderr)):
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|onnx|onnxscript|onnx_ir)(\.|$)")
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The tensor attributes? self\.([\w.]+\.)?_flat_weights\[")  # nn.LSTM
        for one in loggers:
            one.setLevel(logging.CRITICAL if one.name == _TRIED else logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)
