"""Running a model in a mode that is not its own, and leaving it as it was."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torchshear.graph._graph import Mode
from torchshear.graph._keeping import kept_state
from torchshear.graph._quiet import quiet_torch


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Put the model into a mode; afterwards its state (see `kept_state`) and the RNG are what they were."""
    flags = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with kept_state(model), torch.random.fork_rng(devices=devices), quiet_torch():
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
