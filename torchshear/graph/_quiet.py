"""Silence for what torch says of its own while it captures or exports a model."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Final

_NOISY_LOGGERS: Final = ("torch", "torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Silence the exporter's messages, its dumps of failed graphs and warnings about its own code, not the model's."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [one.level for one in loggers]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|onnx|onnxscript|onnx_ir)(\.|$)")
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The tensor attributes? self\.([\w.]+\.)?_flat_weights\[")  # nn.LSTM
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)
