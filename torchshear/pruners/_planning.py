"""From groups, a criterion and a ratio to a plan."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchshear.dependency import ChannelGroup, ChannelGroups, Cut, PruningPlan, make_plan
from torchshear.dependency.alignment import Alignment
from torchshear.errors import ArgumentError, PlanError
from torchshear.pruners._selection import Width, choose_units, choose_width
from torchshear.pruners._targets import Ratio, Target, choose_targets
from torchshear.pruners._weight_source import WeightSource, weights_to_score
from torchshear.pruners.criteria import Criterion, UnscorableError, find_criterion
from torchshear.pruners.statistics import Statistics

Indices = npt.NDArray[np.int64]


def plan_uniform(  # noqa: PLR0913 - as torchshear.plan
    groups: ChannelGroups,
    criterion: str | Criterion = "l1",
    ratio: Ratio = 0.5,
    alignment: Alignment | None = None,
    min_width: int = 1,
    axes: str | Collection[str] | None = None,
    exclude: str | Collection[str] = (),
    weights: WeightSource = None,
    statistics: Statistics | None = None,
) -> PruningPlan:
    """Remove a share of every group that may shrink, the units with the lowest scores first.

    Args:
        groups: the analysed network.
        criterion: name of a registered criterion, or a function like one.
        ratio: fraction of units to remove from each group, in [0, 1); or a mapping, see `torchshear.plan`.
        alignment: which widths the target runs well; None for any.
        min_width: the fewest units to keep in a group.
        axes: roles that may shrink; None for all.
        exclude: patterns of names; groups with a member that fits one stay whole.
        weights: what criteria look at; see `torchshear.plan`. None: the tensors of the model that was traced.
        statistics: what criteria that look at data need, from `torchshear.collect`.

    Raises:
        ArgumentError: statistics are missing or of another network; the criterion has nothing to say of any group;
            unknown criterion; ratio outside [0, 1), or so small that no group can lose a unit; min_width
            below 1; a role, key or pattern that fits nothing.
        WeightError: weights cannot be scored, or are not those of the network.
        CheckpointError: `weights` names a checkpoint that cannot be read.
    """
    score = find_criterion(criterion)
    _check_min_width(min_width)
    targets = choose_targets(groups, ratio, axes, exclude)
    alignment = alignment or Alignment.none()
    widths = {group.name: _width(group, targets[group.name], alignment, min_width) for group in groups}
    chosen = tuple(group for group in groups.prunable if targets[group.name].ratio)
    if chosen and all(widths[group.name].kept == group.width for group in groups):
        raise ArgumentError(_nothing_moves(chosen, ratio, alignment, min_width))
    _check_statistics(groups, statistics)
    tensors = weights_to_score(groups, weights)
    kept: dict[str, Indices] = {}
    unscored: dict[str, str] = {}
    for group in groups:
        if widths[group.name].kept < group.width:
            try:
                kept[group.name] = _kept(group, score, tensors, widths[group.name], statistics)
            except UnscorableError as error:
                unscored[group.name] = f"stays whole: {error}"
    if unscored and not kept:
        raise ArgumentError(
            f"the criterion cannot score any of {len(unscored)} groups: {next(iter(unscored.values()))}."
        )
    request = {
        "criterion": criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom"),
        "ratio": dict(ratio) if isinstance(ratio, Mapping) else ratio,
        "alignment": alignment.name,
        "min_width": min_width,
    }
    request |= {} if axes is None else {"axes": [axes] if isinstance(axes, str) else list(axes)}
    request |= {"exclude": [exclude] if isinstance(exclude, str) else list(exclude)} if exclude else {}
    notes = {name: width.note for name, width in widths.items() if width.note} | unscored
    ratios = {name: target.ratio for name, target in targets.items() if target.ratio is not None}
    return make_plan(Cut(groups, kept), kept, request, notes, ratios)


def _width(group: ChannelGroup, target: Target, alignment: Alignment, min_width: int) -> Width:
    """How many units of a group stay; all of them where it is to stay whole."""
    if target.ratio is None:
        return Width(group.width, f"stays whole: {target.reason}")
    return choose_width(group, target.ratio, alignment, min_width)


def plan_from_kept(groups: ChannelGroups, kept: Mapping[str, Any]) -> PruningPlan:
    """Make a plan of units that were chosen elsewhere.

    Args:
        groups: the analysed network.
        kept: group name -> indices of the units that stay; groups not named keep everything.

    Raises:
        PlanError: a group is unknown, indices are out of range or repeated, a balance is violated, or a dimension would
            vanish.
    """
    chosen = {name: _as_indices(name, indices) for name, indices in kept.items()}
    return make_plan(Cut(groups, chosen), chosen, {"kept": "given"}, {})


def _as_indices(name: str, indices: Any) -> Indices:
    array = np.asarray(indices).reshape(-1)
    if array.size and array.dtype.kind not in "iu":
        raise PlanError(f"kept units of group {name!r} have dtype {array.dtype}; expected integer indices.")
    return np.sort(array.astype(np.int64))


def _check_statistics(groups: ChannelGroups, statistics: Statistics | None) -> None:
    if statistics is not None and not isinstance(statistics, Statistics):
        raise ArgumentError(f"statistics is {type(statistics).__name__}; expected what torchshear.collect gives.")
    if statistics is not None and statistics.fingerprint != groups.graph.fingerprint:
        raise ArgumentError(
            f"the statistics are of a network with graph {statistics.fingerprint[:12]}, the groups of one with "
            f"{groups.graph.fingerprint[:12]}. Collect them with the network that is planned."
        )


def _kept(
    group: ChannelGroup,
    score: Criterion,
    weights: Mapping[str, Tensor],
    width: Width,
    statistics: Statistics | None,
) -> Indices:
    scores = np.asarray(score(group, weights, statistics).detach().cpu().numpy(), np.float64)
    if scores.shape != (group.width,) or not np.isfinite(scores).all():
        raise ArgumentError(
            f"the criterion gave scores of shape {scores.shape} for group {group.name!r}; expected {group.width} "
            f"finite numbers, one a unit."
        )
    return choose_units(group, scores, width.kept)


def _check_min_width(min_width: int) -> None:
    if isinstance(min_width, bool) or not isinstance(min_width, int) or min_width < 1:
        raise ArgumentError(f"min_width={min_width!r}; expected an integer of at least 1, the fewest channels to keep.")


def _nothing_moves(groups: tuple[ChannelGroup, ...], ratio: Ratio, alignment: Alignment, min_width: int) -> str:
    """Say which ratio would do: ratios are tried in steps of a hundredth, group by group."""
    steps = (step / 100 for step in range(1, 100))
    least = next(
        (s for s in steps if any(choose_width(g, s, alignment, min_width).kept < g.width for g in groups)), None
    )
    widest = max(groups, key=lambda group: group.width)
    advice = f"use ratio={least} or more" if least else "use a smaller alignment or min_width"
    return (
        f"ratio={ratio} removes nothing: none of {len(groups)} groups (the widest is {widest.name!r} with "
        f"{widest.width} units) can lose a unit under alignment {alignment.name!r} and min_width={min_width}; {advice}."
    )
