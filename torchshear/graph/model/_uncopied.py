"""What a model holds that Python refuses to copy, as locks, files and generators."""

import copy
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import nn

_DEEPEST = 4  # levels of objects in objects that are looked through


def uncopied(model: nn.Module) -> Iterator[Any]:
    """Objects that modules hold, themselves or in what they hold, and that cannot be copied."""
    own = {id(one): one for one in (*model.modules(), *model.parameters(), *model.buffers())}
    for module in model.modules():
        for value in vars(module).values():
            yield from _inside(value, own, _DEEPEST)


def _inside(value: Any, own: Mapping[int, Any], depth: int) -> Iterator[Any]:
    if id(value) in own:
        return
    try:
        copy.deepcopy(value, dict(own))
        return
    except Exception:  # any class may refuse, with any exception
        parts = _parts(value) if depth else []
    found = [one for part in parts for one in _inside(part, own, depth - 1)]
    yield from found or [value]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    is_opened = hasattr(value, "__dict__") and not isinstance(value, type | ModuleType)
    return list(vars(value).values()) if is_opened else []
