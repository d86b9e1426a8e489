"""A cut to be made: a plan, checked, with the tensors of the model before and after."""

from dataclasses import dataclass

from torch import Tensor, nn

from torchshear.dependency import ChannelGroups, Cut, Form, PruningPlan
from torchshear.graph import Graph, is_on_meta, whole_model
from torchshear.speedup.native._form import Native, native_form
from torchshear.speedup.native._original import Original
from torchshear.speedup.rewriting._slicing import slice_state


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A cut to be made.

    Attributes:
        original: what was captured: the model, or the calls of its parts.
        plan: what to keep.
        cut: the same, checked, in terms of the network's axes.
        tensors: canonical name -> tensor of the original.
        sliced: canonical name -> shrunk tensor.
    """

    original: Original
    plan: PruningPlan
    cut: Cut
    tensors: dict[str, Tensor]
    sliced: dict[str, Tensor]

    @classmethod
    def of(cls, run: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> "Job":
        """The cut of a plan.

        Raises:
            PlanError: the plan does not fit the groups.
        """
        tensors = tensors_of(whole_model(run), groups.graph)
        return cls._made(Original(run, groups.graph), groups, plan, tensors)

    @classmethod
    def _made(cls, original: Original, groups: ChannelGroups, plan: PruningPlan, tensors: dict[str, Tensor]) -> "Job":
        cut = Cut(groups, plan.kept)
        return cls(original, plan, cut, tensors, slice_state(cut, tensors))

    @property
    def run(self) -> nn.Module:
        """What was captured, as a module."""
        return self.original.model

    def with_plan(self, plan: PruningPlan) -> "Job":
        """The cut of another plan of the same model."""
        return self._made(self.original, self.cut.groups, plan, self.tensors)

    def native(self) -> Native:
        """The native form, which needs values to compare, or why there is none."""
        if is_on_meta(self.run):
            reason = "without values on the meta device, its own forward cannot be compared with the rewritten graph"
            return Native(None, Form("traced", reason))
        return native_form(self.original, self.cut, self.tensors, self.sliced)


def tensors_of(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """The model's own tensors by canonical name; constants, and buffers that are caches, as the graph holds them."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {name: named.get(name, entry.tensor) for name, entry in graph.state.items()}
    return {n: t if t.shape == graph.state[n].tensor.shape else graph.state[n].tensor for n, t in own.items()}
