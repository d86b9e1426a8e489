"""Running the user's model without leaving a trace: its mode, attributes, buffers and hooks are put back afterwards."""

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchshear.graph.model._copy import values_reached_by
from torchshear.graph.model._process import run_exclusively, silence_torch

Mode = Literal["eval", "train"]

_MAX_DEPTH = 3  # levels of containers in containers that are saved
_NOT_SAVED = (nn.Module, Tensor, type, ModuleType, FunctionType)  # values whose attributes are not saved
_IMMUTABLE = frozenset({type(None), bool, int, float, str, tuple, nn.Parameter})  # hold nothing that a run changes


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Put a model into a mode for a block; its state (see `preserve_state`) and the generators are restored."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with run_exclusively(), preserve_state(model), torch.random.fork_rng(devices=devices), silence_torch():
        flags = [(module, module.training) for module in model.modules()]
        try:
            warnings.simplefilter("ignore")  # the user sees the model's own warnings when running it
            # The flags are set directly, since a train() of the user's own may do more, such as merging weights. A
            # model that is being trained keeps its flags, which may freeze some of the batch norms.
            if not (mode == "train" and model.training):
                for module, _ in flags:
                    module.training = mode == "train"
            yield
        finally:
            for module, training in flags:
                module.training = training


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Restore, after a block, everything but the parameters that a run of the model may change.

    This covers the attributes, buffers and hooks of all modules, whether a run assigns them or writes to them: values
    of buffers and other tensors, and contents of lists, dicts, sets and plain objects. Containers that hooks close
    over, or use as variables of their file, are restored as well.
    """
    snapshot = _Snapshot()
    for module in model.modules():
        if isinstance(module._buffers, dict):  # not TorchScript
            snapshot.add(vars(module))
    for buffer in model.buffers():
        snapshot.add(buffer)
    try:
        yield
    finally:
        snapshot.restore()


class _Snapshot:
    """Tensors and containers, with copies of their contents."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._functions: set[int] = set()
        self._empty: list[dict[Any, Any]] = []  # most hook dictionaries are

    def add(self, value: Any, depth: int = 0) -> None:
        """Save the values of a tensor, or the contents of a container and of the containers in it."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_meta and not is_lazy(value):
                self._tensors.setdefault(id(value), (value, value.detach().clone()))
            return
        if isinstance(value, FunctionType):
            self._add_function(value)
            return
        holder = value
        if not isinstance(value, dict | list | set | deque):  # a plain object holds its attributes
            holder = None if isinstance(value, _NOT_SAVED) else getattr(value, "__dict__", None)
        if holder is None or id(holder) in self._containers or depth > _MAX_DEPTH:
            return
        contents = dict(holder) if isinstance(holder, dict) else list(holder)
        self._containers[id(holder)] = (holder, contents)
        for item in contents.values() if isinstance(contents, dict) else contents:
            if isinstance(item, dict) and not item:
                self._empty.append(item)
            elif type(item) not in _IMMUTABLE:
                self.add(item, depth + 1)

    def _add_function(self, function: FunctionType) -> None:
        """Save the values that a hook closes over, and the containers that it uses as variables of its file."""
        # Our own hooks record the run; their records must stay.
        if id(function) in self._functions or (function.__module__ or "").startswith("torchshear."):
            return
        self._functions.add(id(function))
        variables = (function.__globals__.get(name) for name in function.__code__.co_names)
        containers = [value for value in variables if isinstance(value, dict | list | set | deque)]
        for item in (*values_reached_by(function), *containers):
            self.add(vars(item) if isinstance(item, nn.Module) else item)

    def restore(self) -> None:
        """Undo all changes since the contents were saved."""
        for holder in self._empty:
            holder.clear()
        for holder, contents in self._containers.values():
            if isinstance(holder, dict):
                _restore_items(holder, contents)
            elif len(holder) != len(contents) or any(a is not b for a, b in zip(holder, contents, strict=True)):
                holder.clear()
                (holder.update if isinstance(holder, set) else holder.extend)(contents)
        for tensor, value in self._tensors.values():
            if tensor.shape != value.shape:
                tensor.data = value
            elif tensor.layout != torch.strided or not torch.equal(tensor, value):
                tensor.data.copy_(value)  # past autograd, which may hold the tensor for a backward of the user's


def _restore_items(holder: dict[Any, Any], contents: Mapping[Any, Any]) -> None:
    """Undo changes of a dictionary, item by item: a frozen one refuses even an update with nothing."""
    missing = object()
    for name in holder.keys() - contents.keys():
        del holder[name]
    for name, value in contents.items():
        if holder.get(name, missing) is not value:
            holder[name] = value
