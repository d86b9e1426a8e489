"""Copying a model, including computed tensors, and hooks that close over what is copied."""

import copy
from collections.abc import Iterator, Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from torchshear.errors import ArgumentError, first_line

_MAX_DEPTH = 4  # levels of objects in objects that are searched for what cannot be copied


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Deep-copy a model, so that the copy and the model share nothing that a run writes to.

    Tensors that were computed with gradients, which torch refuses to copy, are copied detached. Modules keep such
    tensors when a hook computes a weight before each forward, as `torch.nn.utils.weight_norm` does, or keeps a feature
    for later. Python does not copy functions, so hooks that close over modules or containers of the model are made
    anew with those of the copy. What Python refuses to copy, as locks and files, is shared.

    Args:
        model: the model; not changed.
        memo: id of an object -> its replacement in the copy.

    Returns:
        The copy.

    Raises:
        ArgumentError: a class of the model refuses to be copied.
    """
    known = dict(memo or {})
    for module in model.modules():
        for tensor in _tensors_in(list(vars(module).values())):
            if not tensor.is_leaf and id(tensor) not in known:
                known[id(tensor)] = tensor.detach().clone()
    copies = dict(known)
    try:
        twin = copy.deepcopy(model, copies)
    except Exception:  # any class may refuse, with any exception
        copies = {id(value): value for value in _uncopyable(model)} | known
        try:
            twin = copy.deepcopy(model, copies)
        except Exception as error:
            raise ArgumentError(
                f"{type(model).__name__} cannot be copied: {type(error).__name__}: {first_line(error)}. Expected a "
                f"model that copy.deepcopy takes; check the __deepcopy__ and __reduce__ of its classes."
            ) from error
    for module in twin.modules():
        for holder in (vars(module), *(value for value in vars(module).values() if isinstance(value, dict))):
            for name, value in holder.items():
                if isinstance(value, FunctionType):
                    holder[name] = _rebind(value, copies)
    return twin


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def _uncopyable(model: nn.Module) -> Iterator[Any]:
    """Yield the objects, in attributes of modules and in what these hold, that Python refuses to copy."""
    own = {id(value): value for value in (*model.modules(), *model.parameters(), *model.buffers())}
    for module in model.modules():
        for value in vars(module).values():
            yield from _uncopyable_in(value, own, _MAX_DEPTH)


def _uncopyable_in(value: Any, own: Mapping[int, Any], depth: int) -> Iterator[Any]:
    """Yield the innermost objects in a value that cannot be copied, of those that are not the model's `own`."""
    if id(value) in own:
        return
    try:
        copy.deepcopy(value, dict(own))
        return
    except Exception:  # any class may refuse, with any exception
        items: list[Any] = []
    if depth and isinstance(value, Mapping):
        items = list(value.values())
    elif depth and isinstance(value, list | tuple | set):
        items = list(value)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, type | ModuleType):
        items = list(vars(value).values())
    found = [inner for item in items for inner in _uncopyable_in(item, own, depth - 1)]
    yield from found or [value]


def values_reached_by(function: FunctionType) -> list[Any]:
    """Return the default arguments of a function and the values that it closes over."""
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*defaults, *(cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))]


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a variable that is assigned later, or never
        return False
    return True


def _rebind(function: FunctionType, copies: dict[int, Any]) -> FunctionType:
    """Return a function that reaches copies of its values; the function itself where none of them was copied."""

    def copy_of(value: Any) -> Any:
        if isinstance(value, FunctionType):
            return _rebind(value, copies)
        if isinstance(value, MethodType) and id(value.__self__) in copies:
            return MethodType(value.__func__, copies[id(value.__self__)])
        return copies.get(id(value), value)

    if id(function) in copies:
        return copies[id(function)]  # type: ignore[no-any-return]
    copies[id(function)] = function  # for a function that closes over itself
    if all(copy_of(value) is value for value in values_reached_by(function)):
        return function
    cells = tuple(CellType(copy_of(c.cell_contents)) if _is_filled(c) else c for c in function.__closure__ or ())
    twin = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        tuple(copy_of(value) for value in function.__defaults__ or ()) or None,
        cells,
    )
    twin.__kwdefaults__ = {name: copy_of(value) for name, value in (function.__kwdefaults__ or {}).items()} or None
    twin.__qualname__, twin.__module__, twin.__doc__ = function.__qualname__, function.__module__, function.__doc__
    vars(twin).update(vars(function))
    copies[id(function)] = twin
    return twin
