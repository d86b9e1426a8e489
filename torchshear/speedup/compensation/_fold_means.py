"""Where means of cut channels over data can go: the biases of the layers that read them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from torchshear.speedup.compensation._constants import Barrier, ConstantNetwork, Look
from torchshear.speedup.compensation._fold_places import UNEVEN, Places, Search, layer_of
from torchshear.speedup.compensation._fold_record import FoldedConstants

Means = Mapping[tuple[str, int], Tensor]


def find_places_of_means(network: ConstantNetwork, inputs: list[list[Any]], means: Means) -> Places:
    """Run a network with zeros on its cut channels on several inputs, and fold what layers read on average of those.

    Args:
        network: the network.
        inputs: flat inputs of each run, at least two.
        means: (name of the node that a layer reads, dimension of its channels) -> mean of each channel.
    """
    search = _MeanSearch(network, means)
    network.walk(inputs, search.decide)
    return search.places


class _MeanSearch(Search):
    def __init__(self, network: ConstantNetwork, means: Means) -> None:
        super().__init__(network)
        self.means = means
        self.places.others = Barrier("all")

    def _chosen(self, node: fx.Node, before: Sequence[Look], through: list[Any], masked: list[Any]) -> list[Any]:
        """What a layer gives that reads means, where these fold; else what it gives with zeros."""
        read = self._read(node)
        if isinstance(read, str):
            return masked
        found = self.means.get((read.operand.name, read.dim))
        gone = torch.from_numpy(read.gone)
        if found is None or len(found) != len(gone):
            self._skip(node, int(gone.sum()), "what it reads was not seen on the data")
            return masked
        line = torch.where(gone, found, torch.zeros_like(found))
        barrier = Barrier("inputs", read.operand.name, read.dim, means=line)
        some = self._all(node, before, barrier)
        if self._are_same(node, some, masked):
            return masked
        added, target = self._same_everywhere(node, read.channel, some, masked), self._target(node)
        n_channels = int(np.count_nonzero(line))
        if added is None or isinstance(target, str):
            self._skip(node, n_channels, UNEVEN if added is None else str(target))
            return masked
        self.places.changes[target.name] = target.sign * added
        self.places.folded.append(FoldedConstants(layer_of(node), target.name, n_channels))
        self.places.barriers[node.name] = barrier
        return some
