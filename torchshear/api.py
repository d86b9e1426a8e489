"""The public functions that join the stages: `plan` with an alignment profile, and `prune` in one call."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from torchshear._file_size import FileTarget
from torchshear._making import MadeModel, PruneResult
from torchshear.calibration import Loss, Progress, Statistics
from torchshear.calibration._progress import check_progress
from torchshear.compensation import check_compensation
from torchshear.configs import ConfigList
from torchshear.dependency import ChannelGroups
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._process import outside_inference_mode
from torchshear.latency_target._planner import LatencyPlanner, MeasuredDense, MeasuredModel, measured_speed
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
from torchshear.pruners import Criterion, Ratio, WeightSource
from torchshear.pruners._planning import plan_units
from torchshear.pruners.selection._request import Request
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.speedup.latency._alignment_profiles import resolve_alignment


@checked_call
def plan(  # noqa: PLR0913 - independent options, given by name
    groups: ChannelGroups,
    criterion: str | Criterion = "l1",
    ratio: Ratio | None = None,
    *,
    scope: str = "auto",
    target_macs: float | None = None,
    target_params: float | None = None,
    target_size: float | str | None = None,
    min_ratio: Ratio = 0.0,
    max_ratio: Ratio | None = None,
    group_reduction: str = "sum",
    normalize: str = "auto",
    roles: str | Collection[str] | None = None,
    exclude: str | Collection[str] = (),
    align: int | str | Alignment | None = None,
    min_width: int = 1,
    weights: WeightSource = None,
    statistics: Statistics | None = None,
) -> PruningPlan:
    """Decide what to remove: a share of every channel group that may shrink, lowest scores first.

    Args:
        groups: the analysed network, from `torchshear.analyze`.
        criterion: name of a criterion ("l1", "l2", "fpgm", "bn_scale", "random", or one that looks at data) or a
            function like one. A group that it cannot score stays whole, and the plan says why.
        ratio: fraction of the units of each group to remove, in [0, 1); 0.5 by default. Or a mapping to such fractions
            from the name of a group, a pattern of module or parameter names ("layer3", "*.mlp.*"), a role ("ffn"), or
            "*" for all others. Where several keys fit a group, the first kind in this order counts. A pattern fits a
            group if it fits a layer that makes its units. Groups that no key fits stay whole.
        scope: the units that are ranked against one another. "local": those of one group, which loses its own ratio.
            "global": those of all groups, or of all that one key of `ratio` decides; scores that cannot be compared
            between groups are divided by their mean over the group. "isomorphic": those of groups with the same
            operators around them (arXiv:2407.04616). "auto": "global" for a criterion whose scores say what a removal
            costs in loss (`reconstruction`) under a target of MACs or parameters, "local" otherwise.
        target_macs: multiply-accumulate operations that may be left, in place of a ratio: a share of the dense model's
            in (0, 1], or a whole number of at least 2. The result is at most that, and as near as widths allow. Within
            a local scope all groups lose the same share, or shares in proportion to a mapping of ratios.
        target_params: parameters that may be left, likewise.
        target_size: bytes of tensors (parameters, buffers and constants, by their dtypes) that may be left: a share of
            the dense model's in (0, 1], or a text, as "2.5MB", "800KB" or "1MiB". What a file has beside tensors is not
            counted here, but by `torchshear.prune`. Of several targets all hold.
        min_ratio: share that each group loses in any case, in [0, 1), or a mapping as for `ratio`.
        max_ratio: largest share that a group may lose, likewise. None: 0.98 where groups are ranked together, and no
            limit elsewhere.
        group_reduction: how scores of a group's members become one. "sum": the criterion's own formula over the whole
            group. "filters": the same over the weights of the layers that make the units, without scales of norms.
            "mean", "max", "normalized" (mean of each member's scores over their mean) or "geometric" mean: of the
            scores of each layer, norm or table by itself. Criteria that score the group as a whole (activations, gates
            on all of its layers) give the same by "sum", "mean", "max" and "geometric".
        normalize: "mean" divides scores by their mean over the group before groups are ranked together; "none" does
            not; "auto" does where the criterion's scores mean nothing outside of their group.
        roles: role or roles that may shrink, of `torchshear.dependency.ROLES`: "heads", "head_dim" and "ffn" stand for
            narrower ones, too. None: all.
        exclude: patterns of module or parameter names, or names of groups. A group with any member that one of them
            fits stays whole.
        align: kept widths are rounded to the nearest multiple of an integer, or to what a profile ("cpu-avx2",
            "cuda-fp16", ...) or this machine runs well: by its profile ("auto"), or as measured here ("measured"),
            which takes seconds once. None: any width.
        min_width: the fewest units to keep in a group.
        weights: tensors to score, for a model on the meta device: the folder of a checkpoint in safetensors, of which
            one tensor is read at a time; or a mapping from parameter names to tensors, likewise. None: the tensors of
            the model that was traced.
        statistics: sums over data, from `torchshear.collect`; needed by criteria of activations ("apoz",
            "mean_activation", "activation_variance", "wanda") and of gradients ("taylor", "taylor_bn", "group_fisher",
            "retrain_free", "sensitivity", "snip", "snip_momentum", "gradient").

    Returns:
        The plan. Nothing is changed. It says of every group that stays whole why.

    Raises:
        KeywordError: an argument does not exist.
        ArgumentError: unknown criterion or profile; ratio outside [0, 1), or too small to remove anything; a role, key
            or pattern that is unknown, fits nothing or decides nothing; two patterns that ask different ratios of one
            group; statistics are missing, without what the criterion needs, or of another network.
        PlanError: the target or the ratio cannot be reached under the limits; says what the best possible is, before
            anything is scored.
        WeightError: the weights are NaN, infinite, on the meta device, or not those of the network.
        CheckpointError: `weights` names a checkpoint that cannot be read.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> groups = torchshear.analyze(torchshear.trace(model, (torch.randn(1, 4),)))
        >>> torchshear.plan(groups, "l2", 0.25).groups[0].kept.size
        6
    """
    request = Request(
        criterion=criterion,
        ratio=ratio,
        scope=scope,
        target_macs=target_macs,
        target_params=target_params,
        target_size=target_size,
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        group_reduction=group_reduction,
        normalize=normalize,
        roles=roles,
        exclude=exclude,
        alignment=resolve_alignment(align),
        min_width=min_width,
    )
    return plan_units(groups, request, weights, statistics)


@checked_call
@outside_inference_mode()
def prune(  # noqa: PLR0913 - independent options, given by name
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    criterion: str | Criterion | None = None,
    ratio: Ratio | None = None,
    scope: str = "auto",
    target_macs: float | None = None,
    target_params: float | None = None,
    target_size: float | str | None = None,
    target_latency: float | str | None = None,
    device: Device | LatencyTable | None = None,
    must_be_faster: bool | None = None,
    min_ratio: Ratio = 0.0,
    max_ratio: Ratio | None = None,
    group_reduction: str = "sum",
    normalize: str = "auto",
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
) -> PruneResult:
    """Prune a model in one call: trace, analyze, plan, shrink, verify, compensate.

    Args:
        model: the model; it is left as it is.
        args: example positional arguments; a tensor counts as one argument.
        kwargs: example keyword arguments.
        criterion: name of a criterion or a function like one. One that looks at data needs `data`, and of this only
            what it looks at is summed. None: what a config says; "reconstruction" with compensate="refit", if some
            layer reads every group; else "l1".
        ratio: fraction of the units of each group to remove, in [0, 1), or a mapping; see `torchshear.plan`.
        scope: the units that are ranked against one another; see `torchshear.plan`.
        target_macs: multiply-accumulate operations that may be left, in place of a ratio: a share of the dense model's
            in (0, 1], or a whole number of at least 2.
        target_params: parameters that may be left, likewise.
        target_size: bytes that the ONNX file of the result may have at most, and its safetensors file: a share of the
            dense model's ONNX file in (0, 1], or a text, as "2.5MB" (2,500,000), "800KB" or "1MiB" (1,048,576). Real
            files are written and measured; see docs/choosing.md.
        target_latency: time that may be left on this machine, in place of a ratio: a share of the dense
            model's in (0, 1], or milliseconds, as "3.5ms". Widths are chosen exactly by a table of measured times, the
            result is measured, and the choice corrected; see docs/latency.md. Other targets may stand beside it.
        device: how that is measured, in onnxruntime or torch, or a table that was measured before; None: in
            onnxruntime, one thread, one sample. With any other request the result is measured so, and the report has
            the verdict.
        must_be_faster: whether to refuse a result that is not measurably faster than the model; None: with a target of
            latency.
        min_ratio: share that each group loses in any case; see `torchshear.plan`.
        max_ratio: largest share that a group may lose; see `torchshear.plan`.
        group_reduction: how scores of a group's members become one; see `torchshear.plan`.
        normalize: whether scores are divided by their mean over the group; see `torchshear.plan`.
        roles: role or roles that may shrink, None for all; see `torchshear.plan`.
        exclude: patterns of names that stay whole; see `torchshear.plan`.
        prunable_outputs: names of outputs that may shrink, see `torchshear.analyze`; all others keep their shapes.
        submodules: names of modules to prune inside a model that cannot be captured whole, as `["backbone"]`; see
            `torchshear.trace`.
        config: a config list of NNI or Neural Compressor, or the path of a file of one, in place of a ratio, a target
            and all that says what may shrink. With a target of latency its shares are the most that may go; see
            docs/config-lists.md.
        align: widths that the device runs well; see `torchshear.plan`. With a target of latency None is "auto".
        min_width: the fewest units to keep in a group.
        data: batches for criteria that look at activations or gradients, and for `compensate`, which ignores targets
            in them; see `torchshear.collect` for their form.
        loss_fn: called as `loss_fn(output, target)`, for criteria that look at gradients; "dense" takes the dense
            model's own outputs as targets.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        compensate: how the shrunk model, once proved, is brought nearer to its original without training or labels.
            "refit" fits every layer in closed form to give what it gave before, on some hundred samples of data;
            "statistics" gives batch norms new statistics of the data; "means" lets a removed channel count for what it
            is on average over the data, and "constants" for what it holds without input, rather than for zero. "none":
            not at all. `torchshear.compensate` does one after another; see docs/compensation.md.
        memory: bytes that a refit may hold of activations in memory; those beyond go to files. None: 2 GB.
        progress: how runs over `data`, and over widths that are measured, are shown; see `torchshear.collect`.
        form: form of the result. "native": a copy of the model's own class; where only whole groups give that, they
            stay whole at any cost. "traced": the rewritten graphs. "auto": native where leaving groups whole costs at
            most a tenth of what the cut saves, in parameters and MACs; traced elsewhere.

    Returns:
        The pruned model with its plan and report. A model in which nothing can shrink comes back as a copy, and the
        report says why.

    Raises:
        KeywordError: an argument does not exist.
        ArgumentError: an argument is outside what is accepted, or contradicts another; the criterion or the
            compensation needs data or a loss that is not given, or nothing looks at the data that is.
        DataError: the data or the loss does not fit the model.
        CaptureError: torch.export cannot capture the model; says which submodules it can.
        WeightError: the weights cannot be scored.
        ExportError: the model cannot be exported, which a measurement in onnxruntime needs.
        LatencyError: the runtime does not run it.
        NotFasterError: the result is not measurably faster, and must be.
        PlanError: the ratio or target cannot be reached; or `form="native"`, and there is no native form.
        VerificationError: the shrunk model is not equal to the masked one, or the compensated one does not compute what
            was fitted or folded; nothing is returned then.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> torchshear.prune(model, torch.randn(1, 4), ratio=0.5).model[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    check_criterion(criterion)
    check_progress(progress)
    measuring = LatencyOptions.parse(target_latency, device, must_be_faster)
    request = Request(
        criterion="l1" if criterion is None else criterion,
        ratio=ratio,
        scope=scope,
        target_macs=target_macs,
        target_params=target_params,
        target_size=target_size,
        target_latency=target_latency,
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        group_reduction=group_reduction,
        normalize=normalize,
        roles=roles,
        exclude=exclude,
        alignment=resolve_alignment(
            "auto" if align is None and target_latency is not None else align, measuring.device
        ),
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
    options = options.under_config(model, groups)
    size, options = FileTarget.of(options, model, groups, args, kwargs)
    with ExitStack() as stack:
        measured: MeasuredModel | None = None
        if target_latency is not None and measuring.given is not None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="torchshear-")))
            targets = (target_latency,)
            dense = MeasuredDense.of(options, targets, model, groups, args, kwargs, measuring.given, folder)
            measured = MeasuredModel.of(options, groups, dense)

        def make(options: PruneOptions) -> MadeModel:
            if measured is None:
                return MadeModel.of(model, options, Planner.of(options, groups), args, kwargs)
            return MadeModel.of(model, options, LatencyPlanner.of(options.request, measured), args, kwargs)

        made = make(options) if size is None else size.meet(options, make)
        latency = measured_speed(model, made.after.model, groups, args, kwargs, measuring, measured)
    return made.to_result(latency)
