"""Names of a model's outputs: keys, fields and places on the way to each, told by the containers themselves."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils import _pytree as pytree


def output_names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    """Name of each output in the order in which they are flattened.

    Keys of dictionaries (and of what derives from them), fields of dataclasses and named tuples, places in tuples and
    lists, joined by dots: "logits", "features.3". A single output is called "0".
    """
    return tuple(".".join(path) or "0" for path in _paths(spec))


def _paths(spec: pytree.TreeSpec) -> Iterator[tuple[str, ...]]:
    if spec.is_leaf():
        yield ()
        return
    children = spec.children()
    for name, child in zip(_child_names(spec, len(children)), children, strict=True):
        for path in _paths(child):
            yield (name, *path)


def _child_names(spec: pytree.TreeSpec, count: int) -> list[str]:
    """What a container calls its children: it is built of marks, which are looked for in it."""
    marks = [_Mark() for _ in range(count)]
    by_place = [str(place) for place in range(count)]
    try:
        made = pytree.SUPPORTED_NODES[spec.type].unflatten_fn(marks, spec.context)
    except Exception:  # a container of the user's may refuse what is not a tensor in any way; places are names, too
        return by_place
    named = {id(value): name for name, value in _items(made)}
    return [named.get(id(mark), place) for mark, place in zip(marks, by_place, strict=True)]


class _Mark:
    """Stands for an output."""


def _items(container: Any) -> list[tuple[str, Any]]:
    if isinstance(container, Mapping):
        return [(str(key), value) for key, value in container.items()]
    if is_dataclass(container):
        return [(field.name, getattr(container, field.name)) for field in fields(container)]
    names = getattr(container, "_fields", ())
    return list(zip(names, container, strict=True)) if names else []
