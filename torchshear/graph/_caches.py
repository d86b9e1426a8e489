"""Tensors that modules keep of earlier runs in dictionaries, and that a forward makes again from the parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._meta import is_on_meta
from torchshear.graph._mode import in_mode

Cache = tuple[str, str]  # name of a module, and of the attribute that is a dictionary
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def caches_of(model: nn.Module, inputs: ExampleInputs) -> tuple[Cache, ...]:
    """Dictionaries that are caches: emptied, they hold after a run in eval mode the very tensors that they held before.

    Such tensors follow the parameters, as an attention bias picked from its table does. A graph must not take them for
    constants, and a smaller copy must not keep those of the larger one.

    Args:
        model: the model; left as it was.
        inputs: example inputs, on which it is run if any of its dictionaries hold tensors.
    """
    held = {
        (name, attribute): dict(value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _OF_EVERY_MODULE and _holds_tensors(value)
    }
    if not held or is_on_meta(model):
        return ()
    with in_mode(model, "eval"):
        forget(model, held)
        own = inputs.copy()
        try:
            with torch.no_grad():
                model(*own.args, **own.kwargs)
        except Exception:  # a forward that needs what one of them held may raise anything
            return ()
        modules = dict(model.named_modules())
        return tuple(key for key, before in held.items() if _are_same(before, vars(modules[key[0]]).get(key[1])))


def forget(model: nn.Module, caches: Iterable[Cache]) -> None:
    """Empty caches, by name."""
    modules = dict(model.named_modules())
    for name, attribute in caches:
        vars(modules[name])[attribute].clear()


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values())


def _are_same(before: dict[Any, Any], now: Any) -> bool:
    """Whether a dictionary holds equal tensors under the same names."""
    return (
        isinstance(now, dict)
        and now.keys() == before.keys()
        and all(
            isinstance(now[key], Tensor) and isinstance(value, Tensor) and torch.equal(now[key], value)
            for key, value in before.items()
        )
    )
