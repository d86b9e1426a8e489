"""Where criteria get weights from: the model that was traced, a mapping, or a checkpoint on disk."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike

from torch import Tensor

from torchshear._checkpoint import match_names, open_checkpoint
from torchshear.dependency import ChannelGroups
from torchshear.dependency._read_values import differing_value
from torchshear.errors import ArgumentError, WeightError
from torchshear.graph import Graph

WeightSource = Mapping[str, Tensor] | str | PathLike[str] | None


def weights_to_score(groups: ChannelGroups, source: WeightSource) -> Mapping[str, Tensor]:
    """The weights of a network by canonical name.

    Args:
        groups: the analysed network.
        source: as for `torchshear.plan`.

    Raises:
        ArgumentError: `source` is of another type.
        CheckpointError: it is a path, and there is no checkpoint that can be read.
        WeightError: it lacks a weight that can shrink, or has it in another shape; the latter when it is looked up. Or
            it has other values of a buffer that the groups rest on.
    """
    graph = groups.graph
    if source is None:
        return {name: entry.tensor for name, entry in graph.state.items() if entry.kind == "parameter"}
    if isinstance(source, str | PathLike):
        source = open_checkpoint(source)
    if not isinstance(source, Mapping):
        raise ArgumentError(
            f"weights is {type(source).__name__}; expected the folder of a checkpoint, or a mapping from parameter "
            f"names to tensors."
        )
    names = _names(source, graph)
    _check_values(groups, source, names)
    parameters = {name: given for name, given in names.items() if graph.state[name].kind == "parameter"}
    given = _GivenWeights(source, parameters, graph)
    for group in groups.prunable:
        for member in group.members:
            if graph.state[member.name].kind == "parameter" and member.name not in given:
                raise WeightError(
                    f"no weight {member.name!r} of group {group.name!r} was given; expected every parameter that can "
                    f"shrink. Give the weights of this model, with the names of its state_dict."
                )
    return given


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
