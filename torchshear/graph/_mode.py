"""Running a model in a mode that is not its own, and leaving it as it was."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchshear.graph._graph import Mode
from torchshear.graph._quiet import quiet_torch


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Put the model into a mode; afterwards its attributes, buffers, hooks and the RNG are what they were."""
    flags = [(module, module.training) for module in model.modules()]
    own = [(m, dict(vars(m)), _held(m)) for m, _ in flags if isinstance(m._buffers, dict)]  # not TorchScript
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices), quiet_torch():
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
        for module, attributes, held in own:
            _restore(vars(module), attributes)
            for name, content in held.items():
                _restore(attributes[name], content)


@contextmanager
def as_if_exporting() -> Iterator[None]:
    """Have `torch.compiler.is_exporting()` say yes, so that code takes the branches that a capture takes."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = {name: getattr(torch.compiler, name) for name in flags if hasattr(torch.compiler, name)}
    try:
        for name in before:
            setattr(torch.compiler, name, True)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.compiler, name, value)


def _held(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """What the dictionaries of a module hold: buffers, hooks, caches."""
    return {name: dict(value) for name, value in vars(module).items() if isinstance(value, dict)}


def _restore(now: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    """Undo what a forward assigned: a cached value, a buffer replaced by another tensor, a hook."""
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if now.get(name, _restore) is not value:
            now[name] = value
