"""Keeping the state of a model: what a run changes of it, other than its parameters, is put back."""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchshear.graph.model._copy import reached_by

_DEEPEST = 3  # containers in containers that are looked into
_NOT_LOOKED_INTO = (nn.Module, Tensor, type, ModuleType, FunctionType)
_PLAIN = frozenset({type(None), bool, int, float, str, tuple, nn.Parameter})  # hold nothing that a run changes


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Put back, afterwards, the attributes, buffers and hooks of a model's modules, and what they hold.

    That are counters, averages and caches, whether a run assigns them or writes to them: values of buffers and of other
    tensors, contents of lists, dicts, sets and plain objects, also of those that hooks close over or know as a variable
    of their file. Parameters are not copied.
    """
    kept = _Kept()
    for module in model.modules():
        if isinstance(module._buffers, dict):  # not TorchScript
            kept.look(vars(module))
    for buffer in model.buffers():
        kept.look(buffer)
    try:
        yield
    finally:
        kept.put_back()


class _Kept:
    """What was seen, by identity, with copies of what it held."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._held: dict[int, tuple[Any, Any]] = {}
        self._functions: set[int] = set()
        self._empty: list[dict[Any, Any]] = []  # as most are: of hooks that nobody registered

    def look(self, value: Any, depth: int = 0) -> None:
        """Keep a tensor's values, or what a container holds and what is inside that."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_meta and not is_lazy(value):
                self._tensors.setdefault(id(value), (value, value.detach().clone()))
            return
        if isinstance(value, FunctionType):
            is_ours = (value.__module__ or "").startswith("torchshear.")  # what our own hooks note of a run is to stay
            if not is_ours and id(value) not in self._functions:
                self._functions.add(id(value))
                for item in (*reached_by(value), *_variables_of(value)):
                    self.look(vars(item) if isinstance(item, nn.Module) else item)
            return
        holder = _holder(value)
        if holder is None or id(holder) in self._held or depth > _DEEPEST:
            return
        content = dict(holder) if isinstance(holder, dict) else list(holder)
        self._held[id(holder)] = (holder, content)
        for item in content.values() if isinstance(content, dict) else content:
            if isinstance(item, dict) and not item:
                self._empty.append(item)
            elif type(item) not in _PLAIN:
                self.look(item, depth + 1)

    def put_back(self) -> None:
        """Undo all changes."""
        for holder in self._empty:
            holder.clear()
        for holder, content in self._held.values():
            if isinstance(holder, dict):
                _restore(holder, content)
            elif len(holder) != len(content) or any(a is not b for a, b in zip(holder, content, strict=True)):
                holder.clear()
                (holder.update if isinstance(holder, set) else holder.extend)(content)
        for tensor, value in self._tensors.values():
            if tensor.shape != value.shape:
                tensor.data = value
            elif tensor.layout != torch.strided or not torch.equal(tensor, value):
                tensor.data.copy_(value)  # past autograd, which may hold the tensor for a backward of the user's


def _variables_of(function: FunctionType) -> list[Any]:
    """Containers that a function knows as variables of its file, as the dictionary of features in a notebook."""
    known = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [value for value in known if isinstance(value, dict | list | set | deque)]


def _holder(value: Any) -> Any:
    """The container in which an attribute's value keeps things: itself, or the attributes of a plain object."""
    if isinstance(value, dict | list | set | deque):
        return value
    return None if isinstance(value, _NOT_LOOKED_INTO) else getattr(value, "__dict__", None)


def _restore(now: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    """Undo what was assigned: a cached value, a buffer replaced by another tensor, a hook."""
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if now.get(name, _restore) is not value:
            now[name] = value
