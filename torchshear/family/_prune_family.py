"""`prune_family`: one model for several targets of latency."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from torchshear._arguments import check_flag, check_kind, quote
from torchshear._evaluation import Evaluate, score_model
from torchshear._file_size import FileTarget
from torchshear.calibration import Loss, Progress
from torchshear.calibration._progress import check_progress
from torchshear.compensation import check_compensation
from torchshear.configs import ConfigList
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.groups._analyze import analyze
from torchshear.errors import ArgumentError
from torchshear.family._members import MemberMaker, pair_of
from torchshear.family._record import PrunedFamily
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import outside_inference_mode
from torchshear.latency_target._planner import RESULT_ROUNDS, MeasuredDense, MeasuredModel
from torchshear.options import (
    CalibrationOptions,
    Compensation,
    Form,
    LatencyOptions,
    PruneOptions,
    check_criterion,
    checked_call,
)
from torchshear.pruners import Criterion, Ratio
from torchshear.pruners.selection._latency import parse_latency
from torchshear.pruners.selection._request import Request
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.speedup.latency._alignment_profiles import resolve_alignment

LatencyTargets = Sequence[float | str]


@checked_call
@outside_inference_mode()
def prune_family(  # noqa: PLR0913 - independent options, given by name
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    targets: LatencyTargets,
    evaluate: Evaluate | None = None,
    criterion: str | Criterion | None = None,
    ratio: Mapping[str, float] | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    target_size: float | str | None = None,
    device: Device | LatencyTable | None = None,
    must_be_faster: bool = True,
    min_ratio: Ratio = 0.0,
    max_ratio: Ratio | None = None,
    group_reduction: str = "sum",
    roles: str | Collection[str] | None = None,
    exclude: str | Collection[str] = (),
    prunable_outputs: str | Collection[str] = (),
    submodules: Sequence[str] | None = None,
    config: ConfigList | None = None,
    align: int | str | Alignment | None = None,
    min_width: int = 1,
    data: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
    batches: int | None = None,
    compensate: Compensation = "none",
    memory: int | None = None,
    progress: Progress = True,
    form: Form = "auto",
) -> PrunedFamily:
    """Prune a model for several latencies at once: one table, one set of statistics, one member for each target.

    Each member is what `torchshear.prune(model, target_latency=...)` gives: widths chosen exactly, corrected by
    measuring, shrunk, proved and compensated. The model is traced once, the table is measured once, data is run for
    scores once, and what one target taught about the table's error is where the next one begins. In the end the dense
    model and all members are measured in the same rounds, so that their times compare.

    Args:
        model: the model; it is left as it is.
        args: example positional arguments; a tensor counts as one argument.
        kwargs: example keyword arguments.
        targets: latencies that may be left, each as `target_latency` of `torchshear.prune`: a share of the dense
            model's in (0, 1], or milliseconds, as "3.5ms"; each once. Work begins with the longest.
        evaluate: called as `evaluate(model)` on copies of the dense model and of each member, in eval mode and from the
            same random state; gives a number, the higher the better. None: members are not scored.
        criterion: name of a criterion or a function like one; see `torchshear.prune`.
        ratio: a mapping that says which groups may shrink; see `torchshear.plan`.
        target_macs: multiply-accumulate operations that every member may have at most; see `torchshear.plan`.
        target_params: parameters that every member may have at most, likewise.
        target_size: bytes that the files of every member may have at most; see `torchshear.prune`.
        device: how latency is measured, or a table that was measured before; None: one thread, one sample.
        must_be_faster: whether to refuse a family with a member that is not measurably faster than the model; known as
            soon as the member is made.
        min_ratio: share that each group loses in any case; see `torchshear.plan`, as for the next seven.
        max_ratio: largest share that a group may lose.
        group_reduction: how scores of a group's members become one.
        roles: role or roles that may shrink; None: all.
        exclude: patterns of names that stay whole.
        prunable_outputs: names of outputs that may shrink; see `torchshear.analyze`.
        submodules: names of modules to prune inside the model; see `torchshear.trace`.
        config: a config list, whose shares are the most that may go; see `torchshear.prune`.
        align: widths that the device runs well; None is "auto".
        min_width: the fewest units to keep in a group.
        data: batches for criteria that look at data, and for `compensate`. They are taken once, and held.
        loss_fn: loss for criteria that look at gradients; see `torchshear.prune`.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        compensate: how each shrunk model is brought nearer to its original; see `torchshear.prune`.
        memory: bytes that a refit may hold of activations in memory; None: 2 GB.
        progress: see `torchshear.collect`; what is done are widths of the table, batches, and steps of members.
        form: form of the members: "auto", "native" or "traced"; see `torchshear.prune`.

    Returns:
        The members in the order of the targets, with the times of all. `str()` of it is a table.

    Raises:
        KeywordError: an argument does not exist.
        ArgumentError: an argument is outside what is accepted, a target stands twice, or `evaluate` fails.
        PlanError: a target cannot be reached; says the fastest possible, before units are scored.
        NotFasterError: a member is not measurably faster, and must be.
        TorchshearError: whatever else `torchshear.prune` raises.

    Example:
        >>> family = torchshear.prune_family(model, x, targets=[0.7, 0.5, 0.35])  # doctest: +SKIP
        >>> family[0.5].latency.speedup("pruned")  # doctest: +SKIP
        2.04
        >>> family.draw("family.png")  # doctest: +SKIP
    """
    check_criterion(criterion)
    check_progress(progress)
    check_flag("must_be_faster", must_be_faster)
    if evaluate is not None:
        check_kind("evaluate", evaluate, Callable, "a function of a model that gives a number")  # type: ignore[arg-type]
    if ratio is not None:
        check_kind("ratio", ratio, Mapping, "a mapping from names, patterns or roles, which says what may shrink")
    names = name_targets(targets)
    measuring = LatencyOptions.parse(targets[0], device, must_be_faster)
    request = Request(
        criterion="l1" if criterion is None else criterion,
        ratio=ratio,
        target_macs=target_macs,
        target_params=target_params,
        target_size=target_size,
        target_latency=targets[0],
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        group_reduction=group_reduction,
        roles=roles,
        exclude=exclude,
        alignment=resolve_alignment("auto" if align is None else align, measuring.device),
        min_width=min_width,
    )
    options = PruneOptions.parse(
        request,
        has_criterion=criterion is not None,
        config=config,
        submodules=submodules,
        calibration=replace(CalibrationOptions.parse(data, loss_fn, batches, compensate, memory), progress=progress),
        compensate=compensate,
        form=form,
    )
    check_compensation(compensate, model, options.calibration.batches)
    groups = analyze(trace(model, args, kwargs, submodules), prunable_outputs)
    if criterion is None and compensate == "refit":
        options = options.with_reconstruction(groups)
    dense_score = None if evaluate is None else score_model(evaluate, copy_model(model), "the dense model")
    options = replace(options, calibration=options.calibration.holding_batches())
    assert measuring.given is not None, "there is a target"
    options = options.under_config(model, groups)
    size, options = FileTarget.of(options, model, groups, args, kwargs)
    with TemporaryDirectory(prefix="torchshear-") as folder:
        dense = MeasuredDense.of(options, targets, model, groups, args, kwargs, measuring.given, Path(folder))
        measured = MeasuredModel.of(options, groups, dense)
        maker = MemberMaker(model, args, kwargs, options, measured, evaluate, must_be_faster, size)
        made = maker.make(dict(zip(names, targets, strict=True)), progress)
        latency = measured.candidates.compare_all({name: one.ready for name, one in made.items()}, RESULT_ROUNDS)
    return PrunedFamily(
        model=type(model).__name__,
        targets=tuple(targets),
        members=tuple(one.made.to_result(pair_of(latency, name)) for name, one in made.items()),
        latency=latency,
        table=measured.table,
        dense_score=dense_score,
        scores=tuple(one.score for one in made.values() if one.score is not None),
    )


def name_targets(targets: object) -> tuple[str, ...]:
    """Return names for targets of latency, by which members are known: "0.5", "3.5ms".

    Raises:
        ArgumentError: there are none, one is no target, or stands twice.
    """
    if isinstance(targets, str) or not isinstance(targets, Sequence) or not targets:
        raise ArgumentError(f"targets={quote(targets)}; expected several targets of latency, as [0.7, 0.5, '3.5ms'].")
    names = []
    for target in targets:
        share, ms = parse_latency(target)
        names.append(f"{share:.10g}" if share is not None else f"{ms:.10g}ms")
        if names.index(names[-1]) < len(names) - 1:
            raise ArgumentError(f"targets={quote(targets)}: {quote(target)} stands twice; give each target once.")
    return tuple(names)
