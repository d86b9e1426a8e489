"""The registry of criteria: what each is called, and which sums over data it needs."""

import difflib
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import ALL_SUMS, NAMED_SUMS, Sum
from torchshear.dependency import ChannelGroup
from torchshear.errors import ArgumentError, TorchshearError

Indices = npt.NDArray[np.int64]
Criterion = Callable[[ChannelGroup, Mapping[str, Tensor], Statistics | None], Tensor]
Rearrangement = Callable[[ChannelGroup, Indices, Statistics | None], Indices]


class UnscorableError(TorchshearError):
    """A criterion has nothing to say of a group, which stays whole then; the message says why."""


_CRITERIA: dict[str, Criterion] = {}
_NEEDS: dict[str, frozenset[Sum]] = {}
_COMPARABLE: set[Criterion] = set()
_PER_COST: set[Criterion] = set()
_OF_WHOLE_GROUPS: set[Criterion] = set()
_REARRANGEMENTS: dict[Criterion, Rearrangement] = {}


def criterion(
    name: str,
    needs: tuple[Sum, ...] | None = None,
    comparable: bool = False,
    whole: bool = False,
    per_cost: bool = False,
    rearrange: Rearrangement | None = None,
) -> Callable[[Criterion], Criterion]:
    """Register a criterion: a function `(group, weights, statistics) -> scores`.

    The contract that every criterion keeps, of which its own docstring says only the formula, which units are low,
    what it needs and what it cannot score:

    - `group`: the coupled dimensions; C = group.width units.
    - `weights`: parameter name -> tensor, at least of the group's members.
    - `statistics`: what `torchshear.collect` saw, or None.
    - It returns scores of shape (C,), finite, float64 in those given here; the lowest are pruned first.
    - It raises `UnscorableError` where it has nothing to say of a group, which then stays whole; `WeightError` where a
      weight is missing, without values or not finite; `ArgumentError` where statistics are missing or lack a sum.

    Args:
        name: the word that users choose it by.
        needs: names of the sums that it reads from `statistics`, see `torchshear.calibration.Statistics.sums`; empty
            if it reads none. `torchshear.collect(..., criteria=name)` sums these alone. None: everything but "grams"
            and "output_gradients".
        comparable: whether scores of units of different groups mean the same, as an estimate of the loss does. Those of
            other criteria are divided by their mean over the group where groups are ranked together.
        whole: whether it scores a group as a whole, also where members are to be scored one by one.
        per_cost: whether scores say what a removal costs in loss, so that groups that are ranked together under a
            budget give way by their scores for each operation or parameter that goes.
        rearrange: called as `rearrange(group, kept, statistics)` when it is known how many units of a group stay, with
            those that have the highest scores, ascending. It gives as many units that shall stay instead, in a
            balanced group as many of each block; for criteria to which units matter together, not one by one.

    Raises:
        ArgumentError: the name is taken, or a sum is unknown.
    """
    known = ALL_SUMS | NAMED_SUMS
    unknown = sorted(set(needs or ()) - known)
    if unknown:
        raise ArgumentError(f"needs={unknown} of criterion {name!r}; expected some of {', '.join(sorted(known))}.")

    def add(function: Criterion) -> Criterion:
        if name in _CRITERIA:
            raise ArgumentError(f"criterion {name!r} is registered already, as {_CRITERIA[name].__name__}.")
        _CRITERIA[name] = function
        _NEEDS[name] = ALL_SUMS if needs is None else frozenset(needs)
        if comparable:
            _COMPARABLE.add(function)
        if whole:
            _OF_WHOLE_GROUPS.add(function)
        if per_cost:
            _PER_COST.add(function)
        if rearrange is not None:
            _REARRANGEMENTS[function] = rearrange
        return function

    return add


def find_criterion(name: str | Criterion) -> Criterion:
    """The criterion of a name; a function is taken as it is.

    Args:
        name: name of a registered criterion, or a function like one.

    Returns:
        The function that scores.

    Raises:
        ArgumentError: there is none of that name.
    """
    if callable(name):
        return name
    if not isinstance(name, str) or name not in _CRITERIA:
        near = difflib.get_close_matches(str(name), _CRITERIA, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(f"criterion={name!r}; expected one of {', '.join(sorted(_CRITERIA))}.{hint}")
    return _CRITERIA[name]


def needs_of(name: str | Criterion) -> frozenset[Sum]:
    """The sums that a criterion reads: those named at its registration, or all if none were.

    Raises:
        ArgumentError: there is none of that name.
    """
    function = find_criterion(name)
    return next((_NEEDS[known] for known, one in _CRITERIA.items() if one is function), ALL_SUMS)


def declared_needs(name: str | Criterion) -> frozenset[Sum]:
    """The sums that a criterion cannot do without: those named at its registration; empty if none were.

    Raises:
        ArgumentError: there is none of that name.
    """
    needs = needs_of(name)
    return frozenset() if needs == ALL_SUMS else needs


def is_comparable(function: Criterion) -> bool:
    """Return whether scores of a criterion can be compared between groups as they are."""
    return function in _COMPARABLE


def is_per_cost(function: Criterion) -> bool:
    """Return whether a criterion's scores are weighed against what units cost, where a budget is asked for."""
    return function in _PER_COST


def is_of_whole_groups(function: Criterion) -> bool:
    """Return True if a criterion scores a group as a whole only."""
    return function in _OF_WHOLE_GROUPS


def rearrangement_of(function: Criterion) -> Rearrangement | None:
    """Return the function that exchanges units after they are chosen by scores; None if a criterion has none."""
    return _REARRANGEMENTS.get(function)


def registered_criteria() -> tuple[str, ...]:
    """Return the names of all criteria, sorted."""
    return tuple(sorted(_CRITERIA))
