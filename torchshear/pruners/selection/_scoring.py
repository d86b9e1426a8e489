"""Scores of a group by a criterion: checked, and with its members put together as asked."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup
from torchshear.dependency.groups._purposes import MAKING_PURPOSES, OWN_PURPOSES
from torchshear.errors import ArgumentError, TorchshearError
from torchshear.pruners.criteria._criterion import Criterion, UnscorableError, is_of_whole_groups

Floats = npt.NDArray[np.float64]


def _mean(scores: Floats) -> Floats:
    return np.asarray(np.nanmean(scores, 0), np.float64)


def _max(scores: Floats) -> Floats:
    return np.asarray(np.nanmax(scores, 0), np.float64)


def _normalized_mean(scores: Floats) -> Floats:
    means = np.nanmean(scores, 1, keepdims=True)
    return _mean(scores / np.where(means == 0, 1.0, means))


def _geometric_mean(scores: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.asarray(np.exp(np.nanmean(np.log(scores), 0)), np.float64)


GROUP_REDUCTIONS: Final[Mapping[str, Callable[[Floats], Floats] | None]] = {
    "sum": None,
    "filters": None,
    "mean": _mean,
    "max": _max,
    "normalized": _normalized_mean,
    "geometric": _geometric_mean,
}
"""How scores of a group's members, shape (members, C) with NaN where one lacks a unit, become one; None: the criterion
puts them together itself, by its own formula, of all members or of the filters alone."""


def group_scores(
    group: ChannelGroup,
    criterion: Criterion,
    weights: Mapping[str, Tensor],
    statistics: Statistics | None,
    group_reduction: str = "sum",
) -> Floats:
    """Score the units of a group.

    Args:
        group: the group; C = group.width units.
        criterion: the function that scores.
        weights: canonical name of a parameter -> tensor.
        statistics: what was seen on data, or None.
        group_reduction: one of `GROUP_REDUCTIONS`. "sum" is the criterion on the whole group; "filters" is the
            criterion on the weights of the layers that make the units, without scales of norms, if it scores these; any
            other applies it to each dimension that belongs to the units themselves (rows of layers, norm scales,
            embedding columns), and puts these together: their mean, their maximum, the mean of each divided by its own
            mean over the units, or the geometric mean.

    Returns:
        Scores of shape (C,), float64; bigger = keep.

    Raises:
        ArgumentError: the criterion gave something else than C finite numbers, or, for the geometric mean, less than 0.
        UnscorableError: the criterion has nothing to say of the group.
    """
    together = None if is_of_whole_groups(criterion) else GROUP_REDUCTIONS[group_reduction]
    filters = tuple(member for member in group.members if member.purposes & MAKING_PURPOSES)
    if group_reduction == "filters" and filters:
        with suppress(UnscorableError):  # a criterion of norms has nothing to say of filters
            return _checked_scores(replace(group, members=filters), criterion, weights, statistics)
    if together is None:
        return _checked_scores(group, criterion, weights, statistics)
    rows = list(_scores_by_member(group, criterion, weights, statistics))
    scores = np.stack(rows)
    if group_reduction == "geometric" and (scores < 0).any():
        raise ArgumentError(
            f"group_reduction='geometric': the criterion gave scores below 0 for group {group.name!r}; use 'mean' "
            f"instead."
        )
    return together(scores)


def _scores_by_member(
    group: ChannelGroup, criterion: Criterion, weights: Mapping[str, Tensor], statistics: Statistics | None
) -> Iterator[Floats]:
    """Scores by one member after another; NaN for units of which it has nothing."""
    known = [member for member in group.members if member.name in weights]
    own = [member for member in known if member.purposes & OWN_PURPOSES] or known
    nothing: UnscorableError | None = None
    n_scored = 0
    for member in own:
        try:
            scores = _checked_scores(replace(group, members=(member,)), criterion, weights, statistics)
        except UnscorableError as error:
            nothing = error
            continue
        n_scored += 1
        covered = np.bincount(member.units, minlength=group.width) > 0
        yield np.where(covered, scores, np.nan)
    if not n_scored:
        raise nothing or UnscorableError("no weight of the group was given")


def _checked_scores(
    group: ChannelGroup, criterion: Criterion, weights: Mapping[str, Tensor], statistics: Statistics | None
) -> Floats:
    """Call a criterion and check what it gives; an error of a user's own function is passed on with a note."""
    try:
        given = criterion(group, weights, statistics)
    except Exception as error:
        if not isinstance(error, TorchshearError | UnscorableError):
            name = getattr(criterion, "__name__", type(criterion).__name__)
            error.add_note(f"the criterion {name!r} was called with group {group.name!r}, weights and statistics")
        raise
    expected = f"expected a tensor of {group.width} finite numbers, one a unit."
    if not isinstance(given, Tensor):
        raise ArgumentError(f"the criterion gave {type(given).__name__} for group {group.name!r}; {expected}")
    if given.is_meta or given.is_complex() or given.layout is not torch.strided:
        raise ArgumentError(
            f"the criterion gave {given.dtype} numbers on {given.device}, in the layout {given.layout}, for group "
            f"{group.name!r}; {expected}"
        )
    scores = np.asarray(given.detach().to("cpu", torch.float64).numpy())
    if scores.shape != (group.width,) or not np.isfinite(scores).all():
        what = "" if np.isfinite(scores).all() else ", NaN or infinite ones among them,"
        raise ArgumentError(
            f"the criterion gave scores of shape {scores.shape}{what} for group {group.name!r}; {expected}"
        )
    return scores
