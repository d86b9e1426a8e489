"""The public function that searches widths by trying them."""

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from torchshear._making import PruneResult
from torchshear.calibration import Loss, Progress
from torchshear.calibration._progress import Report, check_progress, reporting
from torchshear.dependency._alignment import Alignment
from torchshear.errors import SearchError, first_line
from torchshear.graph.model._process import outside_inference_mode
from torchshear.latency_target._planner import measured_speed
from torchshear.options import Compensation, Form, LatencyOptions, checked_call
from torchshear.pruners import Criterion, Ratio
from torchshear.report import make_report
from torchshear.searching._candidate import Evaluate, FineTune
from torchshear.searching._early_stopping import find_early
from torchshear.searching._engine import MemoryStore, Search, TrialStore
from torchshear.searching._identity import identity_of
from torchshear.searching._method import SearchMethod
from torchshear.searching._record import SearchResult
from torchshear.searching._request import SearchRequest, find_method, name_of
from torchshear.searching._storage import claim_study, import_optuna, open_study
from torchshear.searching._study_store import StudyStore
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.speedup.latency._cache import only_measurement

logger = logging.getLogger(__name__)


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
    finetune_best: FineTune | None = None,
    stop_early: object = None,
    reuse_activations: bool = False,
    trials: int | None = None,
    seed: int = 0,
    storage: object = None,
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
            gives a number, the higher the better, or yields one after another as the score becomes better known, of
            which the last counts. A candidate on which it fails, or gives NaN or no number, has failed, and the search
            goes on; three in a row stop it.
        method: name of a method or one with its own settings, as `torchshear.searching.Annealing(start=50)`:
            "netadapt", "annealing", "sensitivity", "amc", "evolution"; "random", "uniform" and "milp", the exact
            allocation by scores, are what these have to beat. See docs/search.md.
        ratio: share of the channels of all searched groups that is to go, in (0, 1).
        target_macs: multiply-accumulate operations that may be left, in place of a ratio: a share of the dense model's
            in (0, 1), or a whole number of at least 2.
        target_params: parameters that may be left, likewise. With both, both hold.
        target_latency: time that may be left by a table of times measured on this machine: a share, or milliseconds, as
            "3.5ms"; see `torchshear.prune`.
        device: how latency is measured, or a table that was measured before.
        finetune: called as `finetune(model)` on a candidate before it is scored; trains it in place, or returns the
            trained one. Methods that cut in rounds hand its weights on to the next round. It may yield scores on the
            way, as one after each epoch.
        finetune_best: called likewise on the best candidate, once, when the search is over: for a longer training. If
            it fails or is interrupted, the candidate is returned as the search found it, and `notes` say so.
        stop_early: gives candidates up by the scores that `finetune` and `evaluate` yield on the way: "median" (less
            than the median of others at the same place), "halving" (successive halving), or a pruner of Optuna. A
            candidate that was given up counts as failed for the method. It needs torchshear[search], and a method that
            does not cut in rounds ("netadapt" and "sensitivity" do). None: none is.
        reuse_activations: computes activations once that candidates have in common: those before the first layer in
            which they differ, for inputs seen before. `evaluate` is then called on the candidate's graph in eval mode,
            which has the same output, and must only run it: neither train it, nor time it, nor look into it. Not with
            finetune, which changes all weights.
        trials: how many candidates may be evaluated; None: as many as the method needs to end, or 50 where it has no
            end.
        seed: seed of the method, and of the random state in which every candidate is made and scored.
        storage: where trials are kept, for a search that goes on after a stop, and is shared by all processes that make
            this same call: "journal://FILE" on one machine, the URL of a database, "grpc://HOST:PORT", or a storage of
            Optuna. It needs torchshear[search]. None: in memory.
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
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        compensate: how each candidate is brought nearer to its original before it is scored; see `torchshear.prune`.
        memory: bytes of activations that a refit, and reuse_activations, may each hold in memory; None: 2 GB.
        progress: how it is shown; a function is called as `progress(done, total, what)` after each trial.
        form: form of candidates and result; see `torchshear.prune`. "auto": native where that is possible.

    Returns:
        The best result with all trials; `str()` of it is a table. On Ctrl-C the best so far.

    Raises:
        KeywordError: an argument does not exist.
        ArgumentError: an argument is outside what is accepted, or contradicts another; or the storage holds another
            search.
        PlanError: the budget cannot be reached; says what the best possible is, before the first trial.
        SearchError: three candidates in a row cannot be scored, from the first one's exception; no trial is within the
            budget; or the storage is damaged.
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
    check_progress(progress)
    request = SearchRequest(
        evaluate=evaluate,
        method=method,
        ratio=ratio,
        target_macs=target_macs,
        target_params=target_params,
        target_latency=target_latency,
        device=device,
        finetune=finetune,
        finetune_best=finetune_best,
        stop_early=stop_early,
        reuse_activations=reuse_activations,
        storage=storage,
        trials=trials,
        seed=seed,
        criterion=criterion,
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        group_reduction=group_reduction,
        roles=roles,
        exclude=exclude,
        prunable_outputs=prunable_outputs,
        submodules=submodules,
        align=align,
        min_width=min_width,
        data=data,
        loss_fn=loss_fn,
        batches=batches,
        compensate=compensate,
        memory=memory,
        form=form,
    )
    with reporting(progress) as report:
        running = start_search(request, model, args, kwargs, report)
        running.run(find_method(method), seed)
    return _finish(running, request, time.perf_counter() - start)


def start_search(
    request: SearchRequest,
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None,
    report: Report,
) -> Search:
    """Prepare a search, and join the one of its storage; raises what `search` raises before the first trial."""
    study = _open(request)
    maker = request.prepare(model, args, kwargs)
    store: TrialStore = MemoryStore()
    if study is not None:
        claim_study(study, identity_of(request, maker))
        store = StudyStore(study, request.storage)
        store.forget_failures()
    return Search(maker, store, request.most_trials, report)


def _open(request: SearchRequest) -> Any:
    """Open the study of a search, in memory if it may give up candidates; None where it needs none."""
    early = None if request.stop_early is None else find_early(request.stop_early)
    if request.storage is not None:
        return open_study(request.storage, early=early)
    return None if early is None else open_study(import_optuna().storages.InMemoryStorage(), early=early)


def _finish(running: Search, request: SearchRequest, seconds: float) -> SearchResult:
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
    candidate, proposal, notes = running.best, running.proposals[best.number], list(running.notes)
    if candidate is None or candidate.proposal != proposal:
        candidate = maker.make(proposal)
        notes.append("The best trial was scored by another process or run; its model was made again here.")
    if maker.activations is not None:
        notes.append(str(maker.activations))
    candidate, shrunk = maker.prove(candidate)
    final_score = None
    if request.finetune_best is not None:
        try:
            candidate, final_score = maker.finish(candidate, request.finetune_best)
        except (SearchError, KeyboardInterrupt) as error:  # hours of searching are not thrown away for it
            said = "it was interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
            notes.append(f"The best candidate was not trained on ({said}); it is as the search found it.")
            logger.warning("%s", notes[-1], exc_info=error)
    after = candidate.after
    groups = maker.space.budget.groups
    measuring = LatencyOptions.parse(request.target_latency, request.device, False)
    with only_measurement() if measuring.device is not None else nullcontext():
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
        method=name_of(find_method(request.method)),
        targets={str(limit.resource): limit.share for limit in maker.space.budget.limits},
        seed=maker.seed,
        final_score=final_score,
        n_reused=running.n_reused,
        seconds=seconds,
        notes=tuple(notes),
    )
