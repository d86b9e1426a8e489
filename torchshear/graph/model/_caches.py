"""Tensors that modules keep of earlier runs, and that a forward makes again if they are missing."""

import dis
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from torchshear.graph._inputs import ExampleInputs
from torchshear.graph.model._meta import is_on_meta
from torchshear.graph.model._state import in_mode

Cache = tuple[str, str]  # name of a module, and of the attribute: a dictionary, or the place of one tensor
_ATTRIBUTES_OF_MODULE = frozenset(vars(nn.Module()))


def find_caches(model: nn.Module, inputs: ExampleInputs) -> tuple[Cache, ...]:
    """Find the dictionaries and attributes that hold the same tensors after a run in eval mode that began without them.

    Such tensors follow the parameters, as an attention bias picked from its table does, or the inputs, as a table of
    positions does. They are no constants of a graph: one captured after a run would be another than that of a fresh
    model. And a smaller copy must not keep those of the larger model.

    Args:
        model: the model; left as it was.
        inputs: example inputs. The model runs on them if a dictionary of a module holds tensors, or if methods assign
            attributes or unsaved buffers that hold one.

    Returns:
        Places of the caches; none for a model on the meta device.
    """
    if is_on_meta(model):
        return ()
    found: list[Cache] = []
    dictionaries = {
        (name, attribute): dict(value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in _ATTRIBUTES_OF_MODULE
        and isinstance(value, dict)
        and any(isinstance(item, Tensor) for item in value.values())
    }
    if dictionaries:
        after = _contents_after_run(model, inputs, dictionaries, dictionaries)
        found += [cache for cache, before in dictionaries.items() if _holds_equal_tensors(after.get(cache), before)]
    places = _assigned_places(model)
    if places:
        expected = _contents_after_run(model, inputs, (), [place for group in places for place in group])
        for group in places:
            after = _contents_after_run(model, inputs, group, group)
            found += [p for p in group if _holds_equal_tensors({"": after.get(p)}, {"": expected.get(p)})]
    return tuple(found)


def _assigned_places(model: nn.Module) -> list[list[Cache]]:
    """Return the attributes and unsaved buffers that hold a tensor and that a method assigns, grouped by class."""
    places: dict[tuple[type[nn.Module], str], list[Cache]] = defaultdict(list)
    assigned: dict[type[nn.Module], frozenset[str]] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("torch."):
            continue
        if kind not in assigned:
            methods = {
                name: value
                for base in reversed(kind.__mro__)
                if issubclass(base, nn.Module) and base is not nn.Module
                for name, value in vars(base).items()
                if isinstance(value, FunctionType) and name != "__init__"
            }
            steps = (step for method in methods.values() for step in dis.get_instructions(method))
            assigned[kind] = frozenset(str(step.argval) for step in steps if step.opname == "STORE_ATTR")
        for attribute in sorted(assigned[kind]):
            value = _holder(module, attribute).get(attribute)
            is_saved = attribute in module._buffers and attribute not in module._non_persistent_buffers_set
            if isinstance(value, Tensor) and value.ndim and not is_saved:
                places[kind, attribute].append((name, attribute))
    return list(places.values())


def _contents_after_run(
    model: nn.Module, inputs: ExampleInputs, cleared: Iterable[Cache], asked: Iterable[Cache]
) -> dict[Cache, Any]:
    """Return the contents of some caches after a run in eval mode that began with others cleared; {} if it fails."""
    modules, own = dict(model.named_modules()), inputs.copy()
    with in_mode(model, "eval"), torch.no_grad():
        clear_caches(model, cleared)
        try:
            model(*own.args, **own.kwargs)
        except Exception:  # a forward that needs the contents of one of them may raise anything
            return {}
        contents: dict[Cache, Any] = {}
        for name, attribute in asked:
            value = _holder(modules[name], attribute).get(attribute)
            if isinstance(value, Tensor):
                value = value.detach().clone()
            contents[name, attribute] = dict(value) if isinstance(value, dict) else value
        return contents


def _holder(module: nn.Module, attribute: str) -> dict[str, Any]:
    """Return the dictionary of a module in which an attribute stands."""
    return module._buffers if attribute in module._buffers else vars(module)


def clear_caches(model: nn.Module, caches: Iterable[Cache]) -> None:
    """Clear caches: a dictionary becomes empty, a buffer gets no elements, another attribute becomes None.

    (torch.export would leave a tensor of its own in a buffer that is None.)

    Args:
        model: the model; changed in place.
        caches: places of the caches.
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


def _holds_equal_tensors(one: Any, other: Mapping[Any, Any]) -> bool:
    """Return whether the first is a dictionary of tensors that are equal to those of the second."""
    return (
        isinstance(one, dict)
        and one.keys() == other.keys()
        and all(
            isinstance(one[key], Tensor) and isinstance(value, Tensor) and torch.equal(one[key], value)
            for key, value in other.items()
        )
    )
