"""Pruning in rounds: what each round asks for, what chooses, what makes it real and what trains are small pieces."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from torchshear._arguments import check_flag, check_kind, check_one_of, check_share, quote
from torchshear._making import PruneResult, shrink_planned
from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.errors import ArgumentError, DataError
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import outside_inference_mode
from torchshear.options import check_criterion, checked_call
from torchshear.pruners import Criterion
from torchshear.pruners._planning import plan_units
from torchshear.pruners.schedules import Schedule
from torchshear.pruners.selection._request import Request
from torchshear.pruners.selection._widths import NothingToRemoveError
from torchshear.training._masked_model import MaskedModel, check_computed, check_unmasked
from torchshear.training._rounds_folder import Round, RoundsFolder, digest_of

Indices = npt.NDArray[np.int64]
Unit = Literal["channels", "macs", "params"]


Tasks = Schedule | Sequence[float] | Callable[[tuple[Round, ...]], float | None]
"""Tasks of rounds: a schedule by events, shares, or a function of the rounds so far that ends with None."""
RoundPruner = Callable[[ChannelGroups, float, Mapping[str, Indices]], PruningPlan]
"""Chooser: a function of the original's groups, with the weights of now and zeros for what is gone; of the share
of the original that is asked for; and of the units of each group that are gone, which must go again."""


@dataclass(frozen=True, slots=True, eq=False)
class RoundsResult:
    """Result of pruning in rounds.

    Attributes:
        result: the small model of the best round, proved, with a plan for the original model.
        best: number of that round: that of the highest score among those with the largest share gone; without scores
            the last.
        rounds: all rounds.
    """

    result: PruneResult
    best: int
    rounds: tuple[Round, ...]

    def __str__(self) -> str:
        """A line for each round."""
        lines = [
            f"round {one.number}: {one.asked:.1%} asked, {one.reached:.1%} of the channels gone, {one.macs:,} MACs"
            + ("" if one.score is None else f", score {one.score:.4g}")
            + (" (best)" if one.number == self.best else "")
            for one in self.rounds
        ]
        return "\n".join(lines)


def by_criterion(
    criterion: str | Criterion = "l1",
    *,
    unit: Unit = "channels",
    statistics: Callable[[ChannelGroups], Statistics] | None = None,
    scope: str = "auto",
    **options: Any,
) -> RoundPruner:
    """Make what chooses in each round: a criterion, as `torchshear.plan` applies it.

    Args:
        criterion: name of a criterion or a function like one.
        unit: what shares are of: "channels" of each group, "macs" or "params" of the model.
        statistics: for criteria that look at data: called with the groups in each round, as
            `lambda groups: torchshear.collect(groups, loader, loss_fn)`.
        scope: units that are ranked against one another.
        options: further ones of `torchshear.plan`: `roles`, `exclude`, `min_width`, `min_ratio`, `max_ratio`,
            `group_reduction`, `normalize`.

    Returns:
        The function.

    Raises:
        ArgumentError: an argument is outside what is accepted.
    """
    check_criterion(criterion)
    check_one_of("unit", unit, ("channels", "macs", "params"))
    if statistics is not None and not callable(statistics):
        raise ArgumentError(f"statistics is {type(statistics).__name__}; expected a function of the groups, or None.")
    known = ("roles", "exclude", "min_width", "min_ratio", "max_ratio", "group_reduction", "normalize")
    for name in options:
        if name not in known:
            raise ArgumentError(f"by_criterion() has no option {name!r}; expected one of {', '.join(known)}.")

    def request_of(share: float) -> Request:
        asked: dict[str, Any] = {"ratio": share} if unit == "channels" else {f"target_{unit}": 1 - share}
        return Request(criterion=criterion, scope=scope, **asked, **options)

    request_of(0.5)

    def choose(groups: ChannelGroups, share: float, gone: Mapping[str, Indices]) -> PruningPlan:
        found = None if statistics is None else statistics(groups)
        return plan_units(groups, request_of(share), None, found, gone=gone)

    said = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom")
    choose.__name__ = f"by_criterion({said!r}, unit={unit!r}, scope={scope!r}, {options!r})"
    return choose


@checked_call
@outside_inference_mode()
def prune_in_rounds(  # noqa: PLR0913 - independent pieces, given by name
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tasks: Tasks,
    ratio: float | None = None,
    pruner: str | RoundPruner = "l1",
    fine_tune: Callable[[nn.Module], object] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    shrink: bool = True,
    reset_weights: bool = False,
    folder: str | PathLike[str] | None = None,
) -> RoundsResult:
    """Prune and fine-tune a model round by round, and take the best of what comes out.

    In each round `tasks` says which share of the original is to be gone, `pruner` chooses by the weights as they are
    now, what is chosen is cut out of the model or masked, and `fine_tune` trains what is left. What went stays away.

    Args:
        model: the model; it is left as it is.
        args: example positional arguments; a tensor counts as one argument.
        kwargs: example keyword arguments.
        tasks: what each round asks for: a schedule by="event" of `torchshear.schedules`, with `ratio` in the end; a
            list of shares of the original; or a function that takes the rounds so far and gives a share, or None to
            end. Equal shares one after another are further candidates of one size.
        ratio: the final share, with a schedule.
        pruner: what chooses: name of a criterion, `by_criterion(...)`, or a function of groups, share and units that
            are gone which gives a plan.
        fine_tune: called with the model of the round, which it trains in place, with an optimizer of its own; None for
            no training.
        evaluate: called with the model of the round, returns a score, higher is better; None for no scores.
        shrink: whether each round really makes the model smaller, so that training gets faster; False: masks.
        reset_weights: whether all that is left is set back to the weights that were given before it is fine-tuned
            (lottery ticket).
        folder: an existing folder to which each round is written when it is over. A call with the same settings and
            the same model goes on behind the last one. `round-3.json` is the plan of round 3, for
            `torchshear.shrink(model, plan)`, and `round-3.safetensors` all weights, with zeros where nothing is.

    Returns:
        The small model of the best round, proved, and a record of all rounds.

    Raises:
        KeywordError: an argument does not exist.
        ArgumentError: an argument is outside what is accepted; the pruner keeps what is gone; the folder is of other
            rounds.
        CaptureError: torch.export cannot capture the model.
        CheckpointError: a file of the folder cannot be read.
        DataError: a score is NaN or infinite.
        MaskError: masks lie on the model already, or a weight is computed.
        PlanError: a share cannot be reached, or the pruner gives a plan for another network.
        VerificationError: the small model is not equal to the masked one.

    Example:
        >>> import torch, torchshear
        >>> from torchshear.training import prune_in_rounds
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = prune_in_rounds(model, torch.randn(1, 4), tasks=[0.25, 0.5], fine_tune=lambda model: None)
        >>> found.result.model[0].out_features, [one.reached for one in found.rounds]
        (4, [0.25, 0.5])
    """
    check_flag("shrink", shrink)
    check_flag("reset_weights", reset_weights)
    for name, one in (("fine_tune", fine_tune), ("evaluate", evaluate)):
        if one is not None and not callable(one):
            raise ArgumentError(f"{name} is {type(one).__name__}; expected a function of a model, or None.")
    next_task = _next_task(tasks, ratio)
    choose = by_criterion(pruner) if isinstance(pruner, str) else pruner
    if not callable(choose):
        raise ArgumentError(f"pruner is {quote(pruner)}; expected the name of a criterion, or a function.")
    check_unmasked(model)
    run = _Run(model, args, kwargs, shrink, reset_weights)
    settings = {
        "pruner": getattr(choose, "__qualname__" if choose.__module__ != __name__ else "__name__", "custom"),
        "tasks": repr(tasks) if not callable(tasks) else getattr(tasks, "__qualname__", "custom"),
        "ratio": ratio,
        "shrink": shrink,
        "reset_weights": reset_weights,
        "network": run.groups.graph.fingerprint,
        "weights": digest_of(run.state()),
    }
    saved = RoundsFolder(folder, settings)
    rounds = list(saved.rounds)
    if rounds:
        run.go_on(*saved.read(len(rounds) - 1))
    best = saved.best
    while (asked := next_task(tuple(rounds))) is not None:
        run.begin(choose, asked)
        if fine_tune is not None:
            fine_tune(run.masked.model)
        score = None if evaluate is None else _score(evaluate(run.masked.model))
        rounds.append(run.record(len(rounds), asked, score))
        if best is None or _is_better(rounds[-1], rounds[best]):
            best = len(rounds) - 1
            run.hold()
        saved.write(rounds, best, run.plan(), run.state())
    if best is None:
        raise ArgumentError("tasks asks for no round; expected at least one share.")
    if not run.holds:
        run.go_on(*saved.read(best))
        run.hold()
    return RoundsResult(run.finish(), best, tuple(rounds))


def _next_task(tasks: object, ratio: float | None) -> Callable[[tuple[Round, ...]], float | None]:
    """Return what each round asks for, as a function of the rounds so far."""
    if isinstance(tasks, Schedule):
        if tasks.by != "event" or ratio is None:
            raise ArgumentError(f"tasks={tasks!r}: expected a schedule with by='event', and ratio= for its end.")
        shares: list[Any] = [tasks.ratio(max(0, position), ratio) for position in tasks.events]
    elif ratio is not None:
        raise ArgumentError("ratio= goes with a schedule; other tasks say themselves which share they ask for.")
    elif callable(tasks):
        ask: Callable[[tuple[Round, ...]], float | None] = tasks

        def asked(rounds: tuple[Round, ...]) -> float | None:
            share = ask(rounds)
            if share is not None:
                check_share("a share of tasks", share)
            return share

        return asked
    elif isinstance(tasks, list | tuple) and tasks:
        shares = list(tasks)
    else:
        raise ArgumentError(f"tasks={quote(tasks)}; expected a schedule by='event', a list of shares, or a function.")
    for share in shares:
        check_share("a share of tasks", share)
    return lambda rounds: float(shares[len(rounds)]) if len(rounds) < len(shares) else None


def _score(value: object) -> float:
    """Return what an evaluator gave, as a number.

    Raises:
        ArgumentError: it is none.
        DataError: it is NaN or infinite.
    """
    score = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(score, int | float | np.integer | np.floating):
        raise ArgumentError(f"evaluate gave {quote(value)}; expected a number, the higher the better.")
    if not math.isfinite(score):
        raise DataError(f"evaluate gave {score}; expected a finite number, the higher the better.")
    return float(score)


def _is_better(one: Round, other: Round) -> bool:
    """Return whether a later round is to be preferred: it is smaller, or of the same size and not worse."""
    if one.reached != other.reached:
        return one.reached > other.reached
    return one.score is None or other.score is None or one.score > other.score


class _Run:
    """A copy of a model on its way through the rounds.

    Args:
        model: the model.
        args: example positional arguments.
        kwargs: example keyword arguments.
        shrinks: whether it is really made smaller.
        resets: whether it is set back to its first weights before each training.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...] | Tensor,
        kwargs: Mapping[str, Any] | None,
        shrinks: bool,
        resets: bool,
    ) -> None:
        self._args, self._kwargs, self._shrinks = args, kwargs, shrinks
        own = copy_model(model)
        self.groups = analyze(trace(own, args, kwargs))
        check_computed(self.groups)
        self._kept = {group.name: np.arange(group.width) for group in self.groups.prunable}
        state = self.groups.graph.state
        members = [member.name for group in self.groups.prunable for member in group.members]
        names = [name for name in dict.fromkeys(members) if state[name].kind == "parameter"]
        self.masked = MaskedModel(own, self.groups, names, False)
        self._start = self.state() if resets else None
        self._held: tuple[nn.Module, PruningPlan] | None = None

    def state(self) -> dict[str, Tensor]:
        """All parameters and buffers in full size, with zeros where nothing is any more."""
        dense = self.masked.dense_copy()
        return {name: one.detach().cpu().clone() for name, one in (*dense.named_parameters(), *dense.named_buffers())}

    def plan(self) -> PruningPlan:
        """Return what is kept now, as a plan for the original."""
        return make_plan(Cut(self.groups, self._kept), self._kept, {"rounds": True}, {})

    def begin(self, choose: RoundPruner, asked: float) -> None:
        """Choose what is left in a round, and make it real."""
        gone = {name: np.setdiff1d(np.arange(self.groups[name].width), kept) for name, kept in self._kept.items()}
        gone = {name: units for name, units in gone.items() if units.size}
        kept: Mapping[str, Indices] = self._kept
        if asked:
            try:
                plan = choose(self.masked.groups_as_masked(self.groups), asked, gone)
            except NothingToRemoveError:
                plan = self.plan()
            check_kind("what pruner gives", plan, PruningPlan, "a plan for the groups that it is given")
            kept = {group.name: plan.kept[group.name] for group in self.groups.prunable if group.name in plan.kept}
            back = [name for name, units in gone.items() if name not in kept or np.isin(units, kept[name]).any()]
            if back:
                raise ArgumentError(
                    f"pruner keeps units of group {back[0]!r} that went in an earlier round; expected a plan without "
                    f"the units that it is told are gone."
                )
        self._take({**self._kept, **kept}, self._start)

    def _take(self, kept: Mapping[str, Indices], start: Mapping[str, Tensor] | None) -> None:
        """Leave some units, with weights set back to those of the start if there are any."""
        self._kept = dict(kept)
        plan = self.plan()
        if start is not None:
            self.masked.set_values(start)
        if self._shrinks and plan.n_cut and (self.masked.plan is None or plan != self.masked.plan):
            self.masked.renew(plan.masks())
            self.masked.shrink(plan, None)
        self.masked.renew(plan.masks())

    def go_on(self, plan: PruningPlan, state: Mapping[str, Tensor]) -> None:
        """Go on from what was saved of a round."""
        self._take({group.name: plan.kept[group.name] for group in self.groups.prunable}, state)

    def record(self, number: int, asked: float, score: float | None) -> Round:
        """Make the record of a round."""
        total = sum(group.width for group in self.groups.prunable)
        reached = 1 - sum(map(len, self._kept.values())) / max(1, total)
        cost = Cut(self.groups, self._kept).cost()
        return Round(number, float(asked), reached, cost.n_params, cost.macs, score)

    def hold(self) -> None:
        """Keep the model as it is now for the end."""
        self._held = self.masked.dense_copy(), self.plan()

    @property
    def holds(self) -> bool:
        """True if a model is kept for the end."""
        return self._held is not None

    def finish(self) -> PruneResult:
        """Make the small model of what is kept for the end, and prove it."""
        assert self._held is not None, "kept before"
        return shrink_planned(*self._held, self._args, self._kwargs)
