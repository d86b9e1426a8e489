"""The registry of criteria."""

import difflib
from collections.abc import Callable, Mapping

from torch import Tensor

from torchshear.dependency import ChannelGroup
from torchshear.errors import ArgumentError, TorchshearError
from torchshear.pruners.statistics import Statistics

Criterion = Callable[[ChannelGroup, Mapping[str, Tensor], Statistics | None], Tensor]


class UnscorableError(TorchshearError):
    """A criterion has nothing to say of a group, which stays whole then; the message says why."""


_CRITERIA: dict[str, Criterion] = {}
_COMPARABLE: set[Criterion] = set()


def criterion(name: str, comparable: bool = False) -> Callable[[Criterion], Criterion]:
    """Register a criterion: a function `(group, weights, statistics) -> scores`, bigger = keep.

    Args:
        name: the word that users choose it by.
        comparable: whether scores of units of different groups mean the same, as an estimate of the loss does. Those of
            other criteria are divided by their mean over the group where groups are ranked together.

    Raises:
        ArgumentError: the name is taken.
    """

    def add(function: Criterion) -> Criterion:
        if name in _CRITERIA:
            raise ArgumentError(f"criterion {name!r} is registered already, as {_CRITERIA[name].__name__}.")
        _CRITERIA[name] = function
        if comparable:
            _COMPARABLE.add(function)
        return function

    return add


def find_criterion(name: str | Criterion) -> Criterion:
    """The criterion of a name; a function is taken as it is.

    Raises:
        ArgumentError: there is none of that name.
    """
    if callable(name):
        return name
    if name not in _CRITERIA:
        near = difflib.get_close_matches(str(name), _CRITERIA, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(f"criterion={name!r}; expected one of {', '.join(sorted(_CRITERIA))}.{hint}")
    return _CRITERIA[name]


def is_comparable(function: Criterion) -> bool:
    """Whether scores of a criterion can be compared between groups as they are."""
    return function in _COMPARABLE


def registered_criteria() -> tuple[str, ...]:
    """Names of all criteria, sorted."""
    return tuple(sorted(_CRITERIA))
