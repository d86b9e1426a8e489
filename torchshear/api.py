"""The public functions that join the stages: plan with an alignment profile, and prune in one call."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

from torch import nn

from torchshear._asking import ask
from torchshear._words import Choice, Selection, check_keywords
from torchshear.calibration import Statistics
from torchshear.calibration._loader import LikeExample
from torchshear.configs import ResolvedConfig
from torchshear.dependency import ChannelGroups, FormKind, PruningPlan, analyze
from torchshear.dependency.alignment import Alignment
from torchshear.graph import outside_inference_mode, trace
from torchshear.pruners import Criterion, Ratio, Request, WeightSource, plan_units
from torchshear.report import PruningReport, make_report
from torchshear.speedup import (
    Fold,
    Leave,
    Shrunk,
    Verification,
    check_recalibration,
    fold_constants,
    recalibrate,
    resolve_alignment,
    shrink_to_form,
)

__all__ = ["Choice", "PruneResult", "Selection", "plan", "prune"]

_PLAN_ARGUMENTS = "groups, criterion, ratio, align, min_width, axes, exclude, weights, statistics"
_PRUNE_ARGUMENTS = "model, args, kwargs, criterion, ratio, align, min_width, fold_bias"


@dataclass(frozen=True, slots=True, eq=False)
class PruneResult:
    """What `prune` gives.

    Attributes:
        model: the pruned model, really smaller.
        plan: what was kept, and what made the form of the model; can be saved and replayed on a fresh model.
        report: requested and achieved ratio, parameters and MACs before and after, group by group.
        verification: how closely the pruned model agrees with the masked one; None for a model on the meta device,
            which has no values to compare.
        form: "native", a copy of the original module; or "traced", the rewritten graphs. Where parts were pruned,
            "traced" if any of them is; `report.parts` has the form of each.
        fold: where the constants of removed channels went; None without `fold_bias`. The verification is of the model
            before that, and `fold.max_error` of the model after it.
        config: what the config asks of each layer; None without one. `str()` of it is a table.
        is_recalibrated: whether batch norms got new statistics, after all that was proved.
    """

    model: nn.Module
    plan: PruningPlan
    report: PruningReport
    verification: Verification | None
    form: str
    fold: Fold | None = None
    config: ResolvedConfig | None = None
    is_recalibrated: bool = False

    def __repr__(self) -> str:
        proof = "not verified" if self.verification is None else f"max_error {self.verification.max_error:.2g}"
        return f"<PruneResult: {self.form} {type(self.model).__name__}, {self.report.changes}, {proof}>"


def plan(  # noqa: PLR0913 - independent choices, given by name
    groups: ChannelGroups,
    criterion: str | Criterion = "l1",
    ratio: Ratio | None = None,
    align: int | str | Alignment | None = None,
    min_width: int = 1,
    axes: str | Collection[str] | None = None,
    exclude: str | Collection[str] = (),
    weights: WeightSource = None,
    statistics: Statistics | None = None,
    **selection: Unpack[Selection],
) -> PruningPlan:
    """Decide what to remove: a share of every channel group that may shrink, lowest scores first.

    Args:
        groups: the analysed network, from `torchshear.analyze`.
        criterion: name of a criterion ("l1", "l2", "fpgm", "bn_scale", "random", or one that looks at data) or a
            function like one. A group of which it has nothing to say stays whole, and the plan says why.
        ratio: fraction of the units of each group to remove, in [0, 1), left away 0.5; or a mapping from what it is
            for: the name of a group, a pattern of module or parameter names ("layer3", "*.mlp.*"), a role ("ffn"), or
            "*" for all others. Where several keys fit a group, the first kind in this order counts. A pattern fits a
            group if it fits a layer that makes its units. Groups that no key fits stay whole.
        align: kept widths are rounded to the nearest multiple of an integer, or to what a profile ("cpu-avx2",
            "cuda-fp16", ...) or this machine ("auto") runs well. None: any width.
        min_width: the fewest units to keep in a group.
        axes: role or roles that may shrink, of `torchshear.dependency.ROLES`: "heads", "head_dim" and "ffn" stand for
            narrower ones, too. None: all.
        exclude: patterns of module or parameter names, or names of groups. A group with any member that one of them
            fits stays whole.
        weights: what criteria look at, for a model on the meta device: the folder of a checkpoint in safetensors, of
            which one tensor is read at a time; or a mapping from parameter names to tensors, likewise. None: the
            tensors of the model that was traced.
        statistics: what was seen of the model on data, from `torchshear.collect`; needed by criteria of activations
            ("apoz", "mean_activation", "activation_variance", "wanda") and of gradients ("taylor", "taylor_bn",
            "group_fisher", "retrain_free", "sensitivity", "snip", "snip_momentum", "gradient").
        **selection: how much goes where, see `Selection`: `scope`, `target_macs`, `target_params`, `min_ratio`,
            `max_ratio`, `combine`, `normalize`.

    Returns:
        The plan. Nothing is changed. It says of every group that stays whole why.

    Raises:
        ArgumentError: unknown criterion or profile; ratio outside [0, 1), or too small to remove anything; a role, key
            or pattern that is unknown, fits nothing or decides nothing; two patterns that ask different ratios of one
            group.
        ArgumentError: statistics are missing, without what the criterion needs, or of another network.
        PlanError: the target or the ratio cannot be reached under the limits; says what the best possible is, before
            anything is scored.
        WeightError: the weights are NaN, infinite, on the meta device, or not those of the network.
        CheckpointError: `weights` names a checkpoint that cannot be read.
    """
    alignment = resolve_alignment(align)
    check_keywords("plan", selection, Selection, _PLAN_ARGUMENTS)
    request = Request(
        criterion=criterion,
        ratio=ratio,
        alignment=alignment,
        min_width=min_width,
        axes=axes,
        exclude=exclude,
        **selection,
    )
    return plan_units(groups, request, weights, statistics)


@outside_inference_mode()
def prune(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    criterion: str | Criterion | None = None,
    ratio: Ratio | None = None,
    align: int | str | Alignment | None = None,
    min_width: int = 1,
    fold_bias: bool | Literal["means"] = False,
    **choice: Unpack[Choice],
) -> PruneResult:
    """Prune a model in one call: trace, analyze, plan, shrink, verify.

    Args:
        model: the model; it is left as it is.
        args: example positional arguments.
        kwargs: example keyword arguments.
        criterion: name of a criterion or a function like one; None: "l1", or what a config says. One that looks at data
            needs `data`, and of this only what it looks at is summed.
        ratio: fraction of the units of each channel group to remove, in [0, 1), or a mapping; see `torchshear.plan`.
        align: see `torchshear.plan`.
        min_width: the fewest units to keep in a group.
        fold_bias: whether removed channels count for their constants rather than for zeros, see `torchshear.shrink`;
            or "means", for what they are on average over `data`.
        **choice: what may shrink: `axes` and `exclude` as for `torchshear.plan`, `prunable_outputs` as for
            `torchshear.analyze`. Without them every group may, and every output keeps its shape. `submodules` as for
            `torchshear.trace`, as `["backbone"]`: only these modules, inside the whole model. And how much goes where:
            `scope`, `target_macs`, `target_params` and the other words of `torchshear.plan`; or in place of all these
            and of the ratio `config`, a config list or the path of one. `data`, `loss_fn` and `batches` as for
            `torchshear.collect`; `recalibrate=True` gives batch norms new statistics of the same data in the end.
            `form` as in `Choice`: the model's own class where that costs little, or one form in any case.

    Returns:
        The pruned model with its plan and report. A model in which nothing can shrink comes back as a copy, and the
        report says why.

    Raises:
        ArgumentError: an argument is outside what is accepted, or contradicts another; the criterion needs data or a
            loss that is not given, or nothing looks at the data that is.
        DataError: the data or the loss does not fit the model.
        CaptureError: torch.export cannot capture the model; says which submodules it can.
        WeightError: the weights cannot be scored.
        PlanError: what is asked cannot be reached; or `form="native"`, and there is no native form.
        VerificationError: the shrunk model is not equal to the masked one, or with folded constants not to the original
            with those constants; nothing is returned then.
    """
    check_keywords("prune", choice, Choice, _PRUNE_ARGUMENTS)
    asked = ask(criterion, ratio, resolve_alignment(align), min_width, choice, fold_bias)
    if asked.recalibrates:
        check_recalibration(model, asked.data.batches)
    groups = analyze(trace(model, args, kwargs, choice.get("submodules")), choice.get("prunable_outputs", ()))
    planning = asked.planning(model, groups)
    shrunk, made = shrink_and_record(model, planning.plan(), args, kwargs, *asked.form_of(planning))
    if fold_bias:
        shrunk = fold_constants(model, shrunk, made, means=asked.means(groups))
    small = shrunk.model
    if asked.recalibrates:
        assert asked.data.loader is not None, "checked before the model was traced"
        loader = LikeExample(asked.data.loader, (args, dict(kwargs or {})))
        small = recalibrate(small, loader, asked.data.batches, progress=False)
    report = make_report(made, f"{shrunk.form}: {shrunk.reason}", shrunk.parts)
    return PruneResult(
        small, made, report, shrunk.verification, shrunk.form, shrunk.fold, planning.resolved, asked.recalibrates
    )


def shrink_planned(
    model: nn.Module, plan: PruningPlan, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> PruneResult:
    """Shrink a model by a plan that was made elsewhere, prove the result and report on it.

    Raises:
        PlanError: the plan is not of this model.
        VerificationError: the shrunk model is not equal to the masked one.
    """
    shrunk, plan = shrink_and_record(model, plan, args, kwargs)
    report = make_report(plan, f"{shrunk.form}: {shrunk.reason}", shrunk.parts)
    return PruneResult(shrunk.model, plan, report, shrunk.verification, shrunk.form)


def shrink_and_record(
    model: nn.Module,
    made: PruningPlan,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    form: FormKind | None = None,
    leave: Leave | None = None,
) -> tuple[Shrunk, PruningPlan]:
    """Shrink and prove, and write into the plan what made the form of the result."""
    shrunk = shrink_to_form(model, made, args, kwargs, form, leave=leave)
    return shrunk, replace(shrunk.plan, form=shrunk.made_by)
