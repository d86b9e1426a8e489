"""Losses of widths: what a group loses at each, on a scale that all groups share."""

import numpy as np
import numpy.typing as npt

from torchshear.dependency.groups._groups import ChannelGroup
from torchshear.pruners.allocation._problem import Levels
from torchshear.pruners.criteria._criterion import Criterion, is_comparable, is_per_cost
from torchshear.pruners.selection._pools import WidthSteps

Floats = npt.NDArray[np.float64]

MOST_LEVELS = 16
_LEAST_KEPT = 1e-6  # share of the scores, below which all is lost


def levels_of(steps: WidthSteps, criterion: Criterion, most: int = MOST_LEVELS) -> Levels:
    """Return widths of a group, and what it loses at each.

        loss(w) = -S log(kept scores(w) / all scores)

    What the layers of a network hand on passes through one after another, so that shares of what is kept multiply, and
    their logarithms add up. S is the sum of all scores where these can be compared between groups, so that a small
    removal loses the scores that go; elsewhere it is the number of layers that make the group's units, as all that add
    to one residual stream do: each of them loses that share. Scores that say what a removal costs in loss are added up
    as they are. No width loses less than a wider one.

    Args:
        steps: the group, its widths, and its units in the order in which they go, with scores; without scores every
            width loses nothing.
        criterion: what the scores are of.
        most: how many widths are looked at; the widest and the narrowest, and others evenly between them.
    """
    widths = steps.widths[steps.n_forced :]
    widths = widths[np.unique(np.linspace(0, len(widths) - 1, min(most, len(widths))).round().astype(int))]
    losses = np.zeros(len(widths)) if steps.scores is None else _losses(steps, widths, criterion)
    return Levels(steps.group.name, tuple(widths.tolist()), tuple(losses.tolist()))


def _losses(steps: WidthSteps, widths: npt.NDArray[np.int64], criterion: Criterion) -> Floats:
    assert steps.scores is not None
    assert steps.order is not None
    scores = steps.scores[steps.order]
    scores = np.where(np.isneginf(scores), 0.0, scores)  # what went before loses nothing more
    scores = scores - min(float(scores.min()), 0.0)
    total = float(scores.sum())
    is_weighed = bool(total) and is_comparable(criterion)
    if not total:
        scores, total = np.ones(len(scores)), float(len(scores))
    gone = np.concatenate([[0.0], np.cumsum(scores)])[steps.group.width - widths]
    if is_weighed and is_per_cost(criterion):
        return np.maximum.accumulate(gone)
    weight = total if is_weighed else _n_layers(steps.group)
    return np.maximum.accumulate(-weight * np.log(np.maximum(1 - gone / total, _LEAST_KEPT)))


def _n_layers(group: ChannelGroup) -> int:
    """Return how many layers make the units of a group; one that acts on each channel alone makes none of its own."""
    made = {member.layer or member.name for member in group.members if member.purposes & {"out", "embedding"}}
    return max(len(made), 1)
