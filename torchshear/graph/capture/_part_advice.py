"""Advice on the modules that can be pruned as parts of a model that cannot be captured whole."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
from torch import nn

from torchshear.errors import TorchshearError, first_line
from torchshear.graph._graph import Graph
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph.capture._recording import first_calls, holds_layers

_MAX_TRIES: Final = 24  # captures, each of which takes as long as a part is large
_MAX_NAMES: Final = 6


@dataclass(frozen=True, slots=True)
class Forecast:
    """Size of a model before and after half of the channels of a captured part of it are cut.

    Attributes:
        before: number of parameters of the whole model.
        after: number of parameters that are left.
    """

    before: int
    after: int


_FORECAST: list[Callable[[Graph], Forecast]] = []


def register_forecast(forecast: Callable[[Graph], Forecast]) -> None:
    """Register the function that forecasts the size of a pruned network; it needs the analysis, which registers it."""
    _FORECAST[:] = [forecast]


def advise_parts(
    model: nn.Module,
    inputs: ExampleInputs,
    failing: str,
    can_capture: Callable[[nn.Module, ExampleInputs], bool],
    trace_parts: Callable[[Sequence[str]], Graph],
) -> str:
    """Name modules that can be pruned as parts of a model that cannot be captured, and say how much that would save.

    The model is run once; then modules are tried from the outside in, as they would be when they are named.

    Args:
        model: the model, in which capture failed.
        inputs: its example inputs.
        failing: name of the module in which it failed.
        can_capture: returns whether torch.export takes a module; tried first, since that is cheap.
        trace_parts: captures modules as parts of the model.

    Returns:
        A sentence for the user, or "" if there is nothing to advise.
    """
    calls, failure = first_calls(model, inputs)
    if failure is not None:
        return f"The model does not run on these inputs outside of torch.export either ({first_line(failure)[:120]})."
    device = next((tensor.device for tensor in inputs.tensors()), torch.device("cpu"))
    tries, unfit = 0, ""  # unfit: a module that can be captured and cannot shrink

    def search(parent: nn.Module, prefix: str) -> Iterator[str]:
        nonlocal tries, unfit
        for child, module in parent.named_children():
            name = f"{prefix}{child}"
            if not holds_layers(module):
                continue
            if name in calls and not f"{failing}.".startswith(f"{name}.") and tries < _MAX_TRIES:
                tries += 1
                is_fit = can_capture(module, calls[name].map(lambda t: torch.empty_like(t, device=device)))
                saved = _forecast([name], trace_parts) if is_fit else None
                if saved is not None and saved.after < saved.before:
                    yield name
                if saved is not None:
                    unfit = unfit or name
                    continue
            yield from search(module, f"{name}.")

    names = list(islice(search(model, ""), _MAX_NAMES))
    saved = _forecast(names, trace_parts) if names else None
    if saved is not None:
        return (
            f"To prune parts of it inside the whole model, give submodules={names!r}: that was tried, and leaves "
            f"{saved.after:,} of {saved.before:,} parameters ({saved.after / saved.before:.0%}) with ratio=0.5."
        )
    return f"Module {unfit!r} can be captured alone, but none of its channels can shrink there." if unfit else ""


def _forecast(names: Sequence[str], trace_parts: Callable[[Sequence[str]], Graph]) -> Forecast | None:
    """Return how much a model with these parts would shrink; None if it cannot be captured so."""
    try:
        return _FORECAST[0](trace_parts(names))
    except TorchshearError:
        return None
