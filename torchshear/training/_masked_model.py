"""A model that trains with masks on its parameters, which are all there from the start and are renewed in place.

It may be shrunk in the middle of training. Whoever chooses what goes then still sees the network in its full size, with
zeros where nothing is any more, so that each choice, and each plan, is one for the original.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._weights import computed_weights
from torchshear.dependency.plans._composition import state_between
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, MaskError
from torchshear.graph.model._checks import check_module
from torchshear.graph.model._copy import copy_model
from torchshear.pruners.masks import Mask, Masks, apply, make_permanent
from torchshear.pruners.masks._layers import MaskableLayer, find_maskable_layers
from torchshear.pruners.masks._parametrization import has_masks, masks_by_name
from torchshear.speedup import shrink_optimizer, shrink_to_form
from torchshear.speedup.shrinking._whole_model import copy_modes
from torchshear.training._kept_norms import lay_kept_norms, remove_kept_norms


def check_unmasked(model: nn.Module) -> None:
    """Raise MaskError for a model whose weights are computed of others: by masks, weight norms or other hooks."""
    check_module(model)
    if has_masks(model):
        raise MaskError(
            "masks lie on the model already; make them permanent (torchshear.pruners.masks.make_permanent) or take "
            "them off (remove) first. To keep the zeros of a sparse model, give pattern='lock'."
        )
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise MaskError(
                f"module {name!r} computes a weight by a parametrization of its own; make it permanent first "
                f"(torch.nn.utils.parametrize.remove_parametrizations)."
            )


def check_computed(groups: ChannelGroups) -> None:
    """Raise MaskError for a network that reads weights which hooks compute, as torch.nn.utils.prune does."""
    computed = computed_weights(groups)
    if computed:
        raise MaskError(
            f"the network computes a weight of {next(iter(computed))!r} before it reads it (a mask of "
            f"torch.nn.utils.prune, a weight norm); make it permanent first (torch.nn.utils.prune.remove, "
            f"remove_weight_norm)."
        )


def check_optimizer(optimizer: object, groups: ChannelGroups, names: Collection[str]) -> None:
    """Raise ArgumentError for what is neither None nor an optimizer of the model, of some parameters at least."""
    if optimizer is None:
        return
    held = getattr(optimizer, "param_groups", None)
    if not isinstance(held, list):
        raise ArgumentError(f"optimizer is {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
    state, aliases = groups.graph.state, groups.graph.aliases
    own = {id(state[aliases.get(name, name)].tensor) for name in names}
    if own and not own & {id(parameter) for group in held for parameter in group["params"]}:
        raise ArgumentError(
            "optimizer= holds none of the parameters that masks lie on: it is of another model, or of a copy. Make it "
            "of the parameters of the model that is given: torch.optim.SGD(model.parameters(), ...)."
        )


class MaskedModel:
    """A model with masks on some of its parameters; all of them are kept at first. The model is changed in place.

    Args:
        model: the model.
        groups: its channel groups, whose tensors are the model's.
        names: names of the parameters that get masks.
        is_straight: see `Mask`.

    Attributes:
        model: the model that trains: the one that was given, until it is shrunk.
        whole: the one that was given; once the model was shrunk, a store without masks.
        parameters: canonical name -> parameter of the model that trains.
        masks: canonical name -> mask on it.
        plan: what the model that trains keeps of the whole; None if it was not shrunk.

    Raises:
        MaskError: a mask cannot lie on one of them; the model is unchanged then.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, names: Collection[str], is_straight: bool) -> None:
        self.model = self.whole = model
        self.plan: PruningPlan | None = None
        self._places: dict[str, Tensor] = {}
        self.parameters = {
            name: entry.tensor for name, entry in groups.graph.state.items() if entry.kind == "parameter"
        }
        self._names = {alias: name for alias, name in groups.graph.aliases.items() if name in self.parameters}
        self._names |= {name: name for name in self.parameters}
        self._masked = tuple(dict.fromkeys(self._names[name] for name in names))
        self._is_straight = is_straight
        self._lay()

    def _lay(self) -> None:
        """Lay masks that keep all on the model that trains."""
        shapes = {name: self.parameters[name].shape for name in self._masked}
        apply(self.model, Masks.of({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}))
        self.masks = self._laid()
        for mask in self.masks.values():
            mask.is_straight = self._is_straight
        lay_kept_norms(self.model)
        self._held = {id(parameter) for parameter in self.model.parameters()}

    def _laid(self) -> dict[str, Mask]:
        """The masks on the model, by canonical name of the parameter."""
        return {self._names[name]: mask for name, mask in masks_by_name(self.model).items() if name in self._names}

    def renew(self, masks: Mapping[str, Tensor]) -> None:
        """Put new masks, of full size, in place of those that lie there; parameters not named are kept whole."""
        given = self.by_canonical_name(masks)
        assert given.keys() <= self.masks.keys(), "all that may go has a mask from the start"
        with torch.no_grad():
            for name, laid in self.masks.items():
                if name not in given:
                    laid.mask.fill_(True)
                elif name in self._places:
                    laid.mask.copy_(given[name][self._places[name].cpu()].reshape(laid.mask.shape))
                else:
                    laid.mask.copy_(given[name])

    def lift(self, name: str, value: Tensor) -> Tensor:
        """Return a tensor of a parameter's or buffer's shape in its full size, with zeros where nothing is any more."""
        place = self._places.get(name)
        return value if place is None else value.new_zeros(place.shape).masked_scatter(place, value)

    def weights(self, is_masked: bool = True) -> "Weights":
        """The parameters in full size by canonical name, as the network reads them or as they are without masks."""
        return Weights(self.parameters, self.masks if is_masked else {}, self.lift)

    def shrink(self, plan: PruningPlan, optimizer: torch.optim.Optimizer | None) -> None:
        """Put a smaller model in place of the one that trains, with masks that keep all of it; an optimizer follows.

        Args:
            plan: a plan for the model that was given, which keeps nothing that is gone already.
            optimizer: the optimizer of the model that trains, or None.

        Raises:
            ArgumentError: the optimizer cannot follow.
            VerificationError: the smaller model is not the masked one. Nothing has changed then.
        """
        before = self.applied()
        self._write_back()
        try:
            small = shrink_to_form(self.whole, plan).model
            if optimizer is not None:
                step = plan if self.plan is None else replace(plan, state=state_between(self.plan.state, plan.state))
                shrink_optimizer(optimizer, self.model, small, step)
        except BaseException:
            if self.plan is None:
                self._lay()
                self.renew(before)
            raise
        named: dict[str, Tensor] = {**dict(small.named_parameters()), **dict(small.named_buffers())}
        self.model, self.plan = small, plan
        self.parameters = {name: named[name] for name in self.parameters}
        self._places = {
            name: entry.mask().to(named[name].device)
            for name, entry in plan.state.items()
            if name in named and entry.kept
        }
        self._lay()

    def applied(self) -> dict[str, Tensor]:
        """The masks in full size; what went when the model was shrunk is masked."""
        return {name: self.lift(name, mask.mask).cpu() for name, mask in self.masks.items()}

    def _write_back(self) -> None:
        """Write what trains into the whole model, with zeros where masks are and where nothing is any more."""
        if self.plan is None:
            if self.masks:
                make_permanent(self.whole)
            remove_kept_norms(self.whole)
            return
        weights, buffers = self.weights(), dict(self.model.named_buffers())
        with torch.no_grad():
            for name, parameter in self.whole.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
            for name, buffer in self.whole.named_buffers():
                entry = self.plan.state.get(name)
                if name in self._places:
                    buffer.masked_scatter_(self._places[name], buffers[name])
                elif name in buffers and entry is None:
                    buffer.copy_(buffers[name])
        copy_modes(self.whole, self.model)

    @torch.no_grad()
    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Give the model that trains the values that parameters and buffers have in full size, by canonical name.

        Raises:
            ArgumentError: they are of another model.
        """
        named: dict[str, Tensor] = {**dict(self.model.named_buffers()), **self.parameters}
        for name, value in values.items():
            own, place = named.get(name), self._places.get(name)
            shape = None if own is None else own.shape if place is None else place.shape
            if own is None or value.shape != shape:
                raise ArgumentError(f"the values of {name!r} are of another model; expected the shape {shape}.")
            own.copy_(value if place is None else value.to(place.device)[place].reshape(own.shape))

    def settle(self) -> None:
        """Write zeros where masks are into the model that was trained, and take the masks off; training is over."""
        self._write_back()
        remove_kept_norms(self.model)
        self.masks = {}

    def check_structure(self) -> None:
        """Raise MaskError if the model is not the one that the session was made for."""
        laid = self._laid()
        lost = next((name for name, mask in self.masks.items() if laid.get(name) is not mask), None)
        if lost is not None:
            raise MaskError(f"the mask of {lost!r} is not on the model any more; {_ADVICE}")
        held = {id(parameter) for parameter in self.model.parameters()}
        for name, parameter in self.parameters.items():
            if id(parameter) not in held:
                raise MaskError(f"{name!r} is another parameter than when the session was made; {_ADVICE}")
        if held != self._held:
            raise MaskError(f"the model holds parameters that it had not when the session was made; {_ADVICE}")

    def by_canonical_name(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of parameters by canonical name; those of buffers are left out."""
        return {self._names[name]: mask for name, mask in masks.items() if name in self._names}

    def layers(self) -> dict[str, MaskableLayer]:
        """The layers whose weights have masks, by canonical name of the weight."""
        found = {self._names.get(one.weight): one for one in find_maskable_layers(self.whole).values()}
        return {name: one for name, one in found.items() if name is not None and name in self.masks}

    def groups_as_masked(self, groups: ChannelGroups) -> ChannelGroups:
        """The channel groups of a network whose parameters have zeros where they are masked now."""
        if self.plan is not None:
            self._write_back()
        weights = self.weights()
        state = {
            name: replace(entry, tensor=weights[name].detach()) if name in self.masks else entry
            for name, entry in groups.graph.state.items()
        }
        return replace(groups, graph=replace(groups.graph, state=state))

    def dense_copy(self) -> nn.Module:
        """A copy of the model in full size and without masks, with zeros where they are."""
        if self.plan is not None:
            self._write_back()
        copied = copy_model(self.whole)
        if self.plan is None and self.masks:
            make_permanent(copied)
        remove_kept_norms(copied)
        return copied


_ADVICE = "the structure of a model must stay while a session prunes it. Make a new session for the new model."


@dataclass(frozen=True, slots=True, eq=False)
class Weights(Mapping[str, Tensor]):
    """Parameters in full size by canonical name, with zeros where they are masked; computed when they are asked for."""

    parameters: Mapping[str, Tensor]
    masks: Mapping[str, Mask]
    lift: Callable[[str, Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __contains__(self, name: object) -> bool:
        return name in self.parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter, mask = self.parameters[name], self.masks.get(name)
        return self.lift(name, parameter if mask is None else mask(parameter))
