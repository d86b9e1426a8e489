"""Copying a model, also one that keeps computed tensors, or functions that close over what is copied."""

import copy
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from torchshear.errors import ArgumentError, first_line
from torchshear.graph.model._uncopied import uncopied


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Deep-copy a model, so that the copy and the model share nothing that a run writes to.

    Tensors that were computed with gradients, which torch refuses to copy, are copied detached. Modules keep such
    tensors when a hook computes a weight before each forward, as `torch.nn.utils.weight_norm` does, or keeps a feature
    for later. Functions that modules hold, as hooks, are left by Python as they are; those that close over modules or
    containers of the model get the ones of the copy. What Python refuses to copy, as locks and files, is shared.

    Args:
        model: the model; not changed.
        memo: id of an object -> what the copy has in its place.

    Raises:
        ArgumentError: a class of the model refuses to be copied.
    """
    known = dict(memo or {})
    for module in model.modules():
        for tensor in _tensors_in(list(vars(module).values())):
            if not tensor.is_leaf and id(tensor) not in known:
                known[id(tensor)] = tensor.detach().clone()
    twin, known = _deep_copy(model, known)
    for module in twin.modules():
        for holder in (vars(module), *(value for value in vars(module).values() if isinstance(value, dict))):
            for name, value in holder.items():
                if isinstance(value, FunctionType):
                    holder[name] = _rebound(value, known)
    return twin


def _deep_copy(model: nn.Module, known: dict[int, Any]) -> tuple[nn.Module, dict[int, Any]]:
    """A deep copy, and the id of each object -> its copy."""
    copies = dict(known)
    try:
        return copy.deepcopy(model, copies), copies
    except Exception:  # any class may refuse, with any exception
        copies = {id(value): value for value in uncopied(model)} | known
    try:
        return copy.deepcopy(model, copies), copies
    except Exception as error:
        raise ArgumentError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {first_line(error)}. Expected a model "
            f"that copy.deepcopy takes; check the __deepcopy__ and __reduce__ of its classes."
        ) from error


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in containers of containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def reached_by(function: FunctionType) -> list[Any]:
    """What a function closes over, and its default arguments."""
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*given, *(cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))]


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a variable that is assigned later, or never
        return False
    return True


def _rebound(function: FunctionType, copies: dict[int, Any]) -> FunctionType:
    """A function with copies in place of what it reaches; itself where nothing of that was copied."""

    def copied(value: Any) -> Any:
        if isinstance(value, FunctionType):
            return _rebound(value, copies)
        if isinstance(value, MethodType) and id(value.__self__) in copies:
            return MethodType(value.__func__, copies[id(value.__self__)])
        return copies.get(id(value), value)

    if id(function) in copies:
        return copies[id(function)]  # type: ignore[no-any-return]
    copies[id(function)] = function  # for a function that closes over itself
    if all(copied(value) is value for value in reached_by(function)):
        return function
    cells = tuple(CellType(copied(c.cell_contents)) if _is_filled(c) else c for c in function.__closure__ or ())
    twin = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        tuple(copied(value) for value in function.__defaults__ or ()) or None,
        cells,
    )
    twin.__kwdefaults__ = {name: copied(value) for name, value in (function.__kwdefaults__ or {}).items()} or None
    twin.__qualname__, twin.__module__, twin.__doc__ = function.__qualname__, function.__module__, function.__doc__
    vars(twin).update(vars(function))
    copies[id(function)] = twin
    return twin
