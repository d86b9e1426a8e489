"""Channels as what a session asks for, by a target of latency on a device."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.latency_target import LatencyAllocation
from torchshear.latency_target._budgets import solve_widths
from torchshear.latency_target._planner import (
    LatencyPlanner,
    MeasuredDense,
    MeasuredModel,
    target_share_of,
)
from torchshear.options import CalibrationOptions, PruneOptions
from torchshear.pruners._planning import RankedGroups
from torchshear.pruners.schedules import Schedule
from torchshear.pruners.selection._request import Request
from torchshear.speedup import LatencyComparison
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.speedup.latency._candidates import Candidates
from torchshear.training._channel_goal import ChannelGoal
from torchshear.training._goals import Choice, Indices, ratio_at
from torchshear.training._masked_model import MaskedModel

Inputs = tuple[tuple[Any, ...] | Tensor, Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True, eq=False)
class LatencyGoal(ChannelGoal):
    """Units of channel groups, by the time that they leave on a device.

    On the way there widths come from the table alone. At the event that asks for all of it, candidates are exported and
    measured, and the choice is corrected, as `torchshear.prune` does it; later events keep that correction.

    Attributes:
        inputs: example positional arguments, and those by keyword.
        table: the time of the model by widths.
        dense_ms: median time of the dense model.
        least_share: the least share of it that the table has for any widths.
        planners: the planner that measured; empty before.
    """

    inputs: Inputs
    table: LatencyTable
    dense_ms: float
    least_share: float
    planners: list[LatencyPlanner] = field(default_factory=list)

    @classmethod
    def measured(
        cls,
        model: nn.Module,
        groups: ChannelGroups,
        request: Request,
        is_soft: bool,
        inputs: Inputs,
        given: Device | LatencyTable,
    ) -> "LatencyGoal":
        """Measure the table of a model, if none is given, and its time.

        Raises:
            ArgumentError: the table is of another model or device, or the dense model is fast enough already.
            PlanError: the target cannot be reached; says the fastest possible.
            LatencyError: the model does not run.
        """
        assert request.target_latency is not None, "asked for"
        options = PruneOptions(request, (), CalibrationOptions(None), "auto", "none")
        with TemporaryDirectory(prefix="torchshear-") as folder:
            targets = (request.target_latency,)
            dense = MeasuredDense.of(options, targets, model, groups, *inputs, given, Path(folder))
        return cls(groups, request, is_soft, inputs, dense.table, dense.dense_ms, dense.least_share)

    @property
    def unit(self) -> str:
        """Latency."""
        return "latency"

    def _share(self, share: Schedule | None, position: int) -> float:
        return ratio_at(share, position, 1 - target_share_of(self.request.target_latency, self.dense_ms))

    def choose(
        self, share: Schedule | None, position: int, model: MaskedModel, statistics: Statistics | None, before: Choice
    ) -> Choice:
        """Choose widths by the table, and units by the criterion; units that went before go first."""
        asked = self._share(share, position)
        if not asked:
            return self._choice(before.kept, asked)
        gone = {name: np.setdiff1d(np.arange(self.groups[name].width), kept) for name, kept in before.kept.items()}
        gone = {name: units for name, units in gone.items() if units.size}
        weights = model.weights(is_masked=not self.is_soft)
        ranked = RankedGroups.of(self.groups, self.request, statistics, weights=weights, gone=gone)
        is_end = share is not None and share.passed(position) >= share.n_to_final
        if is_end and not self.planners:
            with TemporaryDirectory(prefix="torchshear-") as folder:
                dense = model.dense_copy()
                candidates = Candidates(dense, self.groups, *self.inputs, self.table.device, Path(folder))
                known = MeasuredModel(
                    self.groups, self.table, candidates, self.dense_ms, self.least_share, ranked, None
                )
                self.planners.append(LatencyPlanner.of(self.request, known))
            return self._choice(self.planners[0].plan().kept, asked)
        on_the_way = None if share is None or is_end else 1 - asked
        return self._choice(self._solve(ranked, on_the_way).kept, asked)

    def _solve(self, ranked: RankedGroups, on_the_way: float | None) -> PruningPlan:
        """Choose widths by the table.

        Args:
            ranked: the groups with their units.
            on_the_way: share of the dense model's time that is asked for before the end, where other targets do not
                hold yet; None for all that is asked for, as it was corrected by what was measured.
        """
        request, left = self.request, 1 - self.target
        if on_the_way is not None:
            request, left = replace(request, target_macs=None, target_params=None), on_the_way
        elif self.planners:
            left = self.planners[0].budget_share
        levels = ranked.levels()
        found = solve_widths(self.groups, self.table, levels, request, max(left, self.least_share))
        return ranked.plan(found.widths, {})

    def nearest(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose the heaviest units of each group; widths are those of the table with these sums as scores."""

        def given(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
            return squares[group.name]

        ranked = RankedGroups.of(self.groups, replace(self.request, criterion=given), None)
        kept = self._solve(ranked, None).kept
        found = {name: torch.zeros(len(one), dtype=torch.bool) for name, one in squares.items()}
        for name, stays in found.items():
            stays[torch.from_numpy(np.array(kept.get(name, np.arange(len(stays)))))] = True
        return found

    def _choice(self, kept: Mapping[str, Indices], asked: float) -> Choice:
        """The choice of some units; what is reached is by the table."""
        choice = ChannelGoal._choice(self, kept, asked)
        return replace(choice, reached=1 - self.table.predict_ms(dict(choice.widths)) / self.table.dense_ms)

    def allocation(self, plan: PruningPlan, latency: LatencyComparison | None) -> LatencyAllocation | None:
        """Return how the widths were found; None if the event that measures did not come."""
        return self.planners[0].record(plan, latency) if self.planners else None
