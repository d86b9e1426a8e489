"""Outputs of a model: tensors and plain values in containers that torch can take apart, and their names.

Other objects, such as the cache of keys and values that a language model keeps for the next token, are opaque to
torch.export. They are omitted from the capture, so that the tensors in them may shrink; the model still returns them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.SymInt)


def output_leaves(output: Any) -> list[Any]:
    """Return the flat outputs of a model, with None for opaque objects."""
    return pytree.tree_leaves(without_opaque(output))


def register_dataclasses(value: Any) -> None:
    """Register the dataclasses in a value with torch, which can then take them apart as it does tuples and dicts."""
    for leaf in pytree.tree_leaves(value):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            register_dataclasses(leaf)


def without_opaque(output: Any) -> Any:
    """Return an output with None in place of opaque objects."""
    register_dataclasses(output)
    return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, _PLAIN) else None, output)


@contextmanager
def drop_opaque_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Have a model return None in place of opaque objects for a block.

    Yields:
        A list that each call of the model fills with the names and types of the objects that were dropped.
    """
    dropped: list[str] = []

    def drop(_: nn.Module, __: Any, output: Any) -> Any:
        plain = without_opaque(output)
        leaves, spec = pytree.tree_flatten(output)
        names = [""] if spec.is_leaf() else output_names(spec)
        dropped[:] = [
            f"{name or 'output'} ({type(leaf).__name__})"
            for name, leaf in zip(names, leaves, strict=True)
            if leaf is not None and not isinstance(leaf, _PLAIN)
        ]
        return () if plain is None else plain  # a hook that returns None changes nothing

    handle = model.register_forward_hook(drop)
    try:
        yield dropped
    finally:
        handle.remove()


def output_names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    """Return the name of each output, in the order in which outputs are flattened.

    A name is the path to the output, joined by dots: keys of dictionaries, fields of dataclasses and named tuples,
    positions in tuples and lists, as in "logits" and "features.3". A single output is called "0".

    Args:
        spec: structure of the outputs.
    """
    if spec.is_leaf():
        return ("0",)
    children = spec.children()
    names: list[str] = []
    for name, child in zip(_child_names(spec, len(children)), children, strict=True):
        names += [name] if child.is_leaf() else [f"{name}.{inner}" for inner in output_names(child)]
    return tuple(names)


class _Mark:
    """Stands for an output."""


def _child_names(spec: pytree.TreeSpec, count: int) -> list[str]:
    """Return the names that a container gives its children, found by building one of marks."""
    marks = [_Mark() for _ in range(count)]
    positions = [str(position) for position in range(count)]
    try:
        container = pytree.SUPPORTED_NODES[spec.type].unflatten_fn(marks, spec.context)
    except Exception:  # a container of the user's may refuse, in any way, what is not a tensor
        return positions
    items: list[tuple[Any, Any]] = []
    if isinstance(container, Mapping):
        items = list(container.items())
    elif is_dataclass(container):
        items = [(field.name, getattr(container, field.name)) for field in fields(container)]
    elif hasattr(container, "_fields"):  # a named tuple
        items = list(zip(container._fields, container, strict=True))
    names = {id(value): str(name) for name, value in items}
    return [names.get(id(mark), position) for mark, position in zip(marks, positions, strict=True)]
