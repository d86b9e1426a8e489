"""From a plan to a result: shrunk, proved, compensated, measured and reported."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from torchshear.compensation import Compensated, compensate_by
from torchshear.configs import ResolvedConfig
from torchshear.dependency.plans._form import FormKind
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.latency_target import LatencyAllocation
from torchshear.latency_target._planner import LatencyPlanner
from torchshear.options import Compensation, Planner, PruneOptions
from torchshear.pruners.schedules import History
from torchshear.report import FileSize, PruningReport, make_report
from torchshear.speedup import Fold, LatencyComparison, Refit, Shrunk, Verification, shrink_to_form
from torchshear.speedup.shrinking._whole_groups import NativeTradeoff

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class PruneResult:
    """Pruned model with its plan, its report and its proof.

    Attributes:
        model: the pruned model, really smaller.
        plan: what was kept, and what made the form of the model; can be saved and replayed on a fresh model.
        report: requested and achieved ratio, parameters and MACs before and after, group by group.
        verification: how closely the pruned model agrees with the masked one; None for a model on the meta device,
            which has no values to compare.
        form: "native", a copy of the original module; or "traced", the rewritten graphs. Where parts were pruned,
            "traced" if any of them is; `report.parts` has the form of each.
        fold: where the constants or means of removed channels went; None unless `compensate` is one of these. The
            verification is of the model before that, and `fold.max_error` of the model after it.
        config: what the config asks of each layer; None without one. `str()` of it is a table.
        compensation: what brought the model nearer to its original, after all that was proved: the word that was given
            as `compensate`.
        refit: the errors of all layers before and after, with `compensate="refit"`; else None.
        latency: times of the model that was given ("dense") and of the result ("pruned"), measured in the same rounds;
            None without a target of latency, unless a `device` is given or `must_be_faster`.
        allocation: how the widths for a target of latency were found; else None. `str()` of it is a summary.
        history: what was asked for and reached while the model trained; None without a `PruningSession`.
        file: sizes of the ONNX files of the model that was given and of the result; None without a target of size.
    """

    model: nn.Module
    plan: PruningPlan
    report: PruningReport
    verification: Verification | None
    form: str
    fold: Fold | None = None
    config: ResolvedConfig | None = None
    compensation: Compensation = "none"
    refit: Refit | None = None
    latency: LatencyComparison | None = None
    allocation: LatencyAllocation | None = None
    history: History | None = None
    file: FileSize | None = None

    def __repr__(self) -> str:
        proof = "not verified" if self.verification is None else f"max_error {self.verification.max_error:.2g}"
        return f"<PruneResult: {self.form} {type(self.model).__name__}, {self.report.changes}, {proof}>"


@dataclass(frozen=True, slots=True, eq=False)
class MadeModel:
    """A model that was planned, shrunk, proved and compensated, but not measured yet.

    Attributes:
        planner: made the plan.
        shrunk: the shrunk model with its proof.
        plan: the plan, with what made the form of the result.
        compensation: how the model was compensated.
        after: the compensated model.
        file: sizes of files; None without a target of size.
    """

    planner: Planner | LatencyPlanner
    shrunk: Shrunk
    plan: PruningPlan
    compensation: Compensation
    after: Compensated
    file: FileSize | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        options: PruneOptions,
        planner: Planner | LatencyPlanner,
        args: tuple[Any, ...] | Tensor,
        kwargs: Mapping[str, Any] | None,
    ) -> "MadeModel":
        """Carry out what a planner plans; raises what `prune` raises."""
        shrunk, plan = shrink_and_record(model, planner.plan(), args, kwargs, *options.form_of(planner))
        method = options.compensate
        after = compensate_by(method, model, shrunk.model, plan, options.calibration, args, kwargs)
        return cls(planner, shrunk, plan, method, after)

    def to_result(self, latency: LatencyComparison | None) -> PruneResult:
        """Add the times, as "dense" and "pruned", and the report."""
        shrunk, after = self.shrunk, self.after
        report = make_report(
            self.plan, f"{shrunk.form}: {shrunk.reason}", shrunk.parts, after.refit, latency, self.file
        )
        warn_of_speed(report)
        by_latency = self.planner if isinstance(self.planner, LatencyPlanner) else None
        return PruneResult(
            model=after.model,
            plan=self.plan,
            report=report,
            verification=shrunk.verification,
            form=shrunk.form,
            fold=after.fold,
            config=self.planner.resolved,
            compensation=self.compensation,
            refit=after.refit,
            latency=latency,
            allocation=None if by_latency is None else by_latency.record(self.plan, latency),
            file=self.file,
        )


def warn_of_speed(report: PruningReport) -> None:
    """Log a warning where a result is not known to be faster, though something shrank."""
    shrank = any(group.kept < group.width for group in report.groups)
    if report.speed is not None and not report.speed.is_faster and shrank:
        _logger.warning("the pruned model: %s", report.speed.text)


def shrink_planned(
    model: nn.Module, plan: PruningPlan, args: tuple[Any, ...] | Tensor, kwargs: Mapping[str, Any] | None
) -> PruneResult:
    """Shrink a model by a plan that was made elsewhere, prove the result and report on it.

    Raises:
        PlanError: the plan is not of this model.
        VerificationError: the shrunk model is not equal to the masked one.
    """
    shrunk, plan = shrink_and_record(model, plan, args, kwargs)
    report = make_report(plan, f"{shrunk.form}: {shrunk.reason}", shrunk.parts)
    return PruneResult(shrunk.model, plan, report, shrunk.verification, shrunk.form)


def shrink_and_record(
    model: nn.Module,
    made: PruningPlan,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None,
    form: FormKind | None = None,
    tradeoff: NativeTradeoff | None = None,
) -> tuple[Shrunk, PruningPlan]:
    """Shrink and prove, and write into the plan what made the form of the result."""
    shrunk = shrink_to_form(model, made, args, kwargs, form, tradeoff=tradeoff)
    return shrunk, replace(shrunk.plan, form=shrunk.made_by)
