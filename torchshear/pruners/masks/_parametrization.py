"""Masks on a model: a parametrization that multiplies a weight by its mask, and what takes it off again."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from torchshear._arguments import check_one_of, close_names
from torchshear.errors import ArgumentError, MaskError
from torchshear.graph.model._checks import check_module
from torchshear.graph.model._process import outside_inference_mode
from torchshear.pruners.masks._masks import Masks

Existing = Literal["multiply", "replace"]


class Mask(nn.Module):
    """A parametrization that gives a weight with zeros where its mask says so.

    forward(W) = W where mask, 0 elsewhere; so dL/dW is exactly 0 at masked positions. The dense weight stays in
    `module.parametrizations.weight.original`, the mask is a bool buffer and part of the `state_dict`.

    Args:
        mask: bool tensor of the weight's shape, True = kept.

    Attributes:
        is_straight: whether the gradient by the masked weight goes to the dense weight as it is, also where it is
            masked, so that what is masked goes on to learn (Lin et al., ICLR 2020, arXiv:2006.07253).
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.is_straight = False

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight; a weight that is NaN or infinite where it is masked gives 0 as well."""
        masked = torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
        return weight - (weight - masked).detach() if self.is_straight else masked

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return a weight that is assigned as it is to be stored: unchanged."""
        return weight


def _chains(module: nn.Module) -> Mapping[str, ParametrizationList]:
    """The parametrizations of a module, by attribute."""
    chains = getattr(module, "parametrizations", None)
    if not isinstance(chains, nn.ModuleDict):
        return {}
    return {name: chain for name, chain in chains.items() if isinstance(chain, ParametrizationList)}


def held_weights(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that a module holds itself, by attribute; under a mask the dense one, None if it is computed."""
    held: dict[str, nn.Parameter | None] = dict(module._parameters)
    for attribute, chain in _chains(module).items():
        is_masked = all(isinstance(one, Mask) for one in chain)
        held[attribute] = chain.original if is_masked and isinstance(chain.original, nn.Parameter) else None
    return held


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A parameter in a module; tied parameters have several."""

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter | None

    @property
    def names(self) -> tuple[str, ...]:
        """Its names: that of the weight, and where a mask lies on it that of the dense weight below."""
        path = self.name.removesuffix(self.attribute)
        return (self.name, f"{path}parametrizations.{self.attribute}.original") if self.mask else (self.name,)

    @property
    def mask(self) -> Mask | None:
        """The mask that lies on it."""
        chain = _chains(self.module).get(self.attribute)
        return chain[0] if chain is not None and isinstance(chain[0], Mask) else None


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every place of every parameter, under each name of its module."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, ParametrizationList):
            for attribute, parameter in held_weights(module).items():
                yield _Place(f"{prefix}.{attribute}" if prefix else attribute, module, attribute, parameter)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters under each of their names, whether masks lie on them or not."""
    return {place.name: tuple(place.parameter.shape) for place in _places(model) if place.parameter is not None}


@outside_inference_mode()
def apply(model: nn.Module, masks: Masks, existing: Existing = "multiply") -> None:
    """Lay masks on a model, as parametrizations of its weights. The model is changed in place.

    The masks live through `copy.deepcopy`, `state_dict` (load it into a model on which masks lie already, whatever
    they hold), `DistributedDataParallel` and autocast. Optimizers keep working, since the dense parameters are the
    same objects as before. A parameter that several modules share gets one mask for all of them.

    Args:
        model: the model.
        masks: masks by parameter name, as `choose_masks` gives them.
        existing: what becomes of a mask that lies on a weight already: "multiply" masks what either masks, "replace"
            puts the new one in its place, which may bring weights back with the values that they had.

    Raises:
        ArgumentError: `existing` is another word, `model` is not a module, or `masks` are none.
        MaskError: a name or shape is not that of a parameter, the weight is computed by another parametrization, it is
            on the meta device, or two names of one tied parameter have different masks. The model is unchanged then.
    """
    check_module(model)
    if not isinstance(masks, Masks):
        raise ArgumentError(
            f"masks is {type(masks).__name__}; expected Masks, as choose_masks gives or Masks.of makes."
        )
    check_one_of("existing", existing, ("multiply", "replace"))
    places = list(_places(model))
    by_name = {name: place for place in places for name in place.names}
    chosen: dict[int, tuple[str, Tensor]] = {}
    for name, mask in masks.tensors.items():
        parameter = _parameter(by_name, name, mask)
        known, other = chosen.setdefault(id(parameter), (name, mask))
        if not torch.equal(mask, other):
            raise MaskError(
                f"{name!r} and {known!r} are one tied parameter with two different masks; give one mask under one name."
            )
    owners: dict[int, list[_Place]] = defaultdict(list)
    for place in {(id(place.module), place.attribute): place for place in places}.values():
        owners[id(place.parameter)].append(place)
    for key, (_, mask) in chosen.items():
        _lay(owners[key], mask, existing)


def _parameter(places: dict[str, _Place], name: str, mask: Tensor) -> nn.Parameter:
    """The parameter that a mask is for.

    Raises:
        MaskError: there is none that can take it.
    """
    if name not in places and ".parametrizations." in f".{name}":
        raise MaskError(
            f"{name!r} is what a parametrization computes a weight of, where no mask can lie; make the weight "
            f"permanent first (torch.nn.utils.parametrize.remove_parametrizations). torchshear.prune takes the model "
            f"as it is."
        )
    if name not in places:
        raise MaskError(
            f"the masks name {name!r}, which is no parameter of this model; they are for another model or for another "
            f"wrapper of it.{close_names(name, places)}"
        )
    parameter = places[name].parameter
    if parameter is None:
        raise MaskError(
            f"{name!r} is missing in its module or is computed by another parametrization; make that permanent "
            f"(torch.nn.utils.parametrize.remove_parametrizations) before masks are laid on."
        )
    if tuple(parameter.shape) != tuple(mask.shape) or mask.dtype != torch.bool:
        raise MaskError(
            f"the mask of {name!r} is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of the "
            f"parameter's shape {tuple(parameter.shape)}."
        )
    if parameter.is_meta:
        raise MaskError(f"{name!r} is on the meta device, where a mask would have no values; load the weights first.")
    return parameter


def _lay(places: list[_Place], mask: Tensor, existing: Existing) -> None:
    """Give all modules that hold one parameter the same mask."""
    assert places[0].parameter is not None, "chosen by its parameter"
    mask = mask.to(places[0].parameter.device, copy=True)
    laid = places[0].mask
    if laid is not None:
        laid.mask.copy_(laid.mask & mask if existing == "multiply" else mask)
        return
    shared = Mask(mask)
    for place in places:
        order = tuple(place.module._parameters)
        _own_class(place.module)
        parametrize.register_parametrization(place.module, place.attribute, shared)
        vars(_chains(place.module)[place.attribute])["order_before"] = order


def make_permanent(model: nn.Module) -> None:
    """Write zeros where masks are into the parameters, and take the masks off. The model is changed in place.

    Parameters are the same objects as before; further training would let masked weights grow again.

    Args:
        model: a model on which masks lie.

    Raises:
        ArgumentError: `model` is not a module.
        MaskError: no masks lie on it.
    """
    _take_off(model, is_permanent=True)


def remove(model: nn.Module) -> None:
    """Take masks off and bring the dense weights back. The model is changed in place.

    Args:
        model: a model on which masks lie.

    Raises:
        ArgumentError: `model` is not a module.
        MaskError: no masks lie on it.
    """
    _take_off(model, is_permanent=False)


def _take_off(model: nn.Module, is_permanent: bool) -> None:
    places = _masked_places(model)
    orders = {id(place.module): _order(place.module) for place in places}
    for place in places:
        _own_class(place.module)
        parametrize.remove_parametrizations(place.module, place.attribute, leave_parametrized=is_permanent)
    for place in places:
        held = place.module._parameters
        for name in [*orders[id(place.module)], *(name for name in held if name not in orders[id(place.module)])]:
            held[name] = held.pop(name)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no other has.

    Torch keeps the properties of parametrized tensors in a class made for the module, which a deep copy shares: to
    change them for one would break the other.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _order(module: nn.Module) -> tuple[str, ...]:
    """The order that a module's parameters had before masks were laid on, so that the model is the same afterwards."""
    orders = [getattr(chain, "order_before", ()) for chain in _chains(module).values()]
    return max(orders, key=len)


def _masked_places(model: nn.Module) -> list[_Place]:
    check_module(model)
    masked = {(id(p.module), p.attribute): p for p in _places(model) if p.mask is not None}
    if not masked:
        raise MaskError("no masks lie on this model; lay them on with torchshear.pruners.masks.apply.")
    return list(masked.values())


def masks_by_name(model: nn.Module) -> dict[str, Mask]:
    """The masks that lie on a model, under every name of their weights; the modules themselves."""
    return {place.name: place.mask for place in _places(model) if place.mask is not None}


def has_masks(model: nn.Module) -> bool:
    """Return whether any mask lies on a model."""
    return any(isinstance(module, Mask) for module in model.modules())


def applied_masks(model: nn.Module) -> Masks:
    """The masks that lie on a model, as they are now.

    Args:
        model: a model on which masks lie.

    Returns:
        Copies of the masks, on the CPU, one for each parameter under the first of its names.

    Raises:
        ArgumentError: `model` is not a module.
        MaskError: no masks lie on it.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for place in _masked_places(model):
        assert place.mask is not None, "masked places have masks"
        found.setdefault(id(place.mask), (place.name, place.mask.mask.detach().to("cpu", copy=True)))
    return Masks.of(dict(found.values()))
