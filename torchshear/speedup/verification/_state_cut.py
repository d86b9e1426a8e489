"""Parameters and buffers of two models to be compared: masked, sliced, or with random values."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._tensor_plans import StatePlan, make_state_plan
from torchshear.speedup._random_values import fill_randomly
from torchshear.speedup.rewriting._slicing import slice_tensor

State = Mapping[str, Tensor]


class StateCut:
    """A cut, applied to the tensors of a network by their canonical names.

    Args:
        groups: the analysed network.
        cut: the units that are removed.

    Attributes:
        plans: canonical name -> kept positions, for each floating or complex tensor that loses some.
    """

    def __init__(self, groups: ChannelGroups, cut: Cut) -> None:
        self.groups = groups
        self.cut = cut
        self.plans: dict[str, StatePlan] = {}
        for name, entry in groups.graph.state.items():
            plan = make_state_plan(cut, name)
            is_number = entry.tensor.is_floating_point() or entry.tensor.is_complex()
            if plan is not None and plan.kept and is_number:
                self.plans[name] = plan

    def canonical_name(self, name: str) -> str:
        """Return the one name that the graph has for a tensor with several names."""
        return self.groups.graph.aliases.get(name, name)

    def state_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of the original; constants as the graph holds them."""
        named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: named.get(name, entry.tensor).detach() for name, entry in self.groups.graph.state.items()}

    def names_in(self, model: nn.Module, state: State) -> dict[str, Tensor]:
        """Return those tensors that a model has, by the model's own names for them."""
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        canonical = {name: self.canonical_name(name) for name in names}
        return {name: state[own] for name, own in canonical.items() if own in state}

    def mask(self, state: State, originals: State | None = None) -> dict[str, Tensor]:
        """Set all cut positions to zero.

        Args:
            state: canonical name -> tensor.
            originals: tensors that are copied before they are masked; others are written to. None for all of `state`.
        """
        originals = state if originals is None else originals
        masked = dict(state)
        for name, plan in self.plans.items():
            if name not in state:
                continue
            tensor = state[name].detach()
            masked[name] = tensor = tensor.clone() if state[name] is originals.get(name) else tensor
            if plan.blocks:
                tensor.masked_fill_(~plan.mask().to(tensor.device), 0)
                continue
            for dim, kept in plan.kept.items():
                is_cut = torch.ones(tensor.shape[dim], dtype=torch.bool)
                is_cut[torch.from_numpy(kept)] = False
                tensor.index_fill_(dim, is_cut.nonzero().flatten().to(tensor.device), 0)
        return masked

    def slice_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """Return the kept positions of the gradient of a parameter, which may go by any of its names."""
        plan = self.plans.get(self.canonical_name(name))
        return gradient if plan is None else slice_tensor(gradient, plan)

    def random_state(self, state: State, seed: int, *, buffers: bool, fixed: Collection[str] = ()) -> dict[str, Tensor]:
        """Return tensors of the same shapes with random values that let every layer count: see `fill_randomly`.

        Constants keep their values.

        Args:
            state: canonical name -> tensor.
            seed: seed of the values.
            buffers: whether floating buffers change too: they grow a little, so that a variance stays positive.
            fixed: names of buffers that keep their values.
        """
        generator = torch.Generator().manual_seed(seed)
        random = dict(state)
        for name, tensor in state.items():
            kind = self.groups.graph.state[name].kind
            if kind == "parameter" and tensor.is_floating_point():
                random[name] = torch.empty_like(tensor)
                fill_randomly(random[name], tensor, generator)
            elif kind == "buffer" and tensor.is_floating_point() and buffers and name not in fixed:
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).abs() * 0.1
                random[name] = tensor + noise.to(tensor.device, tensor.dtype)
        return random
