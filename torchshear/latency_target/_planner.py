"""Plans for a target of latency: a table, an exact solver, and rounds of shrinking, measuring and correcting."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from torch import Tensor, nn

from torchshear.configs import ResolvedConfig
from torchshear.configs._beside_options import pool_budgets, reasons_to_stay
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.dependency.plans._cut import dense_cost
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, NotFasterError, PlanError
from torchshear.latency_target._budgets import latency_budget, solve_widths
from torchshear.latency_target._record import LatencyAllocation, LatencyRound
from torchshear.options import LatencyOptions, Planner, PruneOptions
from torchshear.pruners._planning import RankedGroups
from torchshear.pruners.allocation._problem import Levels
from torchshear.pruners.allocation._solve import Solution, least_cost
from torchshear.pruners.selection._latency import parse_latency
from torchshear.pruners.selection._request import Request
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.speedup.latency._candidates import Candidates
from torchshear.speedup.latency._comparison import LatencyComparison
from torchshear.speedup.latency._measure_table import input_identity, table_of
from torchshear.speedup.latency._table import check_table

ROUNDS: Final = 5
_SOLUTIONS: Final = 10  # how often widths are solved for in these rounds; those found again are not measured again
TOLERANCE: Final = 0.03  # share of the target by which the measured latency may be below it
_AIM = 1 - TOLERANCE / 2
_MARGIN = TOLERANCE / 4  # largest share by which a measured latency keeps off the ends of that range
_ROUNDING = 1e-6  # of the solver
RESULT_ROUNDS: Final = 40


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredDense:
    """A dense model as it was measured, before anything is scored.

    Attributes:
        table: the time of the model by widths.
        candidates: the dense model, ready for the device, by which others are measured.
        dense_ms: median time of the dense model.
        least_share: the least share of the dense model's time that the table has for any widths.
    """

    table: LatencyTable
    candidates: Candidates
    dense_ms: float
    least_share: float

    @classmethod
    def of(
        cls,
        options: PruneOptions,
        targets: Sequence[float | str],
        model: nn.Module,
        groups: ChannelGroups,
        args: tuple[Any, ...] | Tensor,
        kwargs: Mapping[str, Any] | None,
        given: Device | LatencyTable,
        folder: Path,
    ) -> "MeasuredDense":
        """Measure a table if none is given, and the dense model, and check that all targets can be reached.

        Args:
            options: what is asked for, beside the targets.
            targets: latencies that may be left.
            model: the model.
            groups: the analysed network.
            args: example positional arguments.
            kwargs: example keyword arguments.
            given: the device, or a table that was measured on one.
            folder: where files go; it must stay as long as anything is measured.

        Raises:
            ArgumentError: the table is of another model or device, or the dense model is fast enough already.
            PlanError: a target cannot be reached; says the fastest possible.
        """
        if isinstance(given, LatencyTable):
            check_table(given, groups, input_identity(args, kwargs))
            table = given
        else:
            alignment, progress = options.request.alignment, options.calibration.progress
            table = table_of(model, groups, args, kwargs, given, alignment, progress=progress)
        candidates = Candidates(model, groups, args, kwargs, table.device, folder)
        dense_ms = candidates.compare(candidates.dense)["dense"].median_ms
        return cls(table, candidates, dense_ms, _check_reachable(groups, options, table, targets, dense_ms))


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredModel:
    """A model with its table, its dense time and its ranked units: what plans for any targets of latency share.

    Attributes:
        groups: the analysed network.
        table: the time of the model by widths.
        candidates: the dense model, ready for the device, by which others are measured.
        dense_ms: median time of the dense model.
        least_share: the least share of the dense model's time that the table has for any widths.
        ranked: the groups that may shrink, with their units in the order in which they go.
        resolved: the config that bounds what they lose; None without one.
    """

    groups: ChannelGroups
    table: LatencyTable
    candidates: Candidates
    dense_ms: float
    least_share: float
    ranked: RankedGroups
    resolved: ResolvedConfig | None

    @classmethod
    def of(cls, options: PruneOptions, groups: ChannelGroups, dense: MeasuredDense) -> "MeasuredModel":
        """Score the units of a model that was measured; runs data if a criterion looks at any.

        Args:
            options: what is asked for, beside the targets.
            groups: the analysed network.
            dense: the model as it was measured.
        """
        resolved, statistics = options.resolved, Planner.of(options, groups).statistics
        reasons = {} if resolved is None else reasons_to_stay(resolved, groups)
        ranked = RankedGroups.of(groups, options.request, statistics, reasons=reasons)
        return cls(groups, dense.table, dense.candidates, dense.dense_ms, dense.least_share, ranked, resolved)

    def solve(self, levels: list[Levels], request: Request, budget_share: float) -> Solution:
        """Choose widths within a share of the dense model's time, and within the other budgets of a request."""
        return solve_widths(self.groups, self.table, levels, request, budget_share, self.resolved)


@dataclass(frozen=True, slots=True, eq=False)
class LatencyPlanner:
    """Makes plans of one model for a target of latency, with some groups left whole if that is asked for.

    Attributes:
        request: which units may go, and the target.
        measured: the model.
        ranked: its ranked groups, as this request has them.
        target_share: latency that may be left, as a share of the dense model's.
        rounds: what was solved and measured.
        chosen: number of the round whose widths are taken.
        correction: measured by predicted latency there.
    """

    request: Request
    measured: MeasuredModel
    ranked: RankedGroups
    target_share: float
    rounds: tuple[LatencyRound, ...]
    chosen: int
    correction: float

    @property
    def resolved(self) -> ResolvedConfig | None:
        """The shares of a config, which are the most that may go; None without one."""
        return self.measured.resolved

    @property
    def budget_share(self) -> float:
        """Share of the dense model's time that other widths may have by the table, as it was corrected."""
        return self.target_share * _AIM / self.correction

    @classmethod
    def of(cls, request: Request, measured: MeasuredModel, correction: float = 1.0) -> "LatencyPlanner":
        """Find the widths for a target: solve, shrink, measure, and correct the budget until it is met closely.

        Args:
            request: which units may go, and the target.
            measured: the model.
            correction: measured by predicted latency, as far as it is known.
        """
        ranked = measured.ranked.by_request(request)
        share = target_share_of(request.target_latency, measured.dense_ms)
        levels, rounds, least = ranked.levels(), list[LatencyRound](), measured.least_share
        budget_share, below, above = share * _AIM / correction, (0.0, 0.0), (float("inf"), 0.0)
        for _ in range(_SOLUTIONS):
            found = measured.solve(levels, request, max(budget_share, least))
            known = next((one for one in rounds if one.widths == found.widths), None)
            if known is not None and budget_share <= least:
                break
            now = known or _measure_round(measured, ranked, found)
            if known is None:
                rounds.append(now)
            if len(rounds) == ROUNDS or _is_close(now, share):
                break
            if now.measured_share <= share * _AIM:
                below = max(below, (budget_share, now.measured_share))
            else:
                above = min(above, (budget_share, now.measured_share))
            scaled = share * _AIM * now.predicted_share / now.measured_share
            budget_share = _next_budget(below, above, share * _AIM, scaled if known is None else 0.0)
        chosen = _choose(rounds, share)
        correction = rounds[chosen].measured_share / rounds[chosen].predicted_share
        return cls(request, measured, ranked, share, tuple(rounds), chosen, correction)

    def plan(self, whole: Collection[str] = ()) -> PruningPlan:
        """Choose the units that stay; with groups left whole, widths are solved again under the corrected budget.

        Raises:
            PlanError: the target cannot be reached with these groups whole.
        """
        if not whole:
            return self.ranked.plan(self.rounds[self.chosen].widths, _said(self.measured))
        ranked = self.ranked.leaving_whole(whole)
        found = self.measured.solve(ranked.levels(), self.request, self.budget_share)
        return ranked.plan(found.widths, _said(self.measured))

    def record(self, plan: PruningPlan, latency: LatencyComparison | None) -> LatencyAllocation:
        """Return how the widths of the plan of the result were found; `latency` is that of the result itself."""
        widths = {group.name: len(group.kept) for group in plan.groups if group.name in self.rounds[self.chosen].widths}
        kept = np.array([len(group.kept) for group in plan.groups], np.int64)
        macs = float(WidthCost(self.measured.groups)(kept).macs)
        loss = {one.name: dict(zip(one.widths, one.losses, strict=True)) for one in self.ranked.levels()}
        notes = list(self.measured.table.notes)
        taken = self.rounds[self.chosen]
        share = max(taken.measured_share, 0.0 if latency is None else 1 / latency.speedup("pruned"))
        if taken.uncertainty > TOLERANCE / 2:
            notes.append(
                f"The machine is noisy: the standard error of the measured share is {taken.uncertainty:.1%} of it."
            )
        if share > self.target_share:
            notes.append(
                f"The target was missed: {share:.3f} of the dense model's time was measured, and "
                f"{self.target_share:.3f} asked for."
            )
        if widths != dict(taken.widths):
            notes.append("Groups left whole for the native form changed the widths after they were measured.")
        return LatencyAllocation(
            device=self.measured.table.device,
            target_share=self.target_share,
            dense_ms=self.measured.dense_ms,
            widths=widths,
            rounds=self.rounds,
            chosen=self.chosen,
            loss=sum(loss[name].get(width, 0.0) for name, width in widths.items()),  # of what is left whole, none
            macs_share=macs / max(dense_cost(self.measured.groups.graph).macs, 1),
            table_errors=self.measured.table.errors,
            notes=tuple(notes),
        )


def measured_speed(
    model: nn.Module,
    small: nn.Module,
    groups: ChannelGroups,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None,
    options: LatencyOptions,
    measured: MeasuredModel | None = None,
) -> LatencyComparison | None:
    """Measure a model and what was made of it, as "dense" and "pruned"; None if that is not asked for.

    Args:
        model: the model.
        small: what was made of it.
        groups: the analysed network.
        args: example positional arguments.
        kwargs: example keyword arguments.
        options: the device, and whether the result must be faster.
        measured: the dense model as it was measured, where it was already.

    Raises:
        NotFasterError: the result is not measurably faster, and must be.
    """
    if options.device is None:
        return None
    with ExitStack() as stack:
        if measured is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="torchshear-")))
            candidates = Candidates(model, groups, args, kwargs, options.device, folder)
        else:
            candidates = measured.candidates
        comparison = candidates.compare(candidates.prepare(small, "pruned"), RESULT_ROUNDS)
    if options.must_be_faster:
        check_faster(comparison, "pruned", "the pruned model")
    return comparison


def check_faster(comparison: LatencyComparison, name: str, what: str) -> None:
    """Raise NotFasterError for a model that is not measurably faster than the dense one.

    Args:
        comparison: the times.
        name: name of the model among them.
        what: the model in words.
    """
    if not comparison.is_faster(name):
        low, high = comparison.speedup_interval(name)
        raise NotFasterError(
            f"{what} is not measurably faster: its speed-up over the dense one is {comparison.speedup(name):.2f} "
            f"({low:.2f} to {high:.2f}). Let more go, align widths to what the device runs well (align='auto'), or "
            f"accept it with must_be_faster=False."
        )


def target_share_of(target: object, dense_ms: float) -> float:
    """Return a target of latency as a share of the dense model's time."""
    share, asked_ms = parse_latency(target)
    return share if share is not None else (asked_ms or 0.0) / dense_ms


def _said(measured: MeasuredModel) -> dict[str, Any]:
    config = {} if measured.resolved is None else {"config": measured.resolved.to_dict()}
    return {"device": dict(measured.table.device.identity())} | config


def _check_reachable(
    groups: ChannelGroups, options: PruneOptions, table: LatencyTable, targets: Sequence[float | str], dense_ms: float
) -> float:
    """Return the least share that is possible; refuse targets below it, or above the dense model's, before scoring.

    Raises:
        ArgumentError: the dense model takes no longer than a target already.
        PlanError: a target is below what is possible.
    """
    shares = {target: target_share_of(target, dense_ms) for target in targets}
    for target, share in shares.items():
        if share >= 1 and isinstance(target, str) and "ms" in target.lower():
            raise ArgumentError(
                f"target_latency={target!r}: the dense model takes {dense_ms:.4g} ms here already, "
                f"with {table.device.threads} threads and batch {table.device.batch}. Ask for less."
            )
    levels = RankedGroups.of(groups, options.request, None, with_scores=False).levels()
    resolved = options.resolved
    pools = [] if resolved is None else pool_budgets(resolved, groups, levels)
    least = least_cost(levels, latency_budget(groups, levels, table, 1.0), pools) / table.dense_ms
    labels = [] if resolved is None else sorted({resolved.targets[one.name].entry.label for one in levels})
    under = f" under {', '.join(labels)}" if labels else ""
    for target, share in shares.items():
        if least > share * (1 + _ROUNDING):
            raise PlanError(
                f"target_latency={target!r} is {share:.3g} of the dense model's {dense_ms:.4g} ms; the fastest "
                f"possible is {least:.3g}, {least * dense_ms:.4g} ms, with {len(levels)} groups that may shrink"
                f"{under}. Ask for less, or let more groups shrink further."
            )
    return least * (1 + _ROUNDING)


def _measure_round(measured: MeasuredModel, ranked: RankedGroups, found: Solution) -> LatencyRound:
    """Measure the model at the widths of a solution.

    Args:
        measured: the model.
        ranked: its ranked groups.
        found: the widths.
    """
    candidate = measured.candidates.prepare_plan(ranked.plan(found.widths, _said(measured)), "candidate")
    comparison = measured.candidates.compare(candidate)
    predicted = measured.table.predict_ms(found.widths) / measured.table.dense_ms
    times = (predicted, 1 / comparison.speedup("pruned"), comparison.uncertainty("pruned"))
    return LatencyRound(dict(found.widths), found.loss, found.bound, found.seconds, *times)


def _next_budget(below: tuple[float, float], above: tuple[float, float], wanted: float, scaled: float) -> float:
    """Return the budget to solve under next.

    Args:
        below: the largest budget that gave no more than is wanted, and the share that was measured; zeros if there is
            none yet.
        above: the smallest budget that gave more, and the share; infinite if there is none yet.
        wanted: the share to come to.
        scaled: the last budget, scaled by what was measured; it counts until there are both. Between them, the next is
            where a line gives the wanted share, but not close to either.
    """
    (low, less), (high, more) = below, above
    if low and high < float("inf"):
        place = (wanted - less) / max(more - less, _ROUNDING)
        return low + (high - low) * min(max(place, 0.2), 0.8)
    return scaled if low < scaled < high else low * 1.02 or high * 0.98


def _is_close(one: LatencyRound, target_share: float) -> bool:
    """Check that a round meets the target closely, and keeps off the ends by its standard error, or by 0.75 %."""
    margin = min(one.uncertainty, _MARGIN)
    least = target_share * (1 - TOLERANCE) * (1 + margin)
    return least <= one.measured_share <= target_share * (1 - margin)


def _choose(rounds: list[LatencyRound], target_share: float) -> int:
    """Return the round that loses least of those that keep off the ends; else the fastest of those between the ends.

    If there is none, it is the one that loses least of those that meet the target, or the fastest of all.
    """
    met = [number for number, one in enumerate(rounds) if one.measured_share <= target_share]
    close = [number for number in met if rounds[number].measured_share >= target_share * (1 - TOLERANCE)]
    certain = [number for number in close if _is_close(rounds[number], target_share)]
    if certain or (met and not close):
        return min(certain or met, key=lambda number: rounds[number].loss)
    return min(close or range(len(rounds)), key=lambda number: rounds[number].measured_share)
