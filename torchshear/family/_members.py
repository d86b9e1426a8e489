"""Members of a family, made one after another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn

from torchshear._evaluation import Evaluate, score_model
from torchshear._file_size import FileTarget
from torchshear._making import MadeModel
from torchshear.calibration import Progress
from torchshear.calibration._progress import reporting
from torchshear.graph.model._copy import copy_model
from torchshear.latency_target._planner import (
    RESULT_ROUNDS,
    LatencyPlanner,
    MeasuredModel,
    check_faster,
    target_share_of,
)
from torchshear.options import PruneOptions
from torchshear.speedup.latency._comparison import LatencyComparison
from torchshear.speedup.latency._runtime import ReadyModel

_STEPS: Final = ("choosing widths and measuring", "shrinking and proving", "measuring", "evaluating")


@dataclass(frozen=True, slots=True, eq=False)
class FamilyMember:
    """One member before all are measured together.

    Attributes:
        made: the model, its plan and its proof.
        ready: the same, ready for the device.
        score: what the user's function gives for it; None without one.
    """

    made: MadeModel
    ready: ReadyModel
    score: float | None


@dataclass(frozen=True, slots=True, eq=False)
class MemberMaker:
    """Makes members of one model's family.

    Attributes:
        model: the dense model.
        args: example positional arguments.
        kwargs: example keyword arguments.
        options: what is asked for, beside the targets.
        measured: the model's table, times and ranked units.
        evaluate: scores members; None: they are not scored.
        must_be_faster: whether a member that is not measurably faster is refused.
        size: bound on the files of members; None without a target of size.
    """

    model: nn.Module
    args: tuple[Any, ...] | Tensor
    kwargs: Mapping[str, Any] | None
    options: PruneOptions
    measured: MeasuredModel
    evaluate: Evaluate | None
    must_be_faster: bool
    size: FileTarget | None

    def make(self, targets: Mapping[str, float | str], progress: Progress) -> dict[str, FamilyMember]:
        """Make a member for each target, the slowest first, since it is the likeliest not to be faster than the model.

        Args:
            targets: name of a member -> latency that may be left.
            progress: see `torchshear.collect`; what is done are steps of members.

        Returns:
            Name -> member, in the order of the targets.

        Raises:
            NotFasterError: a member is not measurably faster, and must be.
            TorchshearError: what planning, shrinking, exporting and compensating raise.
        """
        order = sorted(targets, key=lambda name: -target_share_of(targets[name], self.measured.dense_ms))
        quiet = replace(self.options, calibration=replace(self.options.calibration, progress=False))
        found, correction = dict[str, FamilyMember](), 1.0
        with reporting(progress) as report:
            for number, name in enumerate(order):

                def say(step: int, number: int = number, name: str = name) -> None:
                    total = len(_STEPS) * len(order)
                    report(len(_STEPS) * number + step, total, f"target {name}: {_STEPS[step]}")

                say(0)
                made, correction = self._make_one(quiet, targets[name], correction, say)
                say(2)
                ready = self.measured.candidates.prepare(made.after.model, f"member {number}")
                if self.must_be_faster:
                    what = f"the member for the target {name}"
                    check_faster(self.measured.candidates.compare(ready, RESULT_ROUNDS), "pruned", what)
                say(3)
                found[name] = FamilyMember(made, ready, self._score(made.after.model, name))
        return {name: found[name] for name in targets}

    def _make_one(
        self, quiet: PruneOptions, target: float | str, correction: float, say: Callable[[int], None]
    ) -> tuple[MadeModel, float]:
        """Choose widths, shrink and prove, within a bound on size if there is one; with the table's correction."""

        def make(options: PruneOptions) -> MadeModel:
            nonlocal correction
            planner = LatencyPlanner.of(replace(options.request, target_latency=target), self.measured, correction)
            correction = planner.correction
            say(1)
            return MadeModel.of(self.model, options, planner, self.args, self.kwargs)

        made = make(quiet) if self.size is None else self.size.meet(quiet, make)
        return made, correction

    def _score(self, model: nn.Module, name: str) -> float | None:
        """Score a copy of a member, which the user's function may change."""
        if self.evaluate is None:
            return None
        return score_model(self.evaluate, copy_model(model), f"the member for the target {name}")


def pair_of(latency: LatencyComparison, name: str) -> LatencyComparison:
    """Return the times of the dense model and of one member, as "dense" and "pruned", from the rounds of all."""
    pair = {"dense": latency["dense"], "pruned": replace(latency[name], name="pruned")}
    return replace(latency, results=pair)
