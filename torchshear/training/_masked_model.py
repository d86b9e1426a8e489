"""A model that trains with masks on its parameters, which are all there from the start and are renewed in place."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._weights import computed_weights
from torchshear.errors import ArgumentError, MaskError
from torchshear.graph.model._checks import check_module
from torchshear.graph.model._copy import copy_model
from torchshear.pruners.masks import Mask, Masks, apply, make_permanent
from torchshear.pruners.masks._layers import MaskableLayer, find_maskable_layers
from torchshear.pruners.masks._parametrization import has_masks, masks_by_name


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


class MaskedModel:
    """A model with masks on some of its parameters; all of them are kept at first. The model is changed in place.

    Args:
        model: the model.
        groups: its channel groups, whose tensors are the model's.
        names: names of the parameters that get masks.
        is_straight: see `Mask`.

    Raises:
        MaskError: a mask cannot lie on one of them; the model is unchanged then.
    """

    def __init__(self, model: nn.Module, groups: ChannelGroups, names: Collection[str], is_straight: bool) -> None:
        self.model = model
        self.parameters = {
            name: entry.tensor for name, entry in groups.graph.state.items() if entry.kind == "parameter"
        }
        self._names = {alias: name for alias, name in groups.graph.aliases.items() if name in self.parameters}
        self._names |= {name: name for name in self.parameters}
        canonical = dict.fromkeys(self._names[name] for name in names)
        apply(model, Masks.of({name: torch.ones(self.parameters[name].shape, dtype=torch.bool) for name in canonical}))
        self.masks = self._laid()
        for mask in self.masks.values():
            mask.is_straight = is_straight
        self._held = {id(parameter) for parameter in model.parameters()}

    def _laid(self) -> dict[str, Mask]:
        """The masks on the model, by canonical name of the parameter."""
        return {self._names[name]: mask for name, mask in masks_by_name(self.model).items() if name in self._names}

    def renew(self, masks: Mapping[str, Tensor]) -> None:
        """Put new masks in place of those that lie there; parameters that are not named are kept whole."""
        given = self.by_canonical_name(masks)
        assert given.keys() <= self.masks.keys(), "all that may go has a mask from the start"
        with torch.no_grad():
            for name, laid in self.masks.items():
                laid.mask.copy_(given[name]) if name in given else laid.mask.fill_(True)

    def weights(self, is_masked: bool = True) -> "Weights":
        """The parameters by canonical name, as the network reads them or as they are without masks."""
        return Weights(self.parameters, self.masks if is_masked else {})

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

    def check_optimizer(self, optimizer: object) -> None:
        """Raise ArgumentError for what is no optimizer of this model."""
        groups = getattr(optimizer, "param_groups", None)
        if not isinstance(groups, list):
            raise ArgumentError(f"optimizer is {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
        given = {id(parameter) for group in groups for parameter in group["params"]}
        own = {id(self.parameters[name]) for name in self.masks}
        if own and not own & given:
            raise ArgumentError(
                "optimizer= holds none of the parameters that masks lie on: it is of another model, or of a copy. Make "
                "it of the parameters of the model that is given: torch.optim.SGD(model.parameters(), ...)."
            )

    def by_canonical_name(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of parameters by canonical name; those of buffers are left out."""
        return {self._names[name]: mask for name, mask in masks.items() if name in self._names}

    def layers(self) -> dict[str, MaskableLayer]:
        """The layers whose weights have masks, by canonical name of the weight."""
        found = {self._names.get(one.weight): one for one in find_maskable_layers(self.model).values()}
        return {name: one for name, one in found.items() if name is not None and name in self.masks}

    def groups_as_masked(self, groups: ChannelGroups) -> ChannelGroups:
        """The channel groups of a network whose parameters have zeros where they are masked now."""
        weights = self.weights()
        state = {
            name: replace(entry, tensor=weights[name].detach()) if name in self.masks else entry
            for name, entry in groups.graph.state.items()
        }
        return replace(groups, graph=replace(groups.graph, state=state))

    def dense_copy(self) -> nn.Module:
        """A copy of the model without masks, with zeros where they are."""
        copied = copy_model(self.model)
        if self.masks:
            make_permanent(copied)
        return copied


_ADVICE = "the structure of a model must stay while a session prunes it. Make a new session for the new model."


@dataclass(frozen=True, slots=True, eq=False)
class Weights(Mapping[str, Tensor]):
    """Parameters by canonical name, with zeros where they are masked; computed when they are asked for."""

    parameters: Mapping[str, Tensor]
    masks: Mapping[str, Mask]

    def __len__(self) -> int:
        return len(self.parameters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __contains__(self, name: object) -> bool:
        return name in self.parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter, mask = self.parameters[name], self.masks.get(name)
        return parameter if mask is None else mask(parameter)
