"""A checked cut of a captured model, with its tensors before and after."""

from dataclasses import dataclass

from torch import Tensor, nn

from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import Form
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.graph import Graph
from torchshear.graph._parts import whole_model
from torchshear.graph.model._meta import is_on_meta
from torchshear.speedup.native._form import Native, native_form
from torchshear.speedup.native._original import Original
from torchshear.speedup.rewriting._slicing import slice_state


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCut:
    """A checked cut of a captured model.

    Attributes:
        original: the captured model, or the captured calls of its parts.
        plan: the plan.
        cut: the plan in terms of the network's axes.
        tensors: canonical name -> tensor of the original.
        sliced: canonical name -> shrunk tensor.
    """

    original: Original
    plan: PruningPlan
    cut: Cut
    tensors: dict[str, Tensor]
    sliced: dict[str, Tensor]

    @classmethod
    def of(cls, run: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> "PreparedCut":
        """Prepare the cut of a plan.

        Raises:
            PlanError: the plan does not fit the groups.
        """
        tensors = tensors_of(whole_model(run), groups.graph)
        cut = Cut(groups, plan.kept)
        return cls(Original(run, groups.graph), plan, cut, tensors, slice_state(cut, tensors))

    @property
    def run(self) -> nn.Module:
        """The captured model, or the calls of its parts as one module."""
        return self.original.model

    def with_plan(self, plan: PruningPlan) -> "PreparedCut":
        """Prepare the cut of another plan of the same model."""
        cut = Cut(self.cut.groups, plan.kept)
        return PreparedCut(self.original, plan, cut, self.tensors, slice_state(cut, self.tensors))

    def find_native(self) -> Native:
        """Find the native form, which needs values to compare, or the reason why there is none."""
        if is_on_meta(self.run):
            reason = "without values on the meta device, its own forward cannot be compared with the rewritten graph"
            return Native(None, Form("traced", reason))
        return native_form(self.original, self.cut, self.tensors, self.sliced)


def tensors_of(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """Return a model's tensors by canonical name; constants, and buffers that are caches, as the graph holds them."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {name: named.get(name, entry.tensor) for name, entry in graph.state.items()}
    return {n: t if t.shape == graph.state[n].tensor.shape else graph.state[n].tensor for n, t in own.items()}
