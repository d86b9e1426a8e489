"""Which modules of a model could be captured, where the model cannot be captured whole."""

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import nn

from torchshear.errors import first_line
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._recording import first_calls, holds_layers

CanCapture = Callable[[nn.Module, ExampleInputs], bool]

_MOST_TRIES: Final = 24  # captures, each of which takes as long as a part is large
_MOST_NAMES: Final = 6


def advise_parts(model: nn.Module, inputs: ExampleInputs, failing: str, can_capture: CanCapture) -> str:
    """Name modules that can be captured in a model that cannot.

    The model is run once; then modules are tried from the outside in, until one can be captured.

    Args:
        model: the model, in which capture failed.
        inputs: its example inputs.
        failing: name of the module in which it failed.
        can_capture: tells whether torch.export takes a module.

    Returns:
        A sentence for the user, or "" if there is nothing to advise.
    """
    calls, failure = first_calls(model, inputs)
    if failure is not None:
        return f"The model does not run on these inputs outside of torch.export either ({first_line(failure)[:120]})."
    device = next((tensor.device for tensor in inputs.tensors()), torch.device("cpu"))
    tries = 0

    def search(parent: nn.Module, prefix: str) -> Iterator[str]:
        nonlocal tries
        for child, module in parent.named_children():
            name = f"{prefix}{child}"
            if not holds_layers(module):
                continue
            if name in calls and not f"{failing}.".startswith(f"{name}.") and tries < _MOST_TRIES:
                tries += 1
                if can_capture(module, calls[name].map(lambda t: torch.empty_like(t, device=device))):
                    yield name
                    continue
            yield from search(module, f"{name}.")

    names = list(search(model, ""))[:_MOST_NAMES]
    if not names:
        return ""
    return f"These modules can be captured; to prune them inside the whole model, give submodules={names!r}."
