"""Tensors that modules keep of earlier runs, and that a forward makes again if they are missing."""

import dis
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from torchshear.graph._inputs import ExampleInputs
from torchshear.graph.model._meta import is_on_meta
from torchshear.graph.model._mode import in_mode

Cache = tuple[str, str]  # name of a module, and of the attribute: a dictionary, or the place of one tensor
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def find_caches(model: nn.Module, inputs: ExampleInputs) -> tuple[Cache, ...]:
    """What is a cache: a dictionary or an attribute that, emptied, holds after a run in eval mode what it held before.

    Such tensors follow the parameters, as an attention bias picked from its table does, or the inputs, as a table of
    positions does. A graph must not take them for constants, or that of a model which ran once would be another than
    that of a fresh one; and a smaller copy must not keep those of the larger one.

    Args:
        model: the model; left as it was.
        inputs: example inputs, on which it is run if any of its dictionaries hold tensors, or if there are attributes
            and unsaved buffers that its methods assign.
    """
    if is_on_meta(model):
        return ()
    held = {
        (name, attribute): dict(value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _OF_EVERY_MODULE and _holds_tensors(value)
    }
    found: list[Cache] = []
    if held:
        after = _after_run(model, inputs, held, held)
        found = [cache for cache, before in held.items() if _are_same(before, after.get(cache))]
    return (*found, *_built_when_missing(model, inputs))


def _built_when_missing(model: nn.Module, inputs: ExampleInputs) -> Iterator[Cache]:
    """Places of single tensors that a run fills alike whether or not there is one."""
    places = _assigned_places(model)
    if not places:
        return
    every = [place for some in places.values() for place in some]
    expected = _after_run(model, inputs, (), every)
    for some in places.values():
        after = _after_run(model, inputs, some, some)
        yield from (p for p in some if _are_same({"": expected.get(p)}, {"": after.get(p)}))


def _after_run(
    model: nn.Module, inputs: ExampleInputs, emptied: Iterable[Cache], asked: Iterable[Cache]
) -> dict[Cache, Any]:
    """What some caches hold after a run in eval mode that begins with others emptied; nothing if it fails."""
    modules, own = dict(model.named_modules()), inputs.copy()
    with in_mode(model, "eval"), torch.no_grad():
        clear_caches(model, emptied)
        try:
            model(*own.args, **own.kwargs)
        except Exception:  # a forward that needs what one of them held may raise anything
            return {}
        found = {cache: _holder(modules[cache[0]], cache[1]).get(cache[1]) for cache in asked}
        return {cache: _copied(value) for cache, value in found.items()}


def _assigned_places(model: nn.Module) -> dict[tuple[type[nn.Module], str], list[Cache]]:
    """Attributes and unsaved buffers that hold a tensor and that a method assigns, those of one class together."""
    found: dict[tuple[type[nn.Module], str], list[Cache]] = defaultdict(list)
    assigned: dict[type[nn.Module], frozenset[str]] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("torch."):
            continue
        if kind not in assigned:
            assigned[kind] = _assigned_by_methods(kind)
        for attribute in sorted(assigned[kind]):
            value = _holder(module, attribute).get(attribute)
            is_saved = attribute in module._buffers and attribute not in module._non_persistent_buffers_set
            if isinstance(value, Tensor) and value.ndim and not is_saved:
                found[kind, attribute].append((name, attribute))
    return found


def _assigned_by_methods(kind: type[nn.Module]) -> frozenset[str]:
    """Names that the methods of a class assign, other than where it is made."""
    functions = {
        name: value
        for base in reversed(kind.__mro__)
        if issubclass(base, nn.Module) and base is not nn.Module
        for name, value in vars(base).items()
        if isinstance(value, FunctionType) and name != "__init__"
    }
    return frozenset(
        str(step.argval)
        for function in functions.values()
        for step in dis.get_instructions(function)
        if step.opname == "STORE_ATTR"
    )


def _holder(module: nn.Module, attribute: str) -> dict[str, Any]:
    """The dictionary of a module in which an attribute stands."""
    return module._buffers if attribute in module._buffers else vars(module)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else dict(value) if isinstance(value, dict) else value


def clear_caches(model: nn.Module, caches: Iterable[Cache]) -> None:
    """Empty caches, by name: a dictionary holds nothing then, a buffer has no elements, another attribute is None.

    (A buffer that is None when torch.export comes to it is left with a tensor of its own.)
    """
    modules = dict(model.named_modules())
    for name, attribute in caches:
        holder = _holder(modules[name], attribute)
        value = holder[attribute]
        if isinstance(value, dict):
            value.clear()
        else:
            is_buffer = holder is modules[name]._buffers and value is not None
            holder[attribute] = value.new_empty((0,) * value.ndim) if is_buffer else None


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values())


def _are_same(before: Mapping[Any, Any], now: Any) -> bool:
    """Whether a dictionary holds equal tensors under the same names."""
    return (
        isinstance(now, dict)
        and now.keys() == before.keys()
        and all(
            isinstance(now[key], Tensor) and isinstance(value, Tensor) and torch.equal(now[key], value)
            for key, value in before.items()
        )
    )
