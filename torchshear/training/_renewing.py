"""The renewal of masks at the events of a schedule."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.calibration._statistics import Sum
from torchshear.errors import ArgumentError, DataError
from torchshear.graph.model._process import outside_inference_mode
from torchshear.options import CalibrationOptions
from torchshear.pruners import Criterion
from torchshear.pruners._collecting import collect
from torchshear.pruners.criteria._criterion import needs_of
from torchshear.pruners.regularizers import Regularized, Regularizer
from torchshear.pruners.schedules import Renewal, Schedule
from torchshear.training._goals import Choice, Goal, Indices, nothing_gone
from torchshear.training._gradient_sums import SUMS_OF_TRAINING, GradientSums
from torchshear.training._masked_model import MaskedModel
from torchshear.training._progressive import Stages


class MaskRenewer:
    """Renews the masks of a model, and knows what is gone.

    Args:
        goal: what is asked for in the end.
        schedule: when, and how much.
        model: the model with its masks.
        criteria: what scores units.
        data: batches for criteria that are not made of the gradients of the training.
        is_soft: whether what is gone may come back.

    Attributes:
        choice: what is gone.
        n_done: events of the schedule that have come.
        sums: sums of gradients; None where the criterion is not made of them.
    """

    def __init__(
        self,
        goal: Goal,
        schedule: Schedule,
        model: MaskedModel,
        criteria: Sequence[str | Criterion],
        data: CalibrationOptions,
        is_soft: bool,
    ) -> None:
        self.goal, self.schedule, self._model = goal, schedule, model
        self._criteria, self._data, self._is_soft = criteria, data, is_soft
        needs = frozenset() if data.loader is not None else goal.needs
        self.sums = GradientSums(goal.groups, model.parameters, needs) if needs else None
        self._stages: Stages | None = None
        self._toward: Choice | None = None  # what the stages lead to
        self._stage: dict[str, int] = {}
        self.choice = nothing_gone(goal)
        self.n_done = 0

    def renew(self, by: str, position: int, n_steps: int, epoch: int, is_over: bool = False) -> Renewal | None:
        """Renew the masks if an event has come that was not seen yet.

        Args:
            by: what the position counts.
            position: where training is.
            n_steps: steps of the optimizer that were made, for the record.
            epoch: number of the epoch, likewise.
            is_over: whether training is over, so that nothing would train what is chosen anew at a final ratio that
                holds already.

        Returns:
            A record of it; None if no event has come.

        Raises:
            ArgumentError: the criterion is made of gradients, and there are none.
            MaskError: the model has changed its structure.
            WeightError: weights are NaN or infinite.
        """
        n_passed = self.schedule.passed(position) if by == self.schedule.by else 0
        if n_passed <= self.n_done or (is_over and self.n_done >= self.schedule.n_to_final):
            is_on_the_way = self._stages is not None and by == self.schedule.by
            return self._record(n_steps, epoch) if is_on_the_way and self._go_on(position) else None
        self._model.check_structure()
        if self.schedule.ratio(position, self.goal.target):
            self._choose(position)
        self.n_done = n_passed
        if self.sums is not None:
            self.sums.clear()
        return self._record(n_steps, epoch)

    def _choose(self, position: int) -> None:
        """Choose what is gone at an event, and lay its masks; where weights go in stages, those of the first."""
        goal = self.goal
        statistics = self._statistics(goal.needs_at(self.schedule, position))
        choice = goal.choose(self.schedule, position, self._model, statistics, self._before())
        paces = goal.paces
        if not paces:
            self._lay(choice)
            return
        stages = Stages.of(self.choice.masks, choice.masks, goal.scores_of_weights(statistics), position, paces)
        if self._stages is not None and self._toward is not None:
            before = self._toward.masks
            same = {name for name, mask in choice.masks.items() if name in before and torch.equal(mask, before[name])}
            stages = stages.keeping(self._stages, frozenset(same))
        self._stages, self._toward, self._stage = stages, choice, {}
        self._go_on(position)

    def complete(self, n_steps: int, epoch: int) -> Renewal | None:
        """Go to the last stage, where blocks go little by little; give a record of it, None if nothing is left."""
        return self._record(n_steps, epoch) if self._go_on(None) else None

    def _go_on(self, position: int | None) -> bool:
        """Lay the masks of the stages at a position, None for the last ones; False if they lie there already."""
        if self._stages is None or self._toward is None:
            return False
        now = self._stages.last() if position is None else self._stages.at(position)
        if now == self._stage:
            return False
        self._stage = now
        if now != self._stages.last():
            masks = self._stages.masks(self._toward.masks, now)
            self._lay(self.goal.partly(self._toward, masks, self.choice))
            return True
        self._lay(self._toward)
        self._stages = self._toward = None
        return True

    def _lay(self, choice: Choice) -> None:
        self._model.renew(choice.masks)
        self.choice = choice

    def _record(self, n_steps: int, epoch: int) -> Renewal:
        now = self.choice
        return Renewal(n_steps, epoch, now.asked, now.reached, now.widths)

    def count_gradients(self, scale: float | None) -> None:
        """Count the gradients of a step in, if the criterion is made of them; with a scale only finite ones.

        Raises:
            DataError: a gradient is NaN or infinite, and no scale is given.
        """
        if self.sums is None:
            return
        try:
            self.sums.add(1.0 if scale is None else scale)
        except DataError:
            if scale is None:
                raise

    def regularized(self, regularizer: Regularizer) -> Regularized:
        """The network for a regularizer, with what would go at the final ratio if it wants to know."""
        goes: dict[str, Tensor] = {}
        if regularizer.wants_final_units:
            statistics = self._statistics(self.goal.needs)
            choice = self.goal.choose(None, 0, self._model, statistics, self._before())
            goes = {name: ~mask for name, mask in self._model.by_canonical_name(choice.masks).items()}
        names = self.goal.groups.graph.aliases
        singles = tuple(dict.fromkeys(names.get(name, name) for name in self.goal.singles))
        goal = self.goal
        return Regularized(goal.shrinking, self._model.layers(), goes, singles, goal.nearest, goal.owners)

    def _before(self) -> Choice:
        """Return what must not come back, with what is on the way."""
        return nothing_gone(self.goal) if self._is_soft else self._toward or self.choice

    @outside_inference_mode()
    def _statistics(self, needs: frozenset[Sum]) -> Statistics | None:
        """Return what criteria read beside weights.

        Args:
            needs: the sums that are read.
        """
        data = self._data
        if data.loader is not None:
            groups = self._model.groups_as_masked(self.goal.groups)
            on_data = [one for one in self._criteria if needs_of(one)]
            return collect(groups, data.loader, data.loss_fn, data.batches, False, on_data)
        if self.sums is None or not needs:
            return None
        if self.sums.is_empty:
            raise ArgumentError(
                f"the criterion {_named(self._criteria)} is made of gradients, and no step came since the last event "
                f"of the schedule; let steps come between events."
            )
        return self.sums.statistics()

    def shrink(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Put a smaller model in place of the one that trains, without what is gone by now; an optimizer follows.

        Args:
            optimizer: the optimizer of the model that trains, or None.

        Returns:
            Whether more is gone than when the model was last shrunk; nothing is done if not.

        Raises:
            ArgumentError: the optimizer cannot follow.
            VerificationError: the smaller model is not the masked one. Nothing has changed then.
        """
        before = {} if self._model.plan is None else self._model.plan.kept
        widths = {
            name: len(before[name]) if name in before else self.goal.groups[name].width for name in self.choice.kept
        }
        if all(len(units) == widths[name] for name, units in self.choice.kept.items()):
            return False
        plan = self.goal.plan(self.choice, {"schedule": repr(self.schedule), "events": self.n_done})
        assert plan is not None, "channels are asked for"
        self._model.shrink(plan, optimizer)
        self._model.renew(self.choice.masks)
        if self.sums is not None:
            self.sums.follow(self._model.parameters, self._model.lift)
        return True

    def shortfall(self) -> str:
        """Say which events of the schedule did not come; "" if all did."""
        total = self.schedule.n_to_final
        left = max(0, total - self.n_done)
        return f"target not reached: training ended before {left} of {total} events of the schedule" if left else ""

    def state_dict(self) -> dict[str, Any]:
        """Return what is gone, and the sums, as tensors and numbers."""
        return {
            "n_done": self.n_done,
            "asked": self.choice.asked,
            "kept": _as_tensors(self.choice.kept),
            "masks": {name: mask.clone() for name, mask in self.choice.singles.items()},
            "sums": {} if self.sums is None else self.sums.state_dict(),
            "stages": {} if self._stages is None else self._stages.state_dict(),
            "stage": dict(self._stage),
            "toward": {} if self._toward is None else dict(self._toward.singles),
            "toward_kept": {} if self._toward is None else _as_tensors(self._toward.kept),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, and lay the masks."""
        self.choice = self.goal.restore(_as_indices(state["kept"]), state["masks"], float(state["asked"]))
        self.n_done = int(state["n_done"])
        if self.sums is not None:
            self.sums.load_state_dict(state["sums"])
        self._model.renew(self.choice.masks)
        if state["stages"]:
            self._stages = Stages(**state["stages"])
            self._toward = self.goal.restore(_as_indices(state["toward_kept"]), state["toward"], self.choice.asked)
            self._stage = dict(state["stage"])
            masks = self._stages.masks(self._toward.masks, self._stage)
            self._lay(self.goal.partly(self._toward, masks, self.choice))

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return self.goal.describe() | {"schedule": repr(self.schedule)}


def _named(criteria: Sequence[str | Criterion]) -> str:
    """Names of the criteria, of several only those that look at data or gradients."""
    return ", ".join(repr(one) for one in criteria if len(criteria) == 1 or needs_of(one))


def _as_tensors(kept: Mapping[str, Indices]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(units)) for name, units in kept.items()}


def _as_indices(kept: Mapping[str, Tensor]) -> dict[str, Indices]:
    return {name: units.numpy() for name, units in kept.items()}


def check_needs(
    goal: Goal,
    schedule: Schedule,
    criteria: Sequence[str | Criterion],
    data: CalibrationOptions,
    regularizer: Regularizer | None,
) -> None:
    """Raise ArgumentError where criteria need what neither the training nor the data gives."""
    if data.loader is not None:
        for criterion in criteria:
            missing = data.missing_for(criterion)
            if missing:
                raise ArgumentError(f"the criterion {criterion!r} {missing}")
        data.check_used(criteria, "none")
        return
    beyond = goal.needs - SUMS_OF_TRAINING
    if beyond:
        raise ArgumentError(
            f"the criterion {_named(criteria)} looks at {', '.join(sorted(beyond))}, which the gradients of a "
            f"training do not hold; give batches as data=, and where it looks at gradients a loss as loss_fn=."
        )
    if not goal.needs:
        return
    if schedule.by != "event" and goal.needs_at(schedule, 0):
        raise ArgumentError(
            f"the criterion {_named(criteria)} is made of gradients, and the schedule removes something before the "
            f"first step, when there are none; let it start later, or give data= and loss_fn=."
        )
    if regularizer is not None and regularizer.wants_final_units:
        raise ArgumentError(
            f"the regularizer chooses what goes when the training begins, and the criterion {_named(criteria)} is "
            f"made of gradients, of which there are none then; choose another, or give data= and loss_fn=."
        )
