"""The public function that searches widths by trying them."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final

import numpy as np
from torch import Tensor, nn

from torchshear._arguments import check_count, close_names, quote
from torchshear._making import PruneResult
from torchshear.calibration import Loss, Progress
from torchshear.calibration._progress import check_progress, reporting
from torchshear.compensation import check_compensation
from torchshear.dependency import ChannelGroups
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.plans._cut import dense_cost
from torchshear.errors import ArgumentError, SearchError
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._process import outside_inference_mode
from torchshear.latency_target._planner import measured_speed
from torchshear.options import (
    CalibrationOptions,
    Compensation,
    Form,
    LatencyOptions,
    Planner,
    PruneOptions,
    check_criterion,
    checked_call,
)
from torchshear.pruners import Criterion, Ratio
from torchshear.pruners._planning import RankedGroups
from torchshear.pruners.selection._latency import parse_latency
from torchshear.pruners.selection._request import Request
from torchshear.report import make_report
from torchshear.searching._budget import Resource, ResourceLimit, SearchBudget
from torchshear.searching._candidate import CandidateMaker, Evaluate, FineTune
from torchshear.searching._engine import MemoryStore, Search
from torchshear.searching._method import SearchMethod
from torchshear.searching._record import SearchResult
from torchshear.searching._space import SearchSpace
from torchshear.searching.methods import METHODS
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.speedup.latency._measure_table import input_identity, table_of
from torchshear.speedup.latency._profiles import resolve_alignment
from torchshear.speedup.latency._table import check_table

_MOST_OF_A_GROUP: Final = 0.98  # that may go, as where groups are ranked together


@checked_call
@outside_inference_mode()
def search(  # noqa: PLR0913 - independent options, given by name
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    evaluate: Evaluate,
    method: str | SearchMethod = "netadapt",
    ratio: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    target_latency: float | str | None = None,
    device: Device | LatencyTable | None = None,
    finetune: FineTune | None = None,
    trials: int | None = None,
    seed: int = 0,
    criterion: str | Criterion | None = None,
    min_ratio: Ratio = 0.0,
    max_ratio: Ratio | None = None,
    group_reduction: str = "sum",
    roles: str | Collection[str] | None = None,
    exclude: str | Collection[str] = (),
    prunable_outputs: str | Collection[str] = (),
    submodules: Sequence[str] | None = None,
    align: int | str | Alignment | None = None,
    min_width: int = 1,
    data: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
    batches: int | None = None,
    compensate: Compensation = "none",
    memory: int | None = None,
    progress: Progress = True,
    form: Form = "auto",
) -> SearchResult:
    """Search the width of every channel group by trying: prune, evaluate, learn, within a budget.

    A method proposes widths of whole channel groups, which keep every constraint of the network; each candidate is cut
    from the dense model, its units chosen by a criterion, compensated or fine-tuned if asked, and scored by `evaluate`.
    Widths that were scored before are not scored again. The best candidate within the budget is proved and returned.

    Args:
        model: the model; it is left as it is.
        args: example positional arguments; a tensor counts as one argument.
        kwargs: example keyword arguments.
        evaluate: called as `evaluate(model)` on a copy of each candidate, in eval mode and from the same random state;
            gives a number, the higher the better. A candidate on which it fails, or gives NaN or no number, has failed,
            and the search goes on; three in a row stop it.
        method: name of a method or one with its own settings, as `torchshear.searching.Annealing(start=50)`:
            "netadapt", "annealing", "sensitivity", "evolution"; "random", "uniform" and "milp", the exact allocation by
            scores, are what these have to beat. See docs/search.md.
        ratio: share of the channels of all searched groups that is to go, in (0, 1).
        target_macs: multiply-accumulate operations that may be left, in place of a ratio: a share of the dense model's
            in (0, 1), or a whole number of at least 2.
        target_params: parameters that may be left, likewise. With both, both hold.
        target_latency: time that may be left by a table of times measured on this machine: a share, or milliseconds, as
            "3.5ms"; see `torchshear.prune`.
        device: how latency is measured, or a table that was measured before.
        finetune: called as `finetune(model)` on a candidate before it is scored; trains it in place, or returns the
            trained one. Methods that cut in rounds hand its weights on to the next round.
        trials: how many candidates may be evaluated; None: as many as the method needs to end, or 50 where it has no
            end.
        seed: seed of the method, and of the random state in which every candidate is made and scored.
        criterion: scores by which the units of a group are chosen; see `torchshear.prune`.
        min_ratio: share that each group loses in any case; see `torchshear.plan`.
        max_ratio: largest share that a group may lose; None: 0.98.
        group_reduction: how scores of a group's members become one; see `torchshear.plan`.
        roles: role or roles that may shrink, None for all; see `torchshear.plan`.
        exclude: patterns of names that stay whole; see `torchshear.plan`.
        prunable_outputs: names of outputs that may shrink; see `torchshear.analyze`.
        submodules: names of modules to prune inside the model; see `torchshear.trace`.
        align: widths that the device runs well; see `torchshear.plan`. With a target of latency None is "auto".
        min_width: the fewest units to keep in a group.
        data: batches for criteria that look at data and for `compensate`; see `torchshear.collect`.
        loss_fn: called as `loss_fn(output, target)`, for criteria that look at gradients.
        batches: how many batches to run; None: 32.
        compensate: how each candidate is brought nearer to its original before it is scored; see `torchshear.prune`.
        memory: bytes that a refit may hold of activations in memory; None: 2 GB.
        progress: how it is shown; a function is called as `progress(done, total, what)` after each trial.
        form: form of candidates and result; see `torchshear.prune`. "auto": native where that is possible.

    Returns:
        The best result with all trials; `str()` of it is a table. On Ctrl-C the best so far.

    Raises:
        KeywordError: an argument does not exist.
        ArgumentError: an argument is outside what is accepted, or contradicts another.
        PlanError: the budget cannot be reached; says what the best possible is, before the first trial.
        SearchError: three candidates in a row cannot be scored, from the first one's exception; or no trial is within
            the budget.
        DataError: the data or the loss does not fit the model.
        CaptureError: the model cannot be captured.
        WeightError: the weights cannot be scored.
        VerificationError: the best candidate's cut is not equal to the masked model.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(32, 4)
        >>> def closeness(small):
        ...     return -float((small(x) - model(x)).square().mean())
        >>> found = torchshear.search(model, x[:1], evaluate=closeness, method="random", target_params=0.6, trials=5)
        >>> found.best.is_within, len(found.trials) <= 5
        (True, True)
    """
    start = time.perf_counter()
    check_criterion(criterion)
    check_progress(progress)
    for name, function in (("evaluate", evaluate), ("finetune", finetune)):
        if not callable(function) and (function is not None or name == "evaluate"):
            raise ArgumentError(f"{name} is {type(function).__name__}; expected a function of a model.")
    chosen = _method(method)
    check_count("seed", seed, least=0)
    most = getattr(chosen, "default_trials", None) if trials is None else trials
    if most is not None:
        check_count("trials", most)
    measuring = LatencyOptions.parse(target_latency, device, False)
    request = Request(
        criterion="l1" if criterion is None else criterion,
        ratio=ratio,
        target_macs=target_macs,
        target_params=target_params,
        target_latency=target_latency,
        min_ratio=min_ratio,
        max_ratio=_MOST_OF_A_GROUP if max_ratio is None else max_ratio,
        group_reduction=group_reduction,
        roles=roles,
        exclude=exclude,
        alignment=resolve_alignment("auto" if align is None and target_latency is not None else align),
        min_width=min_width,
    )
    _check_budget(request)
    options = PruneOptions.parse(
        request,
        has_criterion=criterion is not None,
        config=None,
        submodules=submodules,
        calibration=replace(CalibrationOptions.parse(data, loss_fn, batches, compensate, memory), progress=False),
        compensate=compensate,
        form=form,
    )
    calibration = options.calibration
    if calibration.loader is not None:  # once, so that all candidates see the same batches whatever the loader does
        options = replace(
            options, calibration=replace(calibration, loader=list(islice(calibration.loader, calibration.batches)))
        )
    check_compensation(compensate, model, calibration.batches)
    groups = analyze(trace(model, args, kwargs, submodules), prunable_outputs)
    if criterion is None and compensate == "refit":
        options = options.with_reconstruction(groups)
    table = _table(model, groups, args, kwargs, measuring, request)
    space = _space(options, model, groups, table)
    maker = CandidateMaker(
        model=model,
        args=args,
        kwargs=kwargs,
        space=space,
        evaluate=evaluate,
        finetune=finetune,
        compensate=compensate,
        calibration=options.calibration,
        form=None if form == "auto" else form,
        seed=seed,
        said={"search": name_of(chosen)},
    )
    with reporting(progress) as report:
        running = Search(maker, MemoryStore(), most, report)
        running.run(chosen, seed)
    return _finish(running, chosen, measuring, time.perf_counter() - start)


def name_of(method: SearchMethod) -> str:
    """Return the name under which a method is known, or that of its class."""
    return next((name for name, kind in METHODS.items() if type(method) is kind), type(method).__name__)


def _method(given: object) -> SearchMethod:
    if isinstance(given, str):
        if given not in METHODS:
            raise ArgumentError(f"method={given!r}; expected one of {', '.join(METHODS)}.{close_names(given, METHODS)}")
        return METHODS[given]()
    if isinstance(given, type) or not isinstance(given, SearchMethod):
        raise ArgumentError(
            f"method={quote(given)}; expected one of {', '.join(METHODS)}, or a method with settings, as "
            f"torchshear.searching.Annealing(start=50)."
        )
    return given


def _check_budget(request: Request) -> None:
    """Refuse a search without a budget, or with shares for single groups, which it is to find."""
    if isinstance(request.ratio, Mapping):
        raise ArgumentError(
            "ratio is a mapping; a search finds the share of each group. Give one number, and limits for groups as "
            "min_ratio, max_ratio or exclude."
        )
    if request.ratio is None and not request.has_budget and request.target_latency is None:
        raise ArgumentError("no budget is given; expected ratio, target_macs, target_params or target_latency.")
    if request.ratio == 0:
        raise ArgumentError("ratio=0 removes nothing; expected the share of channels that is to go, in (0, 1).")


def _table(
    model: nn.Module,
    groups: ChannelGroups,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None,
    measuring: LatencyOptions,
    request: Request,
) -> LatencyTable | None:
    """Measure a table of times, or check the given one; None without a target of latency."""
    given = measuring.given
    if request.target_latency is None or given is None:
        return None
    if isinstance(given, LatencyTable):
        check_table(given, groups, input_identity(args, kwargs))
        return given
    return table_of(model, groups, args, kwargs, given, request.alignment)


def _space(options: PruneOptions, model: nn.Module, groups: ChannelGroups, table: LatencyTable | None) -> SearchSpace:
    """Make the space of the widths, and check the budget before data is run, which may take long.

    Raises:
        ArgumentError: the dense model keeps within the budget; nothing can shrink.
        PlanError: the budget cannot be reached.
    """
    request = options.request
    limits = _limits(groups, request, table)
    numbers = {group.name: number for number, group in enumerate(groups)}

    def space_of(ranked: RankedGroups) -> SearchSpace:
        free = np.array([numbers[one.group.name] for one in ranked.steps], np.int64)
        if not len(free):
            raise ArgumentError(f"no channel group of {groups.graph.model_type} can shrink, so there is no search.")
        space = SearchSpace.of(ranked, SearchBudget.of(groups, free, limits, table))
        n_whole = len(groups) - len(free)
        said = f"min_width={request.min_width}, alignment {request.alignment.name!r}, max_ratio={request.max_ratio}"
        space.check_reachable(f"{said} and {n_whole} groups that stay whole")
        return space

    space = space_of(RankedGroups.of(groups, request, None, with_scores=False))
    if space.budget.holds(tuple(space.dense.tolist())):
        raise ArgumentError("the dense model keeps within the budget already. Ask for less.")
    return space_of(RankedGroups.of(groups, request, Planner.of(options, model, groups).statistics))


def _limits(groups: ChannelGroups, request: Request, table: LatencyTable | None) -> list[ResourceLimit]:
    """Return the bounds as shares of the dense model's."""
    found: list[ResourceLimit] = []
    if isinstance(request.ratio, float | int):
        found.append(ResourceLimit("channels", 1 - request.ratio))
    asked: list[tuple[Resource, float | None, int]] = [
        ("macs", request.target_macs, dense_cost(groups.graph).macs),
        ("params", request.target_params, dense_cost(groups.graph).n_params),
    ]
    for resource, target, dense in asked:
        if target is not None:
            found.append(ResourceLimit(resource, float(target if target <= 1 else target / max(dense, 1))))
    if table is not None:
        share, milliseconds = parse_latency(request.target_latency)
        found.append(ResourceLimit("latency", share if share is not None else (milliseconds or 0.0) / table.dense_ms))
    return found


def _finish(running: Search, method: SearchMethod, measuring: LatencyOptions, seconds: float) -> SearchResult:
    """Prove the best candidate, and put everything together.

    Raises:
        SearchError: no trial is within the budget.
        VerificationError: the best candidate's cut is not equal to the masked model.
    """
    maker, best = running.maker, running.best_trial
    if best is None:
        raise SearchError(
            f"none of {len(running.trials)} trials has a score and is within the budget. Allow more trials, or use "
            f"another method."
        )
    candidate = running.best
    if candidate is None or candidate.proposal.widths != running.proposals[best.number].widths:
        candidate = maker.make(running.proposals[best.number])
    candidate, shrunk = maker.prove(candidate)
    after = candidate.after
    groups = maker.space.budget.groups
    latency = measured_speed(maker.model, after.model, groups, maker.args, maker.kwargs, measuring)
    report = make_report(candidate.plan, f"{shrunk.form}: {shrunk.reason}", shrunk.parts, after.refit, latency)
    result = PruneResult(
        after.model,
        candidate.plan,
        report,
        shrunk.verification,
        shrunk.form,
        after.fold,
        None,
        maker.compensate,
        after.refit,
        latency,
    )
    return SearchResult(
        result=result,
        trials=tuple(running.trials),
        best=best,
        method=name_of(method),
        targets={str(limit.resource): limit.share for limit in maker.space.budget.limits},
        seed=maker.seed,
        n_reused=running.n_reused,
        seconds=seconds,
        notes=tuple(running.notes),
    )
