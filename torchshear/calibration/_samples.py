"""Samples of a batch: how many there are, where they lie in the values of a graph, and the quarter that is held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor, fx
from torch.nn import functional
from torch.utils import _pytree as pytree

from torchshear.calibration._processes import is_distributed
from torchshear.errors import DataError
from torchshear.graph import Graph
from torchshear.graph._nodes import shape_of

HELD_OUT: Final = 4
"""One of so many samples is held out."""
MIN_SAMPLES: Final = 2 * HELD_OUT
_GROUP_SIZE, _ENOUGH_TO_GROUP = 8, 64
_MOST_FEATURES = 16  # of an input
_MUCH_ALIKE = 0.5  # of the spread within groups that chance gives: below it samples come from few sources


@dataclass(frozen=True, slots=True, eq=False)
class SampleSplit:
    """Samples of all batches, a quarter of which is held out.

    Attributes:
        sizes: samples in each batch.
        held_out: for each sample of all batches whether it is held out, shape (n_samples,); None: every fourth is.
    """

    sizes: tuple[int, ...]
    held_out: Tensor | None = None

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
        return cls(split.sizes, hold_out_alike(graph, batches, split.sizes))

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
        numbers = samples + sum(self.sizes[:number])
        if self.held_out is None:
            return numbers % HELD_OUT == HELD_OUT - 1
        return self.held_out[numbers % self.n_samples]


def hold_out_alike(graph: Graph, batches: Sequence[Sequence[Any]], sizes: Sequence[int]) -> Tensor | None:
    """Choose the samples that are held out so that those which are much alike are held out together.

    Crops of one photograph, or pieces of one recording, tell of each other: with some in the fit and others held out,
    the error on the latter says little about other photographs. Samples are compared by means and deviations of their
    inputs, put into groups of about eight by Ward's method, and whole groups are held out.

    Args:
        graph: the captured network.
        batches: flat inputs of each batch.
        sizes: samples in each.

    Returns:
        Mask of shape (n_samples,); None where samples are no more alike in groups than by chance, or in several
        processes, which hold different ones.
    """
    n_samples = sum(sizes)
    if is_distributed() or n_samples < _ENOUGH_TO_GROUP:
        return None
    features = torch.cat([_features(graph, leaves, size) for leaves, size in zip(batches, sizes, strict=True)])
    if not features.shape[1] or not bool(features.isfinite().all()):
        return None
    centred = features - features.mean(0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    is_used = singular > 1e-3 * singular.max()
    white = (centred @ directions[is_used].T) / singular[is_used]
    if not white.shape[1]:
        return None
    shuffled = torch.Generator().manual_seed(0)
    by_chance = torch.stack([column[torch.randperm(n_samples, generator=shuffled)] for column in white.T], 1)
    labels, spread = _group(white)
    if spread > _MUCH_ALIKE * _group(by_chance)[1]:
        return None
    held_out = torch.zeros(n_samples, dtype=torch.bool)
    groups = [labels == label for label in range(1, int(labels.max()) + 1)]
    for one in (*groups[HELD_OUT - 1 :: HELD_OUT], *groups):
        if int(held_out.sum()) + int((one & ~held_out).sum()) <= n_samples // HELD_OUT:
            held_out |= one
    return held_out if int(held_out.sum()) >= n_samples // (2 * HELD_OUT) else None


def _features(graph: Graph, leaves: Sequence[Any], size: int) -> Tensor:
    """Return means and deviations of each sample's inputs, shape (size, features), float64, on the CPU."""
    found = [torch.zeros(size, 0, dtype=torch.float64)]
    given = [node for node in graph if node.op == "placeholder"]
    for node, leaf in zip(given, leaves, strict=True):
        dim = batch_dimension(node, graph.batch_hint) or 0
        if not isinstance(leaf, Tensor) or leaf.ndim < 2 or leaf.shape[dim] != size or leaf.is_complex():
            continue
        rows = leaf.detach().movedim(dim, 0).flatten(2 if leaf.ndim > 2 else 1).cpu().double()
        rows = rows.unsqueeze(1) if rows.ndim == 2 else rows  # (size, channels, places)
        each = torch.cat([rows.mean(2), rows.std(2, correction=0)], 1)
        found.append(functional.adaptive_avg_pool1d(each, min(each.shape[1], _MOST_FEATURES)))
    return torch.cat(found, 1)


def _group(points: Tensor) -> tuple[Tensor, float]:
    """Put points into groups of about eight; returns the number of each one's group, and their spread within groups."""
    tree = linkage(points.numpy(), "ward")
    labels = torch.from_numpy(fcluster(tree, len(points) // _GROUP_SIZE, "maxclust"))
    parts = [points[labels == label] for label in range(1, int(labels.max()) + 1)]
    return labels, float(sum((part - part.mean(0)).square().sum() for part in parts))


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
