"""Parts of a model: some of its modules, with the calls that one run makes of them, as a model of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Parts:
    """The modules that are captured in place of their model.

    Attributes:
        calls: name of the part for each captured call, in the order of the run; a part that is called with several
            signatures (other shapes, other options) is listed once for each.
        pinned: canonical name of a parameter or buffer of a part -> the reason why it must stay whole: something
            outside the parts holds or reads it.
    """

    calls: tuple[str, ...]
    pinned: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, each once, in order of their first call."""
        return tuple(dict.fromkeys(self.calls))

    def of(self, name: str) -> "Parts":
        """Return one of the parts alone, with all of its calls."""
        return Parts(tuple(call for call in self.calls if call == name), self.pinned)


class PartRun(nn.Module):
    """A module that makes the captured calls of a model's parts.

    Its modules, parameters and buffers are the model's own, under their own names. Its forward takes `(args, kwargs)`
    for each captured call and returns the results of all of them.
    """

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training"):
            vars(self)[name] = getattr(model, name)
        self._origin = (model,)  # a tuple, so that it is no child: its modules have their names already
        self._parts = parts

    def forward(self, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, ...]:
        """Return the results of the calls, in order."""
        results = []
        for name, (args, kwargs) in zip(self._parts.calls, calls, strict=True):
            results.append(self._origin[0].get_submodule(name)(*args, **kwargs))
        return tuple(results)


def whole_model(model: nn.Module) -> nn.Module:
    """Return the model that a `PartRun` belongs to; any other module itself. A copied `PartRun` belongs to the copy."""
    return model._origin[0] if isinstance(model, PartRun) else model


def model_parts(model: nn.Module) -> Parts | None:
    """Return the parts that a `PartRun` calls; None for any other module."""
    return model._parts if isinstance(model, PartRun) else None


def is_in_parts(name: str, parts: Parts | None) -> bool:
    """Return whether a qualified name lies in one of the parts; True for any name where there are no parts."""
    return parts is None or any(name == part or name.startswith(f"{part}.") for part in parts.names)
