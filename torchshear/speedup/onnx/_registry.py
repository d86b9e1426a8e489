"""Torch's translations of operators to ONNX, gathered once."""

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_gathered: dict[tuple[Any, ...], Any] = {}


@contextmanager
def gathering_once() -> Iterator[None]:
    """Have torch.onnx.export gather its translations of operators in the first export of a process alone, for a block.

    It reads the sources of some five hundred functions anew in each, which is half of the export of a small model.
    Each export gets a registry of its own, so that what it adds is not in the next. A torch that gathers in another way
    goes on doing so.
    """
    try:
        registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        before = registry.__dict__["from_torchlib"]
    except (ImportError, AttributeError, KeyError):
        yield
        return

    def from_torchlib(kind: Any, *given: Any, **words: Any) -> Any:
        key = (kind, *given, *sorted(words.items()))
        if key not in _gathered:
            _gathered[key] = before.__func__(kind, *given, **words)
        found = copy.copy(_gathered[key])
        found.functions = {target: list(functions) for target, functions in found.functions.items()}
        return found

    registry.from_torchlib = classmethod(from_torchlib)
    try:
        yield
    finally:
        registry.from_torchlib = before
