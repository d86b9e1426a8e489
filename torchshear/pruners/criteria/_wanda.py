"""Weights times the size of what they read."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from torchshear.calibration import Statistics
from torchshear.calibration._sums import wide
from torchshear.calibration._weight_calls import WeightCall
from torchshear.dependency import ChannelGroup
from torchshear.pruners.criteria._criterion import UnscorableError, criterion
from torchshear.pruners.criteria._statistic_sums import with_needs
from torchshear.pruners.criteria._weight_sums import readable, unit_sums

_LAYERS = frozenset({"out", "depthwise"})


@criterion("wanda", needs=("inputs",))
def wanda_scores(group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics | None) -> Tensor:
    """Score each unit by its weights, each times the size of the input that it multiplies; shape (C,).

    s_c = sum over layers of the group, over inputs i, of |W[c, i]| sqrt(mean of x_i^2)

    the mean over all samples and places, and over the experts where one tensor holds their weights. Layers whose inputs
    were not seen count with inputs of size 1.

    Low scores go first: units with small weights on small inputs. Needs activations: statistics of
    `torchshear.collect(graph, loader)`.

    Raises:
        ArgumentError: there are no statistics.
        UnscorableError: no layer makes the units of the group.
        WeightError: a weight is missing, without values, or not finite.

    Reference: Sun et al., ICLR 2024, arXiv:2306.11695, for single weights; here summed over units.
    """
    seen = with_needs(statistics, "wanda")
    if not any(member.purposes & _LAYERS for member in group.members):
        raise UnscorableError("wanda: its units are made by no layer that multiplies inputs")
    return unit_sums(group, _Weighted(group, weights, seen), lambda weight: weight, _LAYERS)


class _Weighted(Mapping[str, Tensor]):
    """Sizes of weights times those of their inputs, computed when asked for."""

    def __init__(self, group: ChannelGroup, weights: Mapping[str, Tensor], statistics: Statistics) -> None:
        self.members = {m.name: m for m in group.members if m.name in weights and m.purposes & _LAYERS}
        self.weights = weights
        self.statistics = statistics
        self.layers: dict[str, list[WeightCall]] = {}
        for layer in statistics.layers:
            self.layers.setdefault(layer.weight, []).append(layer)

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __getitem__(self, name: str) -> Tensor:
        member = self.members[name]
        weight = wide(readable(member, self.weights[name]).abs())
        inputs, sizes = self._inputs(name)
        if inputs is None or weight.ndim < 2:
            return weight
        sizes = sizes.to(weight.device, weight.dtype)
        shape = [1] * weight.ndim
        if len(sizes) == weight.shape[inputs]:
            shape[inputs] = len(sizes)
            return weight * sizes.reshape(shape)
        if inputs == 1 and len(sizes) % weight.shape[1] == 0:  # groups of inputs, each read by as many outputs
            n_groups = len(sizes) // weight.shape[1]
            each = sizes.reshape(n_groups, -1).repeat_interleave(weight.shape[0] // n_groups, 0)
            return weight * each.reshape(*weight.shape[:2], *shape[2:])
        return weight

    def _inputs(self, name: str) -> tuple[int | None, Tensor]:
        """The dimension of a weight that it multiplies inputs with, and their sizes over all calls that read it."""
        squares, count, inputs = torch.zeros(0), 0, None
        for layer in self.layers.get(name, ()):
            sums = None if layer.dim is None else self.statistics.values.get((layer.source, layer.dim))
            if sums is not None and (inputs is None or (inputs, len(squares)) == (layer.inputs, len(sums.squares))):
                inputs, count = layer.inputs, count + sums.count
                squares = squares + sums.squares if len(squares) else sums.squares
        return inputs, (squares / max(1, count)).sqrt()
