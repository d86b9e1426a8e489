"""Apply a plan to a model: to the whole of it, or to the parts of it that the plan is for."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from torchshear.dependency import PruningPlan
from torchshear.speedup._fold import fold_constants
from torchshear.speedup._parts import shrink_parts
from torchshear.speedup._shrink import Shrunk, analysis_of, shrink_whole


def shrink(
    model: nn.Module,
    plan: PruningPlan,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    fold_bias: bool = False,
) -> nn.Module:
    """Cut a model to what a plan keeps.

    The result keeps names, dtypes, devices, ties, `requires_grad` and the mode of the original, which is unchanged.

    Args:
        model: the model that the plan was made for, or a fresh one of the same class and configuration.
        plan: what to keep.
        args: example arguments to trace with, if the plan does not describe them.
        kwargs: example keyword arguments, likewise.
        fold_bias: whether a removed channel counts for the constant that its norm's shift or its bias makes of it,
            rather than for zero. The constants go into the biases of the layers that read them, and the result is
            proved; see `torchshear.speedup.fold_constants` for where that can be. No tensor changes its shape.

    Returns:
        A new, smaller model. Of a plan for parts: a copy of the whole model with smaller parts.

    Raises:
        PlanError: the plan is for another model.
        CaptureError: the model cannot be traced.
        VerificationError: the folded model is not the original with constants on the removed channels.
        WeightError: constants of a model on the meta device are to be folded.
    """
    return shrink_to_form(model, plan, args, kwargs, fold_bias=fold_bias).model


def shrink_to_form(
    model: nn.Module,
    plan: PruningPlan,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    form: Literal["native", "traced"] | None = None,
    fold_bias: bool = False,
) -> Shrunk:
    """As `shrink`, and say which form the result has; or insist on one form, of all parts where the plan has some.

    `fold` of the result says which constants were folded.

    Raises:
        PlanError: the plan is for another model, or `form="native"` is not equal to the rewritten graph.
        CaptureError: the model cannot be traced.
    """
    groups = analysis_of(model, plan, args, kwargs)
    cut_down = shrink_whole if groups.graph.parts is None else shrink_parts
    shrunk = cut_down(model, groups, plan, form)
    return fold_constants(model, shrunk, plan, args, kwargs) if fold_bias else shrunk
