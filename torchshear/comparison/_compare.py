"""Several criteria at the same budgets, on one model."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchshear._arguments import check_kind
from torchshear._evaluation import Evaluate
from torchshear.calibration import Loss, Progress, Statistics
from torchshear.calibration._progress import check_progress, reporting
from torchshear.comparison._contenders import Contender, budgets_of, contenders_of, random_criteria, request_of
from torchshear.comparison._record import Comparison
from torchshear.comparison._trial import Trial
from torchshear.compensation import check_compensation
from torchshear.dependency import ChannelGroups
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.groups._analyze import analyze
from torchshear.graph.capture._trace import trace
from torchshear.options import CalibrationOptions, Compensation, checked_call
from torchshear.pruners import Criterion, Ratio
from torchshear.pruners._collecting import collect
from torchshear.pruners.criteria._criterion import needs_of
from torchshear.speedup.latency._alignment_profiles import resolve_alignment


@checked_call
def compare(  # noqa: PLR0913 - independent options, given by name
    model: nn.Module,
    evaluate: Evaluate,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    criteria: Sequence[str | Criterion] | None = None,
    target_macs: float | Sequence[float] | None = None,
    target_params: float | Sequence[float] | None = None,
    ratio: float | Sequence[float] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    scope: str = "auto",
    min_ratio: Ratio = 0.0,
    max_ratio: Ratio | None = None,
    group_reduction: str = "sum",
    normalize: str = "auto",
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
) -> Comparison:
    """Prune a model by several criteria at the same budgets, and score what comes out.

    The model is traced once, and statistics are collected once for all criteria. Every pruned model is proved equal to
    the masked one before it is scored. Two controls are always there: "random", channels drawn from seeds; and
    "uniform", the network with narrower layers, all by the same share, of which the first channels are kept whatever
    their weights. A criterion that does no better than these says nothing of this model at this budget.

    Args:
        model: the model; it is left as it is.
        evaluate: called as `evaluate(model)` on a copy of the model and on each pruned one, in eval mode and from the
            same random state; gives a number, the higher the better. It may change its model, as by training.
        args: example positional arguments; a tensor counts as one argument.
        kwargs: example keyword arguments.
        criteria: names of criteria, or functions like one. None: all that can score with the data that is given.
        target_macs: multiply-accumulate operations that may be left, see `torchshear.plan`; one number or several. Half
            of them where no budget is given.
        target_params: parameters that may be left, in place of MACs; one number or several.
        ratio: share of each group's units to remove, in place of MACs; one number or several.
        seeds: seeds of the random control.
        scope: the units that are ranked against one another; see `torchshear.plan`, as for the next six.
        min_ratio: share that each group loses in any case.
        max_ratio: largest share that a group may lose.
        group_reduction: how scores of a group's members become one.
        normalize: whether scores are divided by their mean over the group.
        roles: role or roles that may shrink; None: all.
        exclude: patterns of names that stay whole.
        prunable_outputs: names of outputs that may shrink; see `torchshear.analyze`.
        submodules: names of modules to prune inside the model; see `torchshear.trace`.
        align: widths that the device runs well; see `torchshear.plan`.
        min_width: the fewest units to keep in a group.
        data: batches for criteria that look at data and for `compensate`; see `torchshear.collect`. They are taken
            once, and held.
        loss_fn: called as `loss_fn(output, target)`, for criteria that look at gradients; "dense" takes the dense
            model's own outputs as targets.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        compensate: compensation after which each model is scored once more: "refit", "statistics", "means" or
            "constants"; see `torchshear.prune`.
        memory: bytes that a refit may hold of activations in memory; None: 2 GB.
        progress: see `torchshear.collect`; what is done are criteria at budgets.

    Returns:
        A row for each criterion at each budget; `str()` of it is a table. A criterion that cannot score the model, or
        cannot meet the budget, or whose model cannot be compensated, has a row with the reason.

    Raises:
        KeywordError: an argument does not exist.
        ArgumentError: an argument is outside what it may be, or two contradict each other; a criterion is unknown;
            `evaluate` fails, or gives no finite number for the dense model.
        DataError: data or loss does not fit the model.
        CaptureError: the model cannot be traced.
        TorchshearError: no criterion and no control can be pruned by; the error of the first.
    """
    check_progress(progress)
    check_kind("evaluate", evaluate, Callable, "a function of a model that gives a number")  # type: ignore[arg-type]
    calibration = CalibrationOptions.parse(data, loss_fn, batches, compensate, memory)
    contenders, left_out = contenders_of(criteria, random_criteria(seeds), calibration)
    scoring = [one.criteria[0] for one in contenders if not one.is_control]
    calibration.check_used(scoring, compensate)
    calibration.check_parts(submodules, scoring, compensate)
    check_compensation(compensate, model, calibration.batches)
    limits: dict[str, Any] = {"min_ratio": min_ratio, "max_ratio": max_ratio, "roles": roles, "exclude": exclude}
    limits |= {"min_width": min_width, "alignment": resolve_alignment(align)}
    ranking: dict[str, Any] = {"scope": scope, "group_reduction": group_reduction, "normalize": normalize}
    budgets = budgets_of({"target_macs": target_macs, "target_params": target_params, "ratio": ratio})
    runs = [
        (one, budget, [request_of(one, criterion, budget, limits, ranking) for criterion in one.criteria])
        for budget in budgets
        for one in contenders
    ]
    calibration = calibration.holding_batches()
    with reporting(progress) as report:
        report(0, len(runs), "tracing and analysing")
        groups = analyze(trace(model, args, kwargs, submodules), prunable_outputs)
        report(0, len(runs), "collecting statistics")
        start = time.perf_counter()
        statistics = _statistics(groups, contenders, calibration)
        seconds = time.perf_counter() - start
        trial = Trial(model, evaluate, args, kwargs, groups, statistics, compensate, calibration)
        report(0, len(runs), "evaluating the dense model")
        trial.score_dense()
        rows = []
        for number, (one, budget, asked) in enumerate(runs):
            report(number, len(runs), f"{one.name}, {budget.text}")
            rows.append(trial.row(one, budget, asked))
    if trial.first_error is not None and all(row.reason for row in rows):
        raise trial.first_error
    return Comparison(
        model=type(model).__name__,
        before=trial.before,
        budgets=tuple(dict.fromkeys(row.budget for row in rows)),
        rows=tuple(rows),
        seeds=tuple(seeds),
        n_batches=statistics.n_batches if statistics else 0,
        seconds_collecting=seconds if statistics else 0.0,
        left_out=left_out,
        compensation=compensate,
    )


def _statistics(groups: ChannelGroups, contenders: Sequence[Contender], data: CalibrationOptions) -> Statistics | None:
    looking = [one.criteria[0] for one in contenders if not one.is_control and not one.lacks]
    looking = [criterion for criterion in looking if needs_of(criterion)]
    if data.loader is None or not looking:
        return None
    return collect(groups, data.loader, data.loss_fn, data.batches, progress=False, criteria=looking)
