"""State of the user's model: put back after a run, with its mode and hooks, and caches that a run fills."""

import dis
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchshear.graph._inputs import ExampleInputs
from torchshear.graph.model._copy import values_reached_by
from torchshear.graph.model._meta import is_on_meta
from torchshear.graph.model._process import run_exclusively, silence_torch

Mode = Literal["eval", "train"]
Cache = tuple[str, str]  # name of a module, and of the attribute: a dictionary, or the place of one tensor

_MAX_DEPTH = 3  # levels of containers in containers that are saved
_NOT_SAVED = (nn.Module, Tensor, type, ModuleType, FunctionType)  # values whose attributes are not saved
_IMMUTABLE = frozenset({type(None), bool, int, float, str, tuple, nn.Parameter})  # hold nothing that a run changes
_ATTRIBUTES_OF_MODULE = frozenset(vars(nn.Module()))


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


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Tensors and containers, with copies of their contents.

    Attributes:
        tensors: by identity: a tensor and a copy of its values.
        containers: by identity: a container and a copy of its contents.
        functions: identities of the functions whose values are saved.
        empty: empty dictionaries, as most of those for hooks are.
    """

    tensors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    containers: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    functions: set[int] = field(default_factory=set)
    empty: list[dict[Any, Any]] = field(default_factory=list)

    def add(self, value: Any, depth: int = 0) -> None:
        """Save the values of a tensor, or the contents of a container and of the containers in it."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_meta and not is_lazy(value):
                self.tensors.setdefault(id(value), (value, value.detach().clone()))
            return
        if isinstance(value, FunctionType):
            self._add_function(value)
            return
        holder = value
        if not isinstance(value, dict | list | set | deque):  # a plain object holds its attributes
            holder = None if isinstance(value, _NOT_SAVED) else getattr(value, "__dict__", None)
        if holder is None or id(holder) in self.containers or depth > _MAX_DEPTH:
            return
        contents = dict(holder) if isinstance(holder, dict) else list(holder)
        self.containers[id(holder)] = (holder, contents)
        for item in contents.values() if isinstance(contents, dict) else contents:
            if isinstance(item, dict) and not item:
                self.empty.append(item)
            elif type(item) not in _IMMUTABLE:
                self.add(item, depth + 1)

    def _add_function(self, function: FunctionType) -> None:
        """Save the values that a hook closes over, and the containers that it uses as variables of its file."""
        # Our own hooks record the run; their records must stay.
        if id(function) in self.functions or (function.__module__ or "").startswith("torchshear."):
            return
        self.functions.add(id(function))
        variables = (function.__globals__.get(name) for name in function.__code__.co_names)
        containers = [value for value in variables if isinstance(value, dict | list | set | deque)]
        for item in (*values_reached_by(function), *containers):
            self.add(vars(item) if isinstance(item, nn.Module) else item)

    def restore(self) -> None:
        """Undo all changes since the contents were saved."""
        for holder in self.empty:
            holder.clear()
        for holder, contents in self.containers.values():
            if isinstance(holder, dict):
                _restore_items(holder, contents)
            elif len(holder) != len(contents) or any(a is not b for a, b in zip(holder, contents, strict=True)):
                holder.clear()
                (holder.update if isinstance(holder, set) else holder.extend)(contents)
        for tensor, value in self.tensors.values():
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
