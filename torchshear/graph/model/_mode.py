"""Running a model in a mode that is not its own, and leaving it as it was."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from torchshear.graph.model._alone import run_exclusively
from torchshear.graph.model._preserve import preserve_state
from torchshear.graph.model._quiet import silence_torch

Mode = Literal["eval", "train"]

# Files of torch that ask in every call, and compute the same either way.
_ASK_ALWAYS = (nn.Module.__call__.__code__.co_filename, str(Path(torch.__file__).parent / "_dynamo"))


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Put the model into a mode; afterwards its state (see `preserve_state`) and the RNG are what they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with run_exclusively(), preserve_state(model), torch.random.fork_rng(devices=devices), silence_torch():
        flags = [(module, module.training) for module in model.modules()]
        try:
            warnings.simplefilter("ignore")  # the model's own warnings come when it is run
            # Flags are set directly: a train() of the user's own may do more than that, such as merging weights. A
            # model that is being trained keeps the flags it has, among them those of frozen batch norms.
            if not (mode == "train" and model.training):
                for module, _ in flags:
                    module.training = mode == "train"
            yield
        finally:
            for module, training in flags:
                module.training = training


@contextmanager
def set_exporting_flag() -> Iterator[None]:
    """Have `torch.compiler.is_exporting()` say yes, so that code takes the branches that a capture takes."""
    with _flags_of_compiler(True):
        yield


@contextmanager
def _flags_of_compiler(value: Any) -> Iterator[None]:
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    with run_exclusively():
        before = {name: getattr(torch.compiler, name) for name in flags if hasattr(torch.compiler, name)}
        try:
            for name in before:
                setattr(torch.compiler, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(torch.compiler, name, value)


class _Question:
    """A flag that is false, and notes the files of those who read it."""

    def __init__(self, askers: list[str]) -> None:
        self._askers = askers

    def __bool__(self) -> bool:
        asker = sys._getframe(1).f_code.co_filename
        if not asker.startswith(_ASK_ALWAYS):
            self._askers.append(asker)
        return False


@contextmanager
def record_export_queries(askers: list[str]) -> Iterator[None]:
    """Note who asks `torch.compiler` whether it is compiling or exporting, and answer no.

    Args:
        askers: gets the file of the code that asks, each time.
    """
    with _flags_of_compiler(_Question(askers)):
        yield
