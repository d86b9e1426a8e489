"""Plans for a target of latency: a table, an exact solver, and rounds of shrinking, measuring and correcting."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from torch import Tensor, nn

from torchshear.configs import ResolvedConfig
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.dependency.plans._cut import dense_cost
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, NotFasterError, PlanError
from torchshear.latency_target._budgets import budget_of
from torchshear.latency_target._record import LatencyAllocation, LatencyRound
from torchshear.options import LatencyOptions, Planner, PruneOptions
from torchshear.pruners._planning import RankedGroups
from torchshear.pruners.allocation._problem import CostBudget, Levels
from torchshear.pruners.allocation._solve import Solution, allocate, least_cost
from torchshear.pruners.selection._budget import Budget
from torchshear.pruners.selection._latency import parse_latency
from torchshear.pruners.selection._request import Request
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.speedup.latency._candidates import Candidates
from torchshear.speedup.latency._compare import LatencyComparison
from torchshear.speedup.latency._measure_table import input_identity, table_of
from torchshear.speedup.latency._table import check_table, share_at

ROUNDS: Final = 5
TOLERANCE: Final = 0.03  # share of the target by which the measured latency may be below it
_AIM = 1 - TOLERANCE / 2
_STEADY = 0.05  # distance of the quartiles of whole runs, as a share of their median, up to which these count
_ROUNDING = 1e-6  # of the solver
_RESULT_ROUNDS = 40


@dataclass(frozen=True, slots=True, eq=False)
class LatencyPlanner:
    """Makes plans of one model for a target of latency, with some groups left whole if that is asked for.

    Attributes:
        request: which units may go, and the target.
        groups: the analysed network.
        ranked: the groups that may shrink, with their units in the order in which they go.
        table: the time of the model by widths.
        target_share: latency that may be left, as a share of the dense model's.
        dense_ms: median time of the dense model.
        rounds: what was solved and measured.
        chosen: number of the round whose widths are taken.
        correction: measured by predicted latency there.
    """

    request: Request
    groups: ChannelGroups
    ranked: RankedGroups
    table: LatencyTable
    target_share: float
    dense_ms: float
    rounds: tuple[LatencyRound, ...]
    chosen: int
    correction: float

    @property
    def resolved(self) -> ResolvedConfig | None:
        """The shares of a config; none beside a target of latency."""
        return None

    @classmethod
    def of(
        cls,
        options: PruneOptions,
        model: nn.Module,
        groups: ChannelGroups,
        args: tuple[Any, ...] | Tensor,
        kwargs: Mapping[str, Any] | None,
        given: Device | LatencyTable,
    ) -> "LatencyPlanner":
        """Measure a table if none is given, check that the target can be reached, and find the widths for it.

        Raises:
            ArgumentError: the table is of another model or device, or the dense model is fast enough already.
            PlanError: the target cannot be reached; says the fastest possible, before data is run.
        """
        request = options.request
        if isinstance(given, LatencyTable):
            check_table(given, groups, input_identity(args, kwargs))
            table = given
        else:
            table = table_of(model, groups, args, kwargs, given, request.alignment)
        with TemporaryDirectory(prefix="torchshear-") as folder:
            candidates = Candidates(model, groups, args, kwargs, table.device, Path(folder))
            dense_ms = candidates.compare(candidates.dense)["dense"].median_ms
            share, asked_ms = parse_latency(request.target_latency)
            target_share = share if share is not None else (asked_ms or 0.0) / dense_ms
            if asked_ms is not None and target_share >= 1:
                raise ArgumentError(
                    f"target_latency={request.target_latency!r}: the dense model takes {dense_ms:.4g} ms here already, "
                    f"with {table.device.threads} threads and batch {table.device.batch}. Ask for less."
                )
            least = _check_reachable(groups, request, table, target_share, dense_ms)
            ranked = RankedGroups.of(groups, request, Planner.of(options, model, groups).statistics)
            start = cls(request, groups, ranked, table, target_share, dense_ms, (), 0, 1.0)
            return start._close_loop(candidates, least)

    def plan(self, whole: Collection[str] = ()) -> PruningPlan:
        """Choose the units that stay; with groups left whole, widths are solved again under the corrected budget.

        Raises:
            PlanError: the target cannot be reached with these groups whole.
        """
        if not whole:
            return self.ranked.plan(self.rounds[self.chosen].widths, self._said())
        ranked = self.ranked.leaving_whole(whole)
        budget_share = self.target_share * _AIM / self.correction
        return ranked.plan(self._solve(ranked.levels(), budget_share).widths, self._said())

    def record(self, plan: PruningPlan, latency: LatencyComparison | None) -> LatencyAllocation:
        """Return how the widths of the plan of the result were found; `latency` is that of the result itself."""
        widths = {group.name: len(group.kept) for group in plan.groups if group.name in self.rounds[self.chosen].widths}
        macs = float(WidthCost(self.groups)(np.array([len(group.kept) for group in plan.groups], np.int64)).macs)
        notes = list(self.table.notes)
        taken = self.rounds[self.chosen]
        share = max(taken.measured_share, 0.0 if latency is None else 1 / latency.speedup("pruned"))
        if share > self.target_share:
            notes.append(
                f"The target was missed: {share:.3f} of the dense model's time was measured, and "
                f"{self.target_share:.3f} asked for."
            )
        if widths != dict(taken.widths):
            notes.append("Groups left whole for the native form changed the widths after they were measured.")
        return LatencyAllocation(
            device=self.table.device,
            target_share=self.target_share,
            dense_ms=self.dense_ms,
            widths=widths,
            rounds=self.rounds,
            chosen=self.chosen,
            macs_share=macs / max(dense_cost(self.groups.graph).macs, 1),
            table_errors=self.table.errors,
            notes=tuple(notes),
        )

    def _said(self) -> dict[str, Any]:
        return {"device": asdict(self.table.device)}

    def _close_loop(self, candidates: Candidates, least: float) -> "LatencyPlanner":
        """Solve, shrink, measure, and correct the budget by what was measured, until the target is met closely.

        Args:
            candidates: measures widths.
            least: the least share that the table has for any widths.
        """
        levels, rounds = self.ranked.levels(), list[LatencyRound]()
        budget_share = self.target_share * _AIM
        for _ in range(ROUNDS):
            found = self._solve(levels, max(budget_share, least))
            if any(one.widths == found.widths for one in rounds):
                if budget_share <= least:
                    break
                budget_share *= 1 - TOLERANCE / 2  # the same again; a little less gives others, if there are any
                continue
            path = candidates.export_plan(self.ranked.plan(found.widths, self._said()), "candidate")
            share, is_quiet = _measured_share(candidates, path)
            predicted = self.table.predict_ms(found.widths) / self.table.dense_ms
            rounds.append(
                LatencyRound(dict(found.widths), found.loss, found.bound, found.seconds, predicted, share, is_quiet)
            )
            if self.target_share * (1 - TOLERANCE) <= share <= self.target_share:
                break
            budget_share = self.target_share * _AIM * predicted / share
        chosen = _choose(rounds, self.target_share)
        correction = rounds[chosen].measured_share / rounds[chosen].predicted_share
        return replace(self, rounds=tuple(rounds), chosen=chosen, correction=correction)

    def _solve(self, levels: list[Levels], budget_share: float) -> Solution:
        """Choose widths within a share of the dense model's time, and within the other budgets of the request."""
        budgets = [_latency_budget(self.groups, levels, self.table, budget_share)]
        return allocate(levels, [*budgets, *_other_budgets(self.groups, levels, self.request)])


def measured_speed(
    model: nn.Module,
    small: nn.Module,
    groups: ChannelGroups,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None,
    options: LatencyOptions,
) -> LatencyComparison | None:
    """Export a model and what was made of it, and measure both, as "dense" and "pruned"; None if that is not asked for.

    Raises:
        NotFasterError: the result is not measurably faster, and must be.
    """
    if options.device is None:
        return None
    with TemporaryDirectory(prefix="torchshear-") as folder:
        candidates = Candidates(model, groups, args, kwargs, options.device, Path(folder))
        comparison = candidates.compare(candidates.export(small, "pruned"), _RESULT_ROUNDS)
    if options.must_be_faster and not comparison.is_faster("pruned"):
        low, high = comparison.speedup_interval("pruned")
        raise NotFasterError(
            f"the pruned model is not measurably faster: its speed-up over the dense one is "
            f"{comparison.speedup('pruned'):.2f} ({low:.2f} to {high:.2f}). Let more go, align widths to what the "
            f"device runs well (align='auto'), or accept it with must_be_faster=False."
        )
    return comparison


def _check_reachable(
    groups: ChannelGroups, request: Request, table: LatencyTable, target_share: float, dense_ms: float
) -> float:
    """Return the least share that is possible; raise PlanError if the target is below it, before anything is scored."""
    levels = RankedGroups.of(groups, request, None, with_scores=False).levels()
    least = least_cost(levels, _latency_budget(groups, levels, table, target_share)) / table.dense_ms
    if least > target_share * (1 + _ROUNDING):
        raise PlanError(
            f"target_latency={request.target_latency!r} is {target_share:.3g} of the dense model's "
            f"{dense_ms:.4g} ms; the fastest possible is {least:.3g}, {least * dense_ms:.4g} ms, with "
            f"{len(levels)} groups that may shrink. Ask for less, or let more groups shrink further."
        )
    return least * (1 + _ROUNDING)


def _latency_budget(
    groups: ChannelGroups, levels: list[Levels], table: LatencyTable, budget_share: float
) -> CostBudget:
    def share(number: int, width: int) -> float:
        return share_at(table, table.groups[number], width)

    return budget_of("latency_ms", budget_share * table.dense_ms, table.form, groups, levels, share)


def _other_budgets(groups: ChannelGroups, levels: list[Levels], request: Request) -> list[CostBudget]:
    """Return budgets of operations and parameters, where the request has them."""
    if not request.has_budget:
        return []

    def share(number: int, width: int) -> float:
        return float(width / groups[number].width)

    budget = Budget.of(dense_cost(groups.graph), request.target_macs, request.target_params)
    n_params, macs = WidthCost(groups).forms()
    asked = [("macs", budget.macs, macs), ("n_params", budget.n_params, n_params)]
    return [budget_of(name, limit, form, groups, levels, share) for name, limit, form in asked if limit is not None]


def _measured_share(candidates: Candidates, path: Path) -> tuple[float, bool]:
    """Return the time of a candidate as a share of the dense model's, and whether whole runs were steady enough."""
    comparison = candidates.compare(path)
    if all(result.iqr_ms / result.median_ms <= _STEADY for result in comparison.results.values()):
        return 1 / comparison.speedup("pruned"), True
    dense, pruned = (candidates.profile(one).total_ms for one in (candidates.dense, path))
    return pruned / dense, False


def _choose(rounds: list[LatencyRound], target_share: float) -> int:
    """Return the round that loses least among those that meet the target closely; the fastest if none meets it."""
    met = [number for number, one in enumerate(rounds) if one.measured_share <= target_share]
    close = [number for number in met if rounds[number].measured_share >= target_share * (1 - TOLERANCE)]
    if met:
        return min(close or met, key=lambda number: rounds[number].loss)
    return min(range(len(rounds)), key=lambda number: rounds[number].measured_share)
