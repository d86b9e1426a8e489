"""Pruning one model by one criterion after another, and scoring what comes out."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, nn

from torchshear._evaluation import Evaluate, score_model
from torchshear._making import shrink_and_record
from torchshear.calibration import Statistics
from torchshear.comparison._contenders import ComparedTarget, Contender
from torchshear.comparison._row import Row
from torchshear.compensation import compensate_by
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, DataError, TorchshearError, first_line
from torchshear.graph.model._copy import copy_model
from torchshear.options import CalibrationOptions, Compensation
from torchshear.pruners._planning import plan_units
from torchshear.pruners.selection._request import Request
from torchshear.report import make_report

_WHOLE: Final = "stays whole: "


@dataclass(slots=True)
class Trial:
    """One model, what was seen of it, and how it is scored."""

    model: nn.Module
    evaluate: Evaluate
    args: tuple[Any, ...] | Tensor
    kwargs: Mapping[str, Any] | None
    groups: ChannelGroups
    statistics: Statistics | None
    compensate: Compensation
    calibration: CalibrationOptions
    before: float = math.nan
    whole: dict[ComparedTarget, set[str]] = field(default_factory=dict)
    first_error: TorchshearError | None = None

    def score_dense(self) -> None:
        """Score a copy of the dense model."""
        self.before = score_model(self.evaluate, copy_model(self.model), "the dense model")
        if not math.isfinite(self.before):
            raise ArgumentError(f"evaluate gave {self.before} for the dense model; expected a finite number.")

    def row(self, one: Contender, budget: ComparedTarget, asked: Sequence[Request]) -> Row:
        """Prune by a contender, once for each of its criteria, and score what comes out."""
        row = Row(one.name, budget.text, one.is_control, self.before)
        if one.lacks:
            return _without(row, one.lacks)
        start = time.perf_counter()
        try:
            plans = [plan_units(self.groups, request, statistics=self.statistics) for request in asked]
            pairs = [shrink_and_record(self.model, plan, self.args, self.kwargs) for plan in plans]
            seconds = (time.perf_counter() - start) / len(asked)
            models = [shrunk.model for shrunk, _ in pairs]
            asked_for = [] if self.compensate == "none" else pairs
            compensated = [self._compensate(shrunk.model, made) for shrunk, made in asked_for]
        except DataError:  # no other criterion would do better
            raise
        except TorchshearError as error:
            self.first_error = self.first_error or error
            return _without(row, first_line(error))
        return self._score_models(row, budget, plans, (models, compensated), seconds)

    def _compensate(self, small: nn.Module, plan: PruningPlan) -> nn.Module:
        data = self.calibration
        return compensate_by(self.compensate, self.model, small, plan, data, self.args, self.kwargs).model

    def _score_models(
        self,
        row: Row,
        budget: ComparedTarget,
        plans: Sequence[PruningPlan],
        models: tuple[Sequence[nn.Module], Sequence[nn.Module]],
        seconds: float,
    ) -> Row:
        """Score models after the cut, and after the compensation where there is one."""
        what = f"the model pruned by {row.criterion}, {budget.text}"
        compensated = [score_model(self.evaluate, model, f"{what}, after {self.compensate}") for model in models[1]]
        scores = [score_model(self.evaluate, model, what) for model in models[0]]
        bad = [f"{score} after the cut" for score in scores if not math.isfinite(score)]
        bad += [f"{score} after {self.compensate}" for score in compensated if not math.isfinite(score)]
        if bad:
            return _without(row, f"evaluate gave {bad[0]}")
        reports = [make_report(plan) for plan in plans]
        return Row(
            row.criterion,
            row.budget,
            row.is_control,
            self.before,
            scores=tuple(scores),
            compensated=tuple(compensated),
            macs_share=_mean_share([(r.after.macs, r.before.macs) for r in reports]),
            params_share=_mean_share([(r.after.n_params, r.before.n_params) for r in reports]),
            seconds=seconds,
            note=self._note_unscored(budget, plans[0]).replace(f": {row.criterion}: ", ": "),
        )

    def _note_unscored(self, budget: ComparedTarget, plan: PruningPlan) -> str:
        """Note the groups that stay whole under this criterion, but not under the first control, which scores all."""
        notes = {group.name: group.note for group in plan.groups if group.note.startswith(_WHOLE)}
        known = self.whole.setdefault(budget, set(notes))
        unscored = [note.removeprefix(_WHOLE) for name, note in notes.items() if name not in known]
        return f"{len(unscored)} of {len(plan.groups)} groups stay whole: {unscored[0]}" if unscored else ""


def _without(row: Row, reason: str) -> Row:
    return Row(row.criterion, row.budget, row.is_control, row.before, reason=reason)


def _mean_share(pairs: Sequence[tuple[int, int]]) -> float:
    return sum(after / before if before else 1.0 for after, before in pairs) / len(pairs)
