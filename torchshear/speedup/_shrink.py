"""Apply a plan to a model: to the whole of it, or to the parts of it that the plan is for; and prove the result."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from torchshear._arguments import check_flag, check_one_of
from torchshear.dependency import ChannelGroups, FormKind, PruningPlan
from torchshear.errors import VerificationError
from torchshear.graph import ExampleInputs, is_on_meta, run_exclusively
from torchshear.speedup._result import Shrunk
from torchshear.speedup.compensation._fold import fold_constants
from torchshear.speedup.shrinking._parts import shrink_parts
from torchshear.speedup.shrinking._whole_groups import Leave
from torchshear.speedup.shrinking._whole_model import Made, analysis_of, shrink_whole
from torchshear.speedup.verification import verify_analyzed


def shrink(
    model: nn.Module,
    plan: PruningPlan,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    fold_bias: bool = False,
    verify: bool = True,
) -> nn.Module:
    """Cut a model to what a plan keeps, and prove the result.

    The result keeps names, dtypes, devices, ties, `requires_grad` and the mode of the original, which is unchanged.
    The plan that `torchshear.prune` gave records the form of its result, with all attributes and hooks that were set:
    that form is made again, and once it has loaded the `state_dict` of the result it is that model. A plan that records
    none, as one of `torchshear.plan`, has its form looked for.

    Args:
        model: the model that the plan was made for, or a fresh one of the same class and configuration.
        plan: what to keep.
        args: example positional arguments to trace and to prove with, a tensor for one; left away, those of the plan.
            A plan from a file has the integers and truth values that it was made with, and random numbers.
        kwargs: example keyword arguments, likewise.
        fold_bias: whether a removed channel counts for the constant that its norm's shift or its bias makes of it,
            rather than for zero. The constants go into the biases of the layers that read them, and the result is
            proved; see `torchshear.speedup.fold_constants` for where that can be. No tensor changes its shape.
        verify: whether to prove that the result is the masked model, as `torchshear.verify` does. A model on the meta
            device has no values to compare, and is not proved.

    Returns:
        A new, smaller model. Of a plan for parts: a copy of the whole model with smaller parts.

    Raises:
        PlanError: the plan is for another model, or the form that it records is not equal to the rewritten graph.
        CaptureError: the model cannot be traced.
        VerificationError: the result is not the masked model; or the folded one not the original with constants on the
            removed channels.
        WeightError: constants of a model on the meta device are to be folded.
    """
    return shrink_to_form(model, plan, args, kwargs, fold_bias=fold_bias, verify=verify).model


@run_exclusively()
def shrink_to_form(
    model: nn.Module,
    plan: PruningPlan,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    form: FormKind | None = None,
    fold_bias: bool = False,
    verify: bool = True,
    leave: Leave | None = None,
) -> Shrunk:
    """As `shrink`, and say which form the result has; or insist on one form, of all parts where the plan has some.

    With `leave`, groups may stay whole where only that gives the native form; `plan` of the result is then another.
    `verification` of the result says how closely it agrees with the masked model, before constants are folded; `fold`
    says which were.

    Raises:
        PlanError: the plan is for another model, or the form that is asked for or recorded is not equal to the
            rewritten graph.
        CaptureError: the model cannot be traced.
        VerificationError: the result is not the masked model.
    """
    check_flag("fold_bias", fold_bias)
    check_flag("verify", verify)
    if form is not None:
        check_one_of("form", form, ("native", "traced"))
    groups = analysis_of(model, plan, args, kwargs)
    made = _make(model, groups, plan, form, leave)
    if verify and not is_on_meta(model):
        given = (
            ExampleInputs.of(() if args is None else args, kwargs) if args is not None or kwargs is not None else None
        )
        shrunk = _proved(model, groups, plan, made, given, is_free=form is None and plan.form is None)
    else:
        shrunk = Shrunk(made.model, made.form, made.plan)
    return fold_constants(model, shrunk, shrunk.plan, args, kwargs) if fold_bias else shrunk


def _make(
    model: nn.Module, groups: ChannelGroups, plan: PruningPlan, kind: FormKind | None, leave: Leave | None = None
) -> Made:
    cut_down = shrink_whole if groups.graph.parts is None else shrink_parts
    return cut_down(model, groups, plan, kind, leave)


def _proved(
    model: nn.Module,
    groups: ChannelGroups,
    plan: PruningPlan,
    made: Made,
    given: ExampleInputs | None,
    *,
    is_free: bool,
) -> Shrunk:
    """A shrunk model with its proof; a native form that fails gives way to the traced one, if the form `is_free`.

    Raises:
        VerificationError: the model is not the masked one.
    """
    try:
        proof = verify_analyzed(model, made.model, made.plan, groups, given, training=made.training)
        return Shrunk(made.model, made.form, made.plan, proof)
    except VerificationError:
        if made.form.kind == "traced" or not is_free:
            raise
    traced = _make(model, groups, plan, "traced")
    verification = verify_analyzed(model, traced.model, plan, groups, given, training=traced.training)
    reason = traced.form.reason.replace(
        "asked for", "its own forward is not the masked model on the smaller tensors", 1
    )
    return Shrunk(traced.model, replace(traced.form, reason=reason), plan, verification)
