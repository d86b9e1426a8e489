"""Values of parameters and buffers to compare two models with: masked, sliced, and drawn anew."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from torchshear.dependency import ChannelGroups, Cut, StatePlan, make_state_plan
from torchshear.speedup.comparing._random_weights import fill
from torchshear.speedup.rewriting._state import cut_tensor, slice_state

State = Mapping[str, Tensor]


class Values:
    """The tensors of a network by canonical name, and what a cut makes of them.

    Args:
        groups: the analysed network.
        cut: the units that are cut.

    Attributes:
        plans: canonical name -> what is kept of it, for floating tensors of which something is cut.
    """

    def __init__(self, groups: ChannelGroups, cut: Cut) -> None:
        self.groups = groups
        self.cut = cut
        self.plans: dict[str, StatePlan] = {}
        for name, entry in groups.graph.state.items():
            made = make_state_plan(cut, name)
            is_number = entry.tensor.is_floating_point() or entry.tensor.is_complex()
            if made is not None and made.kept and is_number:
                self.plans[name] = made

    def of(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of the original; constants as the graph holds them."""
        named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: named.get(name, entry.tensor).detach() for name, entry in self.groups.graph.state.items()}

    def masked(self, state: State) -> dict[str, Tensor]:
        """Copies of those of which something is cut, with zeros there, and the others."""
        return {n: _masked(t.detach().clone(), self.plans[n]) if n in self.plans else t for n, t in state.items()}

    def masked_drawn(self, drawn: State, state: State) -> dict[str, Tensor]:
        """As `masked`, of tensors drawn anew, which are written to; those that are still of `state` are copied."""
        copied = {
            name: t.detach().clone() if name in self.plans and t is state[name] else t for name, t in drawn.items()
        }
        return {name: _masked(t, self.plans[name]) if name in self.plans else t for name, t in copied.items()}

    def sliced(self, state: State) -> dict[str, Tensor]:
        """What is kept of each."""
        return slice_state(self.cut, dict(state))

    def of_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """What is kept of the gradient of a parameter, by any of its names."""
        plan = self.plans.get(self.canonical(name))
        return gradient if plan is None else cut_tensor(gradient, plan)

    def named(self, model: nn.Module, state: State) -> dict[str, Tensor]:
        """Those that a model has, by its own names for them."""
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        canonical = {name: self.canonical(name) for name in names}
        return {name: state[own] for name, own in canonical.items() if own in state}

    def canonical(self, name: str) -> str:
        """The one name of a tensor that has several."""
        return self.groups.graph.aliases.get(name, name)

    def drawn(self, state: State, seed: int, *, buffers: bool, whole: Collection[str] = ()) -> dict[str, Tensor]:
        """Tensors of the same shapes with which every layer has a say: see `fill`. Constants stay.

        Args:
            state: canonical name -> tensor.
            seed: seed of the draw.
            buffers: whether to change floating buffers too; upwards, so that a variance stays one.
            whole: names of buffers that stay.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = dict(state)
        for name, tensor in state.items():
            kind = self.groups.graph.state[name].kind
            if kind == "parameter" and tensor.is_floating_point():
                drawn[name] = torch.empty_like(tensor)
                fill(drawn[name], tensor, generator)
            elif kind == "buffer" and tensor.is_floating_point() and buffers and name not in whole:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).abs() * 0.1
                drawn[name] = tensor + noise.to(tensor.device, tensor.dtype)
        return drawn


def _masked(tensor: Tensor, plan: StatePlan) -> Tensor:
    """The tensor, with all that is cut set to zero."""
    if plan.blocks:
        return tensor.masked_fill_(~plan.mask().to(tensor.device), 0)
    for dim, kept in plan.kept.items():
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
        gone[torch.from_numpy(kept)] = False
        tensor.index_fill_(dim, gone.nonzero().flatten().to(tensor.device), 0)
    return tensor
