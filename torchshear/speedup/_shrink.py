"""Shrinking a model, or parts of it, by a plan, proving the result, and returning it with form and proof."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from torchshear._arguments import check_flag, check_one_of
from torchshear.dependency.plans._form import Form, FormKind
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import VerificationError
from torchshear.graph import ExampleInputs
from torchshear.graph.model._meta import is_on_meta
from torchshear.graph.model._process import run_exclusively
from torchshear.speedup.compensation._fold_record import Fold
from torchshear.speedup.shrinking._parts import shrink_parts
from torchshear.speedup.shrinking._prepared_cut import analyze_planned
from torchshear.speedup.shrinking._whole_groups import NativeTradeoff
from torchshear.speedup.shrinking._whole_model import shrink_whole
from torchshear.speedup.verification._verify import Verification, verify_analyzed


@dataclass(frozen=True, slots=True, eq=False)
class Shrunk:
    """A shrunk model with its form.

    Attributes:
        model: the smaller model.
        made_by: its form, as a plan records it.
        plan: the plan that it was made by: the one that was given, or one that leaves some of its groups whole.
        verification: how closely it agrees with the masked model; None if that was not asked for, or if the model is on
            the meta device.
        fold: the folded constants of removed channels, from `fold_constants`; None if they count as zero.
    """

    model: nn.Module
    made_by: Form
    plan: PruningPlan
    verification: Verification | None = None
    fold: Fold | None = None

    def __repr__(self) -> str:
        return f"<Shrunk: {self.form} {type(self.model).__name__}>"

    @property
    def form(self) -> FormKind:
        """The kind of its form: "native", a smaller copy of the original module; "traced", the rewritten graphs."""
        return self.made_by.kind

    @property
    def reason(self) -> str:
        """The reason for its form."""
        return self.made_by.reason

    @property
    def parts(self) -> Mapping[str, FormKind]:
        """Name of each shrunk part -> its form; empty if the whole model was shrunk.

        In a copy of the original, parts in traced form then replace the original modules; `form` is "traced" if any
        does.
        """
        return self.made_by.parts


def shrink(
    model: nn.Module,
    plan: PruningPlan,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> nn.Module:
    """Shrink a model to the units that a plan keeps, and prove the result.

    The result keeps names, dtypes, devices, ties, `requires_grad` and the mode of the original, which is unchanged.
    A plan from `torchshear.prune` records the form of its result, with all attributes and hooks that were set. That
    form is made again; after it has loaded the `state_dict` of the result it is that model. For a plan without a
    recorded form, as from `torchshear.plan`, the form is searched.

    Args:
        model: the model that the plan was made for, or a fresh one of the same class and configuration.
        plan: the plan.
        args: example positional arguments to trace and to prove with, a tensor for one; None for those of the plan. A
            plan from a file has the integers and truth values that it was made with, and random numbers.
        kwargs: example keyword arguments, likewise.
        verify: whether to prove that the result is the masked model, as `torchshear.verify` does. A model on the meta
            device has no values to compare, and is not proved.

    Returns:
        A new, smaller model. Of a plan for parts: a copy of the whole model with smaller parts.

    Raises:
        PlanError: the plan is for another model, or the form that it records is not equal to the rewritten graph.
        CaptureError: the model cannot be traced.
        VerificationError: the result is not the masked model.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, torch.randn(1, 4))), ratio=0.5)
        >>> torchshear.shrink(model, plan)[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    return shrink_to_form(model, plan, args, kwargs, verify=verify).model


@run_exclusively()
def shrink_to_form(
    model: nn.Module,
    plan: PruningPlan,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    form: FormKind | None = None,
    verify: bool = True,
    tradeoff: NativeTradeoff | None = None,
) -> Shrunk:
    """Shrink a model as `shrink` does, and return it with its form and its proof.

    Args:
        model: the model that the plan was made for, or a fresh one of the same class and configuration.
        plan: the plan.
        args: example positional arguments to trace and to prove with, a tensor for one; None for those of the plan.
        kwargs: example keyword arguments, likewise.
        form: the form that the result must have, in all parts if the plan has some; None for the one that the plan
            records, else native if possible.
        verify: whether the result is proved; see `shrink`.
        tradeoff: permission to leave groups whole if only that gives the native form; `plan` of the result then
            differs from the plan that is given.

    Returns:
        The model, its form, its plan and its verification.

    Raises:
        PlanError: the plan is for another model, or the form that is asked for or recorded is not equal to the
            rewritten graph.
        CaptureError: the model cannot be traced.
        VerificationError: the result is not the masked model.
    """
    check_flag("verify", verify)
    if form is not None:
        check_one_of("form", form, ("native", "traced"))
    groups = analyze_planned(model, plan, args, kwargs)
    shrink_any = shrink_whole if groups.graph.parts is None else shrink_parts
    small = shrink_any(model, groups, plan, form, tradeoff)
    if verify and not is_on_meta(model):
        is_given = args is not None or kwargs is not None
        inputs = ExampleInputs.of(() if args is None else args, kwargs) if is_given else None
        try:
            proof = verify_analyzed(model, small.model, small.plan, groups, inputs, training=small.training)
        except VerificationError:
            if small.form.kind == "traced" or form is not None or plan.form is not None:
                raise
            # A native form that was found, and not asked for, gives way to the traced one.
            small = shrink_any(model, groups, plan, "traced", None)
            reason = small.form.reason.replace(
                "asked for", "its own forward is not the masked model on the smaller tensors", 1
            )
            small = replace(small, form=replace(small.form, reason=reason))
            proof = verify_analyzed(model, small.model, plan, groups, inputs, training=small.training)
        return Shrunk(small.model, small.form, small.plan, proof)
    return Shrunk(small.model, small.form, small.plan)
