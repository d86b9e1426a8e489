"""Selection of the units that stay: in each group by its own share, or in pools until a share or a budget is met."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.calibration._weight_source import WeightSource, weights_to_score
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.groups._groups import check_groups
from torchshear.dependency.plans._cut import Cut, dense_cost
from torchshear.errors import ArgumentError, PlanError
from torchshear.graph import Cost
from torchshear.pruners.criteria._criterion import (
    Criterion,
    UnscorableError,
    find_criterion,
    is_comparable,
    is_per_cost,
    rearrangement_of,
)
from torchshear.pruners.selection._budget import TARGETS, Budget, BudgetSolver, check_feasible, solve_exactly
from torchshear.pruners.selection._pools import WidthSteps, isomorphism_classes, rank, take_share
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._scoring import group_scores
from torchshear.pruners.selection._targets import FOR_ITS_CLASS, choose_targets, default_max_ratio, limits_of
from torchshear.pruners.selection._widths import (
    Limits,
    NothingToRemoveError,
    Width,
    allowed_widths,
    choose_width,
    n_removed,
)

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SelectedUnits:
    """Result of a selection.

    Attributes:
        kept: name of a group that shrinks -> the units that stay.
        notes: name of a group -> why it stays whole, or has another width than its ratio gives.
        ratios: name of a group -> the ratio that was asked for.
    """

    kept: Mapping[str, Indices]
    notes: Mapping[str, str]
    ratios: Mapping[str, float] = field(default_factory=dict)


class UnitSelector:
    """Selects the units that stay in one network by one request; for arguments see `plan_units`."""

    def __init__(
        self,
        groups: ChannelGroups,
        request: Request,
        weights: WeightSource,
        statistics: Statistics | None,
        whole: Collection[str] = (),
        gone: Mapping[str, Indices] = MappingProxyType({}),
    ) -> None:
        check_groups(groups)
        if torch.get_default_device().type == "meta":
            raise ArgumentError("torch's default device is meta, where nothing has values; plan outside of it.")
        self.groups = groups
        self.request = request
        self.criterion: Criterion = find_criterion(request.criterion)
        self.targets = choose_targets(groups, request.shares, request.roles, request.exclude)
        self.targets |= dict.fromkeys(whole, FOR_ITS_CLASS)
        self.ratios = {name: target.ratio for name, target in self.targets.items() if target.ratio is not None}
        self.limits = limits_of(groups, request, self.targets)
        self.gone = gone
        for name, units in gone.items():
            least = max(self.limits[name].min_ratio, len(units) / groups[name].width)
            self.limits[name] = replace(self.limits[name], min_ratio=least)
        self.statistics = statistics
        self.weights = weights
        self.unscored: dict[str, str] = {}
        self.is_by_latency = request.target_latency is not None
        self.is_by_ratio = request.pooling == "local" and not request.has_budget and not self.is_by_latency

    def choose(self) -> SelectedUnits:
        """Select the units that stay in each group."""
        if not self.is_by_ratio:
            return self._select_by_pools()
        # Each group loses its share, rounded to the nearest width that it may have.
        widths = self._widths()
        shrinking = [group for group in self.groups if widths[group.name].kept < group.width]
        scores = self._scores(shrinking)
        kept = {}
        for group in shrinking:
            if group.name in scores:
                chosen = choose_units(group, scores[group.name], widths[group.name].kept)
                kept[group.name] = self._rearranged(group, chosen)
        notes = {name: width.note for name, width in widths.items() if width.note} | self.unscored
        return SelectedUnits(kept, notes, self.ratios)

    def check(self) -> None:
        """Raise what makes the request impossible whatever the scores, before anything is scored or run."""
        if self.is_by_ratio:
            self._widths()
        elif self.is_by_latency:
            width_steps, dense = self.width_steps(), dense_cost(self.groups.graph)
            self._check_reachable(width_steps, Budget.of(dense, self.request), dense)
        else:
            self._check_reachable(self.width_steps(), *self._budget())

    def rank(self) -> list[WidthSteps]:
        """Score the groups that may shrink, and put the units of each into the order in which they go."""
        width_steps = self.width_steps()
        scores = self._scores([one.group for one in width_steps])
        return [
            replace(one, order=removal_order(one.group, found), scores=found)
            for one in width_steps
            if (found := scores.get(one.group.name)) is not None
        ]

    def keep_widths(self, width_steps: Sequence[WidthSteps], widths: Mapping[str, int]) -> SelectedUnits:
        """Keep as many units of ranked groups as widths say."""
        taken = np.array([list(one.widths).index(widths[one.group.name]) for one in width_steps], np.int64)
        return SelectedUnits(self._kept_units(width_steps, taken), self._whole_notes() | self.unscored)

    def _whole_notes(self) -> dict[str, str]:
        """Return why groups stay whole, by name."""
        notes = {name: f"stays whole: {target.reason}" for name, target in self.targets.items() if target.reason}
        return notes | {group.name: group.reason for group in self.groups if group.reason}

    def _widths(self) -> dict[str, Width]:
        """Return the number of units that stay, by group.

        Raises:
            ArgumentError: no group can lose a unit.
        """
        widths: dict[str, Width] = {}
        for group in self.groups:
            target = self.targets[group.name]
            if target.ratio is None:
                widths[group.name] = Width(group.width, f"stays whole: {target.reason}")
            else:
                limits = self.limits[group.name]
                widths[group.name] = choose_width(group, target.ratio, self.request.alignment, limits)
        chosen = tuple(group for group in self.groups.prunable if self.targets[group.name].ratio)
        if chosen and not any(widths[group.name].kept < group.width for group in self.groups):
            raise NothingToRemoveError(_explain_no_removal(chosen, self.request, self.limits))
        return widths

    def _select_by_pools(self) -> SelectedUnits:
        """Remove units in the order of their pools, until a share of each pool has gone or a budget is met."""
        width_steps = self.width_steps()
        budget, dense = self._budget()
        self._check_reachable(width_steps, budget, dense)
        notes = self._whole_notes()
        if not width_steps:
            return SelectedUnits({}, notes, self.ratios)
        scores = self._scores([one.group for one in width_steps])
        costs = self._unit_costs(width_steps, budget)
        is_local = (
            self.request.pooling == "local"
        )  # a group's share of units gone ranks its steps, and not their scores
        width_steps = [
            replace(
                one, order=removal_order(one.group, found), scores=None if is_local else found / costs[one.group.name]
            )
            for one in width_steps
            if (found := scores.get(one.group.name)) is not None
        ]
        if self.unscored:
            self._check_reachable(width_steps, budget, dense)
        normalize = self.request.normalize
        steps = rank(width_steps, normalize == "mean" or (normalize == "auto" and not is_comparable(self.criterion)))
        if budget is None:
            taken = take_share(steps, self._n_to_remove(width_steps), len(width_steps))
        else:
            solver = BudgetSolver(self.groups, width_steps)
            taken = solve_exactly(
                lambda tight: solver.solve(steps, tight),
                lambda taken: Cut(self.groups, self._kept_units(width_steps, taken)).cost(),
                budget,
            )
        if not taken.any():
            raise NothingToRemoveError(
                _explain_no_removal(tuple(one.group for one in width_steps), self.request, self.limits)
            )
        kept = self._kept_units(width_steps, taken)
        return SelectedUnits(kept, notes | self.unscored, {} if budget else self.ratios)

    def width_steps(self) -> list[WidthSteps]:
        """Return the steps of each group that may shrink, from its own width down."""
        chosen = [group for group in self.groups.prunable if self.targets[group.name].ratio]
        classes = isomorphism_classes(self.groups) if self.request.pooling == "isomorphic" else {}
        width_steps = []
        for group in chosen:
            target = self.targets[group.name]
            allowed = allowed_widths(group, self.request.alignment, self.limits[group.name])[::-1]
            is_forced = allowed[0] < group.width
            widths = np.concatenate([[group.width], allowed]) if is_forced else allowed
            own = {"local": group.name, "global": "", "isomorphic": classes.get(group.name, "")}[self.request.pooling]
            pool = f"{target.key}|{own}"
            width_steps.append(WidthSteps(group, widths, n_forced=int(is_forced), pool=pool, speed=target.ratio or 1.0))
        return width_steps

    def _budget(self) -> tuple[Budget | None, Cost]:
        dense = dense_cost(self.groups.graph)
        if not self.request.has_budget:
            return None, dense
        budget = Budget.of(dense, self.request)
        if budget.holds(dense):
            asked = " and ".join(f"{TARGETS[name]}={getattr(self.request, TARGETS[name])}" for name in budget.limits)
            size = f" and {budget.file.dense_bytes:,} bytes" if "size_bytes" in budget.limits else ""
            raise NothingToRemoveError(
                f"{asked}: the dense model keeps within it already, with {dense.macs:,} MACs, {dense.n_params:,} "
                f"parameters{size}. Ask for less."
            )
        return budget, dense

    def _unit_costs(self, width_steps: Sequence[WidthSteps], budget: Budget | None) -> dict[str, float]:
        """Return what scores are divided by, for each group: what a unit costs, if the criterion is weighed by that."""
        names = [one.group.name for one in width_steps]
        if budget is None or not is_per_cost(self.criterion):
            return dict.fromkeys(names, 1.0)
        found = BudgetSolver(self.groups, width_steps).unit_costs(budget)
        least = found[found > 0].min(initial=1.0)  # a unit that saves nothing goes last
        return dict(zip(names, np.where(found > 0, found, least * 1e-3).tolist(), strict=True))

    def _check_reachable(self, width_steps: Sequence[WidthSteps], budget: Budget | None, dense: Cost) -> None:
        """Raise PlanError, with the best that is possible, where the limits forbid the ratio or target."""
        request = self.request
        most = request.max_ratio if request.max_ratio is not None else default_max_ratio(request)
        limits = f"min_width={request.min_width}, alignment {request.alignment.name!r}"
        limits += "" if most is None else f", max_ratio={most}"
        n_whole = sum(1 for target in self.targets.values() if target.reason) + len(self.unscored)
        limits += f" and {n_whole} groups that stay whole" if n_whole else ""
        if budget is not None:
            check_feasible(BudgetSolver(self.groups, width_steps), budget, dense, limits)
            return
        for pool, room in self._n_to_remove(width_steps).items():
            here = [one for one in width_steps if one.pool == pool]
            total = sum(one.group.width for one in here)
            most = sum(one.most for one in here)
            forced = sum(int(one.widths[0] - one.widths[one.n_forced]) for one in here)
            if forced > room:
                raise PlanError(
                    f"ratio={here[0].speed} removes {room} of {total} units of {len(here)} groups that are ranked "
                    f"together, but min_ratio takes {forced} of them. Raise the ratio, or lower min_ratio."
                )
            if most < room:
                raise PlanError(
                    f"ratio={here[0].speed} is to remove {room} of {total} units of {len(here)} groups that are ranked "
                    f"together; at most {most} can go ({most / total:.1%}), under {limits}. Ask for less, or "
                    f"loosen a limit."
                )

    def _n_to_remove(self, width_steps: Sequence[WidthSteps]) -> dict[str, int]:
        """Return the number of units to remove, by pool."""
        totals: dict[str, int] = {}
        for one in width_steps:
            totals[one.pool] = totals.get(one.pool, 0) + one.group.width
        speeds = {one.pool: one.speed for one in width_steps}
        return {pool: n_removed(total, speeds[pool]) for pool, total in totals.items()}

    def _kept_units(self, width_steps: Sequence[WidthSteps], taken: Indices) -> dict[str, Indices]:
        """Return the units that stay after some steps of each group, for the groups that lose any."""
        kept = {}
        for one, n in zip(width_steps, taken, strict=True):
            if n:
                assert one.order is not None
                chosen = np.sort(one.order[one.group.width - one.widths[n] :])
                kept[one.group.name] = self._rearranged(one.group, chosen)
        return kept

    def _rearranged(self, group: ChannelGroup, chosen: Indices) -> Indices:
        """Return units after the criterion's own exchange, but for one that would bring back what is gone."""
        found = rearranged_units(group, chosen, self.criterion, self.statistics)
        return chosen if np.isin(self.gone.get(group.name, ()), found).any() else found

    def _scores(self, shrinking: Sequence[ChannelGroup]) -> dict[str, Floats]:
        """Score groups by name; a group that the criterion cannot score is noted, and stays whole."""
        known, own = self.statistics, self.groups.graph.fingerprint
        if known is not None and not isinstance(known, Statistics):
            raise ArgumentError(f"statistics is {type(known).__name__}; expected what torchshear.collect gives.")
        if known is not None and known.fingerprint != own:
            raise ArgumentError(
                f"the statistics are of a network with graph {known.fingerprint[:12]}, the groups of one with "
                f"{own[:12]}. Collect them with the network that is planned."
            )
        tensors: Mapping[str, Tensor] = weights_to_score(self.groups, self.weights)
        scores: dict[str, Floats] = {}
        for group in shrinking:
            try:
                scores[group.name] = group_scores(
                    group, self.criterion, tensors, self.statistics, self.request.group_reduction
                )
            except UnscorableError as error:
                self.unscored[group.name] = f"stays whole: {error}"
                continue
            if group.name in self.gone:
                scores[group.name][self.gone[group.name]] = -np.inf
        if self.unscored and not scores:
            raise ArgumentError(
                f"the criterion cannot score any of {len(self.unscored)} groups: {next(iter(self.unscored.values()))}."
            )
        return scores


def _explain_no_removal(groups: tuple[ChannelGroup, ...], request: Request, limits: Mapping[str, Limits]) -> str:
    """Return an error that names the smallest ratio which removes a unit, tried in steps of a hundredth."""
    alignment = request.alignment
    steps = (step / 100 for step in range(1, 100))
    smallest = next(
        (s for s in steps if any(choose_width(g, s, alignment, limits[g.name]).kept < g.width for g in groups)), None
    )
    widest = max(groups, key=lambda group: group.width)
    advice = f"use ratio={smallest} or more" if smallest else "use a smaller alignment or min_width"
    return (
        f"ratio={request.shares} removes nothing: none of {len(groups)} groups (the widest is {widest.name!r} with "
        f"{widest.width} units) can lose a unit under alignment {alignment.name!r} and min_width={request.min_width}; "
        f"{advice}."
    )


def choose_units(group: ChannelGroup, scores: npt.NDArray[np.float64], kept: int) -> Indices:
    """The units that stay: exactly `kept` of them, those with the highest scores.

    Among equal scores the later unit goes first. In a balanced group each block loses equally many.

    Args:
        group: the group; C = group.width units.
        scores: shape (C,), bigger = keep.
        kept: number of units to keep; C - kept is a multiple of the number of blocks.

    Returns:
        Indices of the units that stay, ascending, shape (kept,).
    """
    return np.sort(removal_order(group, scores)[group.width - kept :])


def rearranged_units(
    group: ChannelGroup, kept: Indices, criterion: Criterion, statistics: Statistics | None
) -> Indices:
    """The units that stay after a criterion has exchanged some of those that its scores chose.

    Args:
        group: the group.
        kept: units chosen by scores, ascending.
        criterion: the criterion; most exchange none.
        statistics: what was seen on data.

    Raises:
        ArgumentError: it gave other than as many units of each block.
    """
    rearrange = rearrangement_of(criterion)
    if rearrange is None:
        return kept
    given = np.sort(np.asarray(rearrange(group, kept.copy(), statistics)).reshape(-1))
    is_choice = given.dtype.kind in "iu" and len(np.unique(given)) == len(given) == len(kept)
    if (
        not is_choice
        or not np.isin(given, np.arange(group.width)).all()
        or _shares(group, given) != _shares(group, kept)
    ):
        raise ArgumentError(
            f"the criterion rearranged the units of group {group.name!r} to {given.tolist()[:8]}; expected "
            f"{len(kept)} different ones below {group.width}, of each block as many as it was given."
        )
    return given.astype(np.int64)


def _shares(group: ChannelGroup, units: Indices) -> list[int]:
    """Count units by balanced block."""
    blocks = np.zeros(group.width, np.int64) if group.balance is None else group.balance
    return [int(count) for count in np.bincount(blocks[units], minlength=group.n_blocks)]


def removal_order(group: ChannelGroup, scores: npt.NDArray[np.float64], left: Indices | None = None) -> Indices:
    """Units in the order in which they go: by score, of balanced blocks one of each in turn.

    Args:
        group: the group; C = group.width units.
        scores: shape (C,), bigger = keep.
        left: units that are left, ascending; None for all.

    Returns:
        All units that are left, in order.
    """
    units = np.arange(group.width) if left is None else left
    blocks = np.zeros(len(units), np.int64) if group.balance is None else group.balance[units]
    order = np.lexsort((-units, scores[units], blocks))
    starts = np.concatenate([[0], np.cumsum(np.bincount(blocks))[:-1]])
    rank = np.arange(len(units)) - starts[blocks[order]]
    return units[order[np.argsort(rank, kind="stable")]]
