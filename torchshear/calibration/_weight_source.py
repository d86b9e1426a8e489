"""Source of the weights that criteria score: the model that was traced, a mapping, or a checkpoint on disk."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, fx

from torchshear._arguments import close_names
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._weights import computed_weights
from torchshear.dependency.rules._read_values import differing_value
from torchshear.errors import ArgumentError, WeightError
from torchshear.graph import Graph
from torchshear.graph._nodes import compute_from_state
from torchshear.storage._checkpoint import match_names, open_checkpoint

WeightSource = Mapping[str, Tensor] | str | PathLike[str] | None


def weights_to_score(groups: ChannelGroups, source: WeightSource) -> Mapping[str, Tensor]:
    """The weights of a network by canonical name, as it reads them.

    In place of a parameter of which the network computes a weight, as under a mask or a weight norm, there is the
    computed one.

    Args:
        groups: the analysed network.
        source: as for `torchshear.plan`.

    Raises:
        ArgumentError: `source` is of another type.
        CheckpointError: it is a path, and there is no checkpoint that can be read.
        WeightError: it lacks a weight that can shrink, or has it in another shape; the latter when it is looked up,
            and so is the lack of a buffer that a weight is computed of. Or it has other values of a buffer that the
            groups rest on.
    """
    held: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = {}
    if source is None:
        held = {name: entry.tensor for name, entry in groups.graph.state.items() if entry.kind == "parameter"}
    else:
        held, buffers = _given_weights(groups, source)
    nodes = {name: found[0] for name, found in computed_weights(groups).items()}
    return _ComputedWeights(held, buffers, nodes, groups.graph) if nodes else held


def _given_weights(
    groups: ChannelGroups, source: Mapping[str, Tensor] | str | PathLike[str]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Return parameters and buffers of a source by canonical name; the errors are those of `weights_to_score`."""
    graph = groups.graph
    if isinstance(source, str | PathLike):
        source = open_checkpoint(source)
    if not isinstance(source, Mapping) or not all(isinstance(name, str) for name in source):
        raise ArgumentError(
            f"weights is {type(source).__name__}; expected the folder of a checkpoint, or a mapping from parameter "
            f"names to tensors."
        )
    names = _names(source, graph)
    _check_values(groups, source, names)
    parameters, buffers = (
        _GivenWeights(source, {name: given for name, given in names.items() if graph.state[name].kind == kind}, graph)
        for kind in ("parameter", "buffer")
    )
    for group in groups.prunable:
        for member in group.members:
            if graph.state[member.name].kind == "parameter" and member.name not in parameters:
                raise WeightError(
                    f"no weight {member.name!r} of group {group.name!r} was given; expected every parameter that can "
                    f"shrink. Give the weights of this model, with the names of its state_dict."
                )
    return parameters, buffers


def _names(source: Mapping[str, Tensor], graph: Graph) -> dict[str, str]:
    """Canonical name -> name in the source, under any of the names of tied parameters."""
    matching = match_names(source, graph.aliases)
    return {graph.aliases[known]: given for given, known in matching.names.items()}


def _check_values(groups: ChannelGroups, source: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Raise if the source has other values of a buffer than those that told which channels go together."""
    read = {name: digest for name, digest in groups.facts.values.items() if name in names}
    found = {name: source[names[name]] for name in read}
    wrong = differing_value(read, {name: value for name, value in found.items() if isinstance(value, Tensor)})
    if wrong is not None:
        raise WeightError(
            f"{wrong} in the weights that were given; the network was analysed with values of it that say which "
            f"channels go together. Give the model the buffers of these weights (load_state_dict with strict=False "
            f"takes a dictionary of these alone), then trace and analyze it again."
        )


@dataclass(frozen=True, slots=True)
class _GivenWeights(Mapping[str, Tensor]):
    """Weights by canonical name, looked up when they are asked for."""

    source: Mapping[str, Tensor]
    names: Mapping[str, str]
    graph: Graph

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Tensor:
        tensor, shape = self.source[self.names[name]], self.graph.state[name].shape
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            what = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
            raise WeightError(
                f"weight {self.names[name]!r} has {what}; in the network it is a tensor of shape {shape}. Give the "
                f"weights of this model."
            )
        return tensor


@dataclass(frozen=True, slots=True)
class _ComputedWeights(Mapping[str, Tensor]):
    """Weights by canonical name, those that the network computes of others computed when they are asked for."""

    held: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    nodes: Mapping[str, fx.Node]
    graph: Graph

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def __getitem__(self, name: str) -> Tensor:
        node = self.nodes.get(name)
        if node is None:
            return self.held[name]
        with torch.random.fork_rng(devices=[]):  # what is drawn at random is drawn alike each time
            torch.manual_seed(0)
            return compute_from_state(node, lambda part: self._part(part, name))

    def _part(self, name: str, weight: str) -> Tensor:
        """A tensor that a weight is computed of."""
        if name in self.held:
            return self.held[name]
        own = self.buffers[name] if name in self.buffers else self.graph.state[name].tensor
        if own.is_meta and not self.held[weight].is_meta:
            raise WeightError(
                f"{weight!r} is not read as it is: a weight is computed of it and of {name!r}, which is missing "
                f"among the weights that were given.{close_names(name, self.buffers)} Give the whole state_dict, with "
                f"buffers."
            )
        return own
