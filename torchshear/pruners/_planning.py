"""From groups and a request to a plan."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchshear._arguments import check_kind
from torchshear.calibration import Statistics
from torchshear.calibration._weight_source import WeightSource
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.groups._groups import check_groups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.errors import PlanError, first_line
from torchshear.pruners.allocation._problem import Levels
from torchshear.pruners.selection._losses import levels_of
from torchshear.pruners.selection._pools import WidthSteps
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._unit_selector import UnitSelector

Indices = npt.NDArray[np.int64]


class WholeSelection(ABC):
    """Criterion that chooses the units of all groups itself, network-wide."""

    @abstractmethod
    def plan(
        self, groups: ChannelGroups, request: Request, weights: WeightSource, gone: Mapping[str, Indices]
    ) -> PruningPlan:
        """Plan what a request asks for.

        Args:
            groups: the analysed network.
            request: the target and limits.
            weights: what is looked at; None: the tensors of the model that was traced.
            gone: name of a group -> units that went before, which go in any case.
        """

    @abstractmethod
    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
        """Score the units of one group, as any criterion does."""


def plan_units(
    groups: ChannelGroups,
    request: Request,
    weights: WeightSource = None,
    statistics: Statistics | None = None,
    whole: Collection[str] = (),
    gone: Mapping[str, Indices] = MappingProxyType({}),
) -> PruningPlan:
    """Choose the units that stay, by scores and within limits; `torchshear.plan` says what can be asked.

    Args:
        groups: the analysed network.
        request: the ratio or targets, limits and criterion.
        weights: what criteria look at; None: the tensors of the model that was traced.
        statistics: what criteria that look at data need, from `torchshear.collect`.
        whole: names of groups that stay whole, whatever is asked, so that the model keeps its own class.
        gone: name of a group -> units that went before, which go in any case and first.

    Raises:
        ArgumentError: statistics are missing or of another network; the criterion has nothing to say of any group;
            unknown criterion; ratio so small that no group can lose a unit; a role, key or pattern that fits nothing.
        PlanError: the ratio or target cannot be reached under the limits.
        WeightError: weights cannot be scored, or are not those of the network.
        CheckpointError: `weights` names a checkpoint that cannot be read.
    """
    if isinstance(request.criterion, WholeSelection):
        return request.criterion.plan(groups, request, weights, gone)
    chosen = UnitSelector(groups, request, weights, statistics, whole, gone).choose()
    said = request.to_json() | statistics_notes(statistics)
    return make_plan(Cut(groups, chosen.kept), chosen.kept, said, chosen.notes, chosen.ratios)


@dataclass(frozen=True, slots=True, eq=False)
class RankedGroups:
    """Groups that may shrink, each with its units in the order in which they go.

    Attributes:
        selector: what chose and scored them.
        steps: the groups.
        reasons: name of a group that stays whole -> why, where the request alone does not tell.
    """

    selector: UnitSelector
    steps: tuple[WidthSteps, ...]
    reasons: Mapping[str, str]

    @classmethod
    def of(
        cls,
        groups: ChannelGroups,
        request: Request,
        statistics: Statistics | None,
        with_scores: bool = True,
        reasons: Mapping[str, str] = MappingProxyType({}),
        weights: WeightSource = None,
        gone: Mapping[str, Indices] = MappingProxyType({}),
    ) -> "RankedGroups":
        """Score units as `plan_units` does; without scores nothing is looked at but the widths that groups may have."""
        selector = UnitSelector(groups, request, weights, statistics, gone=gone)
        return cls(selector, tuple(selector.rank() if with_scores else selector.width_steps()), reasons)

    def leaving_whole(self, whole: Collection[str]) -> "RankedGroups":
        """Return the same with some groups whole, so that the model keeps its own class."""
        return self._with(self.selector.request, whole)

    def by_request(self, request: Request) -> "RankedGroups":
        """Return the same for a request that differs from the one that ranked them in its targets alone."""
        return self._with(request, ())

    def _with(self, request: Request, whole: Collection[str]) -> "RankedGroups":
        was = self.selector
        selector = UnitSelector(was.groups, request, was.weights, was.statistics, whole, was.gone)
        selector.unscored |= self.selector.unscored
        steps = tuple(steps for steps in self.steps if steps.group.name not in whole)
        return RankedGroups(selector, steps, self.reasons)

    def levels(self) -> list[Levels]:
        """Return the widths that each group may have, and what it loses at each."""
        return [levels_of(one, self.selector.criterion) for one in self.steps]

    def plan(self, widths: Mapping[str, int], said: Mapping[str, Any]) -> PruningPlan:
        """Make a plan that keeps the best units of each group, as many as widths say.

        Args:
            widths: name of a group -> its width; one for each group that may shrink.
            said: what the plan says of how the widths were chosen, beside the request.
        """
        selector = self.selector
        chosen = selector.keep_widths(self.steps, widths)
        request = selector.request.to_json() | statistics_notes(selector.statistics) | dict(said)
        return make_plan(Cut(selector.groups, chosen.kept), chosen.kept, request, {**chosen.notes, **self.reasons})


def statistics_notes(statistics: Statistics | None) -> dict[str, list[str]]:
    """Return the notes of statistics as a part of a plan's request; empty if there are none."""
    return {"statistics": list(statistics.notes)} if statistics is not None and statistics.notes else {}


def check_request(groups: ChannelGroups, request: Request) -> None:
    """Raise what `plan_units` raises of a request whatever the scores: before data is run, which may take long.

    Raises:
        ArgumentError: the ratio is so small that no group can lose a unit; a role, key or pattern fits nothing; the
            dense network keeps within the budget.
        PlanError: the ratio or target cannot be reached under the limits.
    """
    if isinstance(request.criterion, WholeSelection):
        request.criterion.plan(groups, request, None, {})
        return
    UnitSelector(groups, request, None, None).check()


def plan_from_kept(groups: ChannelGroups, kept: Mapping[str, Any]) -> PruningPlan:
    """Make a plan of units that were chosen elsewhere.

    Args:
        groups: the analysed network.
        kept: group name -> indices of the units that stay; groups not named keep everything.

    Returns:
        The plan, which can be applied and saved as any other.

    Raises:
        PlanError: a group is unknown, indices are out of range or repeated, a balance is violated, or a dimension would
            vanish.
    """
    check_groups(groups)
    check_kind("kept", kept, Mapping, "a mapping from groups to the units that stay")
    chosen = {name: _as_indices(name, indices) for name, indices in kept.items()}
    return make_plan(Cut(groups, chosen), chosen, {"kept": "given"}, {})


def _as_indices(name: str, indices: Any) -> Indices:
    try:
        array = np.asarray(indices.detach().cpu() if isinstance(indices, Tensor) else indices).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"kept units of group {name!r} are {type(indices).__name__}, which is no list of indices: "
            f"{first_line(error)}"
        ) from error
    if array.size and array.dtype.kind not in "iu":
        raise PlanError(f"kept units of group {name!r} have dtype {array.dtype}; expected integer indices.")
    return np.sort(array.astype(np.int64))
