"""Result of shrinking: the smaller model, its form, and its proof."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from torchshear.dependency.plans._form import Form, FormKind
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.speedup.compensation._fold_record import Fold
from torchshear.speedup.verification._verify import Verification


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
