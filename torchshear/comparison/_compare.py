"""Several criteria at the same budgets, on one model."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final, Unpack

from torch import nn

from torchshear._arguments import check_callback, check_kind
from torchshear._asking import Data, check_looked_at, read_data
from torchshear._words import Comparing, check_keywords
from torchshear.calibration import Statistics
from torchshear.comparison._asked import Contender, budgets_of, contenders_of, random_criteria, request_of
from torchshear.comparison._record import Comparison
from torchshear.comparison._trial import Evaluate, Trial
from torchshear.dependency import ChannelGroups, analyze
from torchshear.graph import trace
from torchshear.pruners import Criterion, collect
from torchshear.pruners.criteria import needs_of

_ARGUMENTS: Final = "model, evaluate, args, kwargs, criteria, seeds, progress"


def compare(
    model: nn.Module,
    evaluate: Evaluate,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    criteria: Sequence[str | Criterion] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[str], None] | None = None,
    **words: Unpack[Comparing],
) -> Comparison:
    """Prune a model by several criteria at the same budgets, and score what comes out.

    The model is traced once, and statistics are collected once for all criteria. Every pruned model is proved equal to
    the masked one before it is scored. Two controls are always there: "random", channels drawn from seeds; and
    "uniform", the network with narrower layers, all by the same share, of which the first channels are kept whatever
    their weights. A criterion that does no better than these says nothing of this model at this budget.

    Args:
        model: the model; it is left as it is.
        evaluate: called as `evaluate(model)` on a copy of the model and on each pruned one, in eval mode and from the
            same random state; gives a number, the higher the better. It may change what it is given, as by training.
        args: example positional arguments.
        kwargs: example keyword arguments.
        criteria: names of criteria, or functions like one. None: all that can score with the data that is given.
        seeds: seeds of the random control.
        progress: told in words what is being done.
        **words: the budgets, one of `target_macs` (left away, 0.5), `target_params` and `ratio`, each a number or
            several; `scope`, `min_ratio`, `max_ratio`, `combine`, `normalize`, `align`, `min_width`, `axes`, `exclude`
            as for `torchshear.plan`; `prunable_outputs`, `submodules`, `data`, `loss_fn`, `batches` and `recalibrate`
            as for `torchshear.prune`. The batches are taken from `data` once, and held.

    Returns:
        A row for each criterion at each budget; `str()` of it is a table. A criterion that cannot score the model, or
        cannot meet the budget, has a row with the reason.

    Raises:
        ArgumentError: a word is outside what it may be, or two contradict each other; a criterion is unknown;
            `evaluate` fails, or gives no finite number for the dense model.
        DataError: data or loss does not fit the model.
        CaptureError: the model cannot be traced.
        TorchshearError: no criterion and no control can be pruned by; the error of the first.
    """
    check_keywords("compare", words, Comparing, _ARGUMENTS)
    check_callback("progress", progress)
    check_kind("evaluate", evaluate, Callable, "a function of a model that gives a number")  # type: ignore[arg-type]
    say = (lambda text: None) if progress is None else progress
    data = read_data(words)
    recalibrates = words.get("recalibrate", False)
    contenders, left_out = contenders_of(criteria, random_criteria(seeds), data)
    check_looked_at([one.criteria[0] for one in contenders if not one.is_control], data, recalibrates)
    runs = [
        (one, b, [request_of(one, c, b, words) for c in one.criteria]) for b in budgets_of(words) for one in contenders
    ]
    if data.loader is not None:  # once, so that all see the same batches whatever the loader does
        data = replace(data, loader=list(islice(data.loader, data.batches)))
    say("tracing and analysing")
    groups = analyze(trace(model, args, kwargs, words.get("submodules")), words.get("prunable_outputs", ()))
    say("collecting statistics")
    start = time.perf_counter()
    statistics = _statistics(groups, contenders, data)
    seconds = time.perf_counter() - start
    trial = Trial(model, evaluate, args, kwargs, groups, statistics, data if recalibrates else None)
    say("evaluating the dense model")
    trial.score_dense()
    rows = []
    for number, (one, budget, asked) in enumerate(runs, 1):
        say(f"{one.name}, {budget.text} ({number} of {len(runs)})")
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
    )


def _statistics(groups: ChannelGroups, contenders: Sequence[Contender], data: Data) -> Statistics | None:
    looking = [one.criteria[0] for one in contenders if not one.is_control and not one.lacks]
    looking = [criterion for criterion in looking if needs_of(criterion)]
    if data.loader is None or not looking:
        return None
    return collect(groups, data.loader, data.loss_fn, data.batches, progress=False, criteria=looking)
