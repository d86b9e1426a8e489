"""What shrinking gives: the smaller model, its form, and how it was proved."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from torchshear.dependency import Form, FormKind, PruningPlan
from torchshear.speedup.compensation._fold_record import Fold
from torchshear.speedup.verification import Verification


@dataclass(frozen=True, slots=True, eq=False)
class Shrunk:
    """A shrunk model and the form that it has.

    Attributes:
        model: the smaller model.
        made_by: what made its form, as a plan records it.
        plan: the plan that it was made by: the one that was given, or one that leaves some of its groups whole.
        verification: how closely it agrees with the masked model; None where that was left out, or cannot be, since
            the model is on the meta device.
        fold: what became of the constants of removed channels; None where they are zero, as without `fold_bias`.
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
        """The kind: "native", a copy of the original module with smaller tensors; "traced", the rewritten graphs."""
        return self.made_by.kind

    @property
    def reason(self) -> str:
        """Why it has this form."""
        return self.made_by.reason

    @property
    def parts(self) -> Mapping[str, FormKind]:
        """Where only parts of the model were shrunk, name of each -> its form.

        The model is a copy of the original then, in which parts in traced form stand in place of the original modules;
        `form` is "traced" if any does.
        """
        return self.made_by.parts
