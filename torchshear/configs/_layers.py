"""The layers that a config list speaks of, and the channel groups that each of them makes or reads."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from torch import nn
from torch.nn.utils import parametrize

from torchshear.dependency import ChannelGroup, ChannelGroups, Member
from torchshear.dependency.rules._role_evidence import FAMILIES
from torchshear.pruners.masks._layers import find_maskable_layers

_TABLES: Final = frozenset({"Embedding", "EmbeddingBag"})
_MAKING: Final = frozenset({"out", "depthwise", "embedding", "norm", "raw"})
_HEADS: Final = frozenset(FAMILIES["heads"])
# Where rows are products, as of heads and their width, the first of these takes the ratio.
_WITHIN: Final = ("kv_heads", "heads", "q_heads")


@dataclass(frozen=True, slots=True)
class ConfigLayer:
    """A module with parameters of its own.

    Attributes:
        name: qualified name, as in `named_modules`; of the model itself "".
        type_name: name of its class.
        class_names: names of its class and of all classes that it derives from.
        parameters: qualified names of its parameters.
        is_weighted: whether one of them is a weight of two dimensions or more.
        aliases: its further names, where the model holds it more than once.
    """

    name: str
    type_name: str
    class_names: frozenset[str]
    parameters: tuple[str, ...]
    is_weighted: bool
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of its names."""
        return (self.name, *self.aliases)


def list_layers(model: nn.Module) -> tuple[ConfigLayer, ...]:
    """The layers of a model, in the order of its modules."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList) or ".parametrizations." in f"{name}.":
            continue
        parameters = tuple(_own_parameters(name, module))
        if parameters:
            original = parametrize.type_before_parametrizations(module)
            layers.append(
                ConfigLayer(
                    name,
                    original.__name__,
                    frozenset(one.__name__ for one in original.__mro__),
                    parameters,
                    any(_is_weight(module, key) for key in _own_keys(module)),
                    tuple(other for other in names[id(module)] if other != name),
                )
            )
    return tuple(layers)


def _own_keys(module: nn.Module) -> list[str]:
    """Names of a module's parameters, as they are called where none is parametrized."""
    plain = [key for key, value in module.named_parameters(recurse=False) if value.is_floating_point()]
    return [*plain, *(key for key, _ in _computed_parameters(module))]


def _own_parameters(name: str, module: nn.Module) -> Iterable[str]:
    prefix = f"{name}." if name else ""
    yield from (prefix + key for key, value in module.named_parameters(recurse=False) if value.is_floating_point())
    for key, held in _computed_parameters(module):
        yield from (f"{prefix}parametrizations.{key}.{part}" for part, _ in held.named_parameters())


def _computed_parameters(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Parameters of a module that are computed, with what computes them."""
    holder = getattr(module, "parametrizations", None) if parametrize.is_parametrized(module) else None
    return list(holder.named_children()) if isinstance(holder, nn.Module) else []


def _is_weight(module: nn.Module, key: str) -> bool:
    return "weight" in key and getattr(module, key).ndim > 1


@dataclass(frozen=True, slots=True)
class Maskable:
    """A weight of which single numbers can be masked.

    Attributes:
        layer: what masks call its layer.
        problem: why it cannot be masked, or "".
    """

    layer: str
    problem: str


def find_maskable_weights(model: nn.Module) -> dict[str, Maskable]:
    """Weights of the layers that masks know, under all of their names."""
    weights: dict[str, Maskable] = {}
    for name, layer in find_maskable_layers(model).items():
        weight = layer.weight if layer.name == name else f"{name}.{layer.form.attribute}"
        weights[weight] = Maskable(name, layer.problem)
    return weights


class LayerGroups:
    """Channel groups that each layer makes or reads."""

    def __init__(self, groups: ChannelGroups, layers: Iterable[ConfigLayer]) -> None:
        self.groups = groups
        layers = tuple(layers)
        canonical = groups.graph.aliases
        owners: dict[str, set[str]] = defaultdict(set)
        self._state = {layer.name: [canonical.get(p, p) for p in layer.parameters] for layer in layers}
        for name, state in self._state.items():
            for parameter in state:
                owners[parameter].add(name)
        self._shared = {parameter for parameter, names in owners.items() if len(names) > 1}
        self._members: dict[str, list[tuple[ChannelGroup, Member]]] = defaultdict(list)
        for group in groups:
            for member in group.members:
                self._members[member.name].append((group, member))
        self._layers = {layer.name: layer for layer in layers}
        self._fixed: dict[tuple[str, int], str] = {(f.name, f.dim): f.reason for f in groups.fixed}

    def of(self, layer: str, pattern: str) -> tuple[tuple[ChannelGroup, Member], ...]:
        """The groups of the units that a pattern means of a layer, with one dimension in which they lie.

        Of rows that are products of several groups, as of heads and their width, one group takes it all. Of experts in
        one weight their inner width does, and not their number.

        Args:
            layer: name of the layer.
            pattern: "out_channel", "in_channel" or "heads".
        """
        dimensions: dict[tuple[str, int], list[tuple[ChannelGroup, Member]]] = defaultdict(list)
        for group, member in self._candidates(layer, pattern):
            dimensions[member.name, member.dim].append((group, member))
        found: dict[str, tuple[ChannelGroup, Member]] = {}
        for members in dimensions.values():
            for group, member in _without_factors(members):
                found.setdefault(group.name, (group, member))
        inside = {name: one for name, one in found.items() if one[0].role != "experts"}
        return tuple((inside or found).values())

    def _candidates(self, layer: str, pattern: str) -> Iterable[tuple[ChannelGroup, Member]]:
        purposes = frozenset({"in"}) if pattern == "in_channel" else _MAKING
        is_table = bool(_TABLES & self._layers[layer].class_names)
        for parameter in self._state[layer]:
            own = (
                purposes & (_TABLE_PURPOSES if is_table else _LAYER_PURPOSES) if parameter in self._shared else purposes
            )
            for group, member in self._members[parameter]:
                if member.purposes & own and (pattern != "heads" or group.role in _HEADS):
                    yield group, member

    def explain_fixed(self, layer: str, pattern: str) -> str:
        """Return the reason for which a layer has no group of the units that a pattern means."""
        dim = 1 if pattern == "in_channel" else 0
        for parameter in self._state[layer]:
            if (parameter, dim) in self._fixed:
                return f"{parameter}[{dim}] is fixed: {self._fixed[parameter, dim]}"
        if pattern == "heads":
            return "it makes no attention heads"
        return "it makes no channels that can shrink" if dim == 0 else "it reads no channels that can shrink"

    def makes_output(self, layer: str) -> bool:
        """Return whether the layer makes an output of the model, and is fixed for that."""
        reasons = (self._fixed.get((parameter, 0), "") for parameter in self._state[layer])
        return any("model output" in reason for reason in reasons)


_TABLE_PURPOSES: Final = frozenset({"embedding"})
_LAYER_PURPOSES: Final = _MAKING - _TABLE_PURPOSES | {"in"}


def _without_factors(members: list[tuple[ChannelGroup, Member]]) -> Iterable[tuple[ChannelGroup, Member]]:
    """Of the groups along one dimension those that share no position; first in rank, then the widest, comes first."""
    taken = np.zeros(max((int(member.positions.max()) + 1 for _, member in members), default=0), np.bool_)
    for group, member in sorted(members, key=_rank):
        if not taken[member.positions].any():
            taken[member.positions] = True
            yield group, member


def _rank(one: tuple[ChannelGroup, Member]) -> tuple[bool, int, int]:
    group, _ = one
    return not group.is_prunable, _RANKS.get(group.role, len(_RANKS)), -group.width


_RANKS: Final[Mapping[str, int]] = MappingProxyType({role: rank for rank, role in enumerate(_WITHIN)})
