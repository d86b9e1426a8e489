"""The result of a training: the small model, proved to be the masked one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchshear._arguments import check_one_of
from torchshear._making import PruneResult, shrink_and_record
from torchshear.dependency.groups._analyze import analyze
from torchshear.graph.capture._trace import trace
from torchshear.latency_target._planner import measured_speed
from torchshear.options import Form, LatencyOptions
from torchshear.pruners.masks import plan_from_masks
from torchshear.pruners.schedules import History
from torchshear.report import make_report
from torchshear.training._masked_model import MaskedModel
from torchshear.training._renewing import MaskRenewer


def make_result(
    model: MaskedModel,
    renewer: MaskRenewer,
    inputs: tuple[tuple[Any, ...] | Tensor, Mapping[str, Any] | None],
    form: Form,
    n_steps: int,
    history: History,
    measuring: LatencyOptions,
) -> PruneResult:
    """Make the small model of one that was trained, in its full size, so that the plan is for the original.

    Args:
        model: the model with its masks.
        renewer: knows what is gone.
        inputs: example positional arguments, and those by keyword.
        form: form of the result.
        n_steps: steps of the optimizer that were made, which the plan says.
        history: what was asked for and reached.
        measuring: the device on which the result is measured, if any.

    Raises:
        ArgumentError: the form is unknown.
        MaskError: the model has changed its structure.
        VerificationError: the small model is not equal to the masked one; nothing is returned then.
    """
    check_one_of("form", form, ("auto", "native", "traced"))
    model.check_structure()
    args, kwargs = inputs
    dense = model.dense_copy()
    plan = renewer.goal.plan(renewer.choice, {"schedule": repr(renewer.schedule), "steps": n_steps})
    if plan is None:
        plan = plan_from_masks(analyze(trace(dense, args, kwargs)))
    shrunk, made = shrink_and_record(dense, plan, args, kwargs, None if form == "auto" else form)
    goal = renewer.goal
    latency = measured_speed(dense, shrunk.model, goal.groups, args, kwargs, measuring)
    report = make_report(made, f"{shrunk.form}: {shrunk.reason}", shrunk.parts, latency=latency)
    return PruneResult(
        shrunk.model,
        made,
        report,
        shrunk.verification,
        shrunk.form,
        config=goal.resolved,
        latency=latency,
        allocation=goal.allocation(made, latency),
        history=history,
    )
