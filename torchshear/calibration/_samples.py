"""Samples of a batch: how many there are, where they lie in the values of a graph, and the quarter that is held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.errors import DataError
from torchshear.graph import Graph
from torchshear.graph._nodes import shape_of

HELD_OUT: Final = 4
"""One of so many samples is held out."""
MIN_SAMPLES: Final = 2 * HELD_OUT


@dataclass(frozen=True, slots=True)
class SampleSplit:
    """Samples of all batches, a quarter of which is held out.

    Attributes:
        sizes: samples in each batch.
    """

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, graph: Graph, batches: Sequence[Sequence[Any]]) -> "SampleSplit":
        """Count the samples in batches of flat inputs.

        Raises:
            DataError: a batch holds none, or all together hold too few.
        """
        split = cls(tuple(count_samples(graph, leaves) for leaves in batches))
        if 0 in split.sizes:
            raise DataError(f"batch {split.sizes.index(0)} holds no sample; expected at least one.")
        if split.n_samples < MIN_SAMPLES:
            raise DataError(
                f"the data has {split.n_samples} samples; a refit needs at least {MIN_SAMPLES}, of which a quarter is "
                f"held out. Some hundred are better."
            )
        return split

    @property
    def n_samples(self) -> int:
        """Number of samples in all batches."""
        return sum(self.sizes)

    def is_held_out(self, samples: Tensor, number: int) -> Tensor:
        """Return a mask of the samples that are held out.

        Args:
            samples: numbers of samples within their batch.
            number: number of the batch.
        """
        return (samples + sum(self.sizes[:number])) % HELD_OUT == HELD_OUT - 1


def count_samples(graph: Graph, leaves: Sequence[Any]) -> int:
    """Return the number of samples in a batch of flat inputs.

    Where the capture has a free batch, the inputs that have it tell. Otherwise it is the length of the first input that
    divides the length of an output; if there is none, as where samples have no batch dimension, a batch is one sample.
    """
    given = [node for node in graph if node.op == "placeholder"]
    tensors = [(node, leaf) for node, leaf in zip(given, leaves, strict=True) if isinstance(leaf, Tensor) and leaf.ndim]
    if graph.batch_hint is not None:
        free = [(leaf, batch_dimension(node, graph.batch_hint)) for node, leaf in tensors]
        return next((leaf.shape[dim] for leaf, dim in free if dim is not None), 1)
    values = [node.meta.get("val") for node in output_nodes(graph) if isinstance(node, fx.Node)]
    lengths = [int(value.shape[0]) for value in values if isinstance(value, Tensor) and value.ndim]
    return next((len(leaf) for _, leaf in tensors if any(n % max(len(leaf), 1) == 0 for n in lengths or (0,))), 1)


def output_nodes(graph: Graph) -> list[Any]:
    """Return the flat outputs of a graph: nodes, and numbers."""
    return next(pytree.tree_leaves(node.args[0]) for node in graph if node.op == "output")


def batch_dimension(node: fx.Node, batch_hint: int | None) -> int | None:
    """Return the dimension of a value that holds the batch; None if there is none, or the capture has a fixed batch.

    Args:
        node: the value.
        batch_hint: the free batch of the capture, a prime that divides no size of the model.
    """
    shape = shape_of(node) if isinstance(node.meta.get("val"), Tensor) else ()
    return next((dim for dim, size in enumerate(shape) if batch_hint and size and size % batch_hint == 0), None)


def sample_numbers(length: int, n_samples: int) -> Tensor:
    """Return the number of the sample at each position of a dimension that holds the batch.

    A multiple of the batch has the positions of a sample side by side. Any other length, as of tokens that data picks,
    has nothing to do with samples; each position counts as one.
    """
    positions = torch.arange(length)
    return positions // (length // n_samples) if length and length % n_samples == 0 else positions
