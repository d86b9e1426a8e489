"""The kept positions of one parameter or buffer: enough to cut the tensor without the network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan_file import IndexReader, IndexWriter, read_dimension, read_size
from torchshear.errors import PlanError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Renumbering:
    """The new numbers of positions that a buffer holds, when some positions are gone.

    Attributes:
        size: number of positions before; values below 0 count from the end.
        kept: positions that stay, ascending; the value `kept[i]` becomes `i`.
    """

    size: int
    kept: Indices


@dataclass(frozen=True, slots=True, eq=False)
class StatePlan:
    """The kept positions of one parameter or buffer.

    Attributes:
        shape: sizes before.
        kept: dimension -> positions that stay, ascending; dimensions not named stay whole.
        blocks: dimension -> number of blocks of dimension 0 that its positions run over; most have none.
        numbers: how the values of a buffer of positions change; None for all others.
        is_saved: whether a `state_dict` holds it; a buffer may be left out of that.
    """

    shape: tuple[int, ...]
    kept: Mapping[int, Indices]
    blocks: Mapping[int, int]
    numbers: Renumbering | None = None
    is_saved: bool = True

    def mask(self) -> Tensor:
        """Return a bool tensor of the original shape, True where a value stays."""
        mask = torch.ones(self.shape, dtype=torch.bool)
        for dim, positions in self.kept.items():
            n_blocks = self.blocks.get(dim, 0)
            line = torch.zeros(self.shape[dim] * max(n_blocks, 1), dtype=torch.bool)
            line[torch.from_numpy(positions)] = True
            mask &= _spread(line, self.shape, dim, n_blocks)
        return mask

    @property
    def new_shape(self) -> tuple[int, ...]:
        """Sizes after the cut."""
        return tuple(
            len(self.kept[dim]) // max(self.blocks.get(dim, 0), 1) if dim in self.kept else size
            for dim, size in enumerate(self.shape)
        )

    def damage(self) -> str | None:
        """Describe the damage of an entry from a file; None if there is none."""
        for dim, kept in self.kept.items():
            n_blocks = self.blocks.get(dim, 0)
            if not 0 <= dim < len(self.shape):
                return f"has no dimension {dim}"
            if not are_ascending(kept, self.shape[dim] * max(n_blocks, 1)):
                return f"dimension {dim} keeps indices that are not ascending numbers of its positions"
            if n_blocks and not _are_blocks(kept, self.shape, dim, n_blocks):
                return f"dimension {dim} does not keep equally many positions in each of {n_blocks} blocks"
        if not self.blocks.keys() <= self.kept.keys():
            return "has blocks of a dimension that it keeps whole"
        if self.numbers is not None and not are_ascending(self.numbers.kept, self.numbers.size):
            return "counts positions that are not ascending"
        return None


def are_ascending(indices: Indices, size: int) -> bool:
    """Return True if indices name at least one of `size` positions, each once and in order."""
    return bool(indices.size and indices.min() >= 0 and indices.max() < size and (np.diff(indices) > 0).all())


def _are_blocks(kept: Indices, shape: tuple[int, ...], dim: int, n_blocks: int) -> bool:
    if dim == 0 or n_blocks < 1 or shape[0] % n_blocks:
        return False
    blocks, counts = np.unique(kept // shape[dim], return_counts=True)
    return len(blocks) == n_blocks and bool((counts == counts[0]).all())


def _spread(line: Tensor, shape: tuple[int, ...], dim: int, n_blocks: int) -> Tensor:
    """Bring a mask along one dimension into a shape that broadcasts against the whole tensor."""
    if n_blocks == 0:
        return line.reshape([-1 if i == dim else 1 for i in range(len(shape))])
    rows = line.reshape(n_blocks, shape[dim]).repeat_interleave(shape[0] // n_blocks, 0)
    return rows.reshape([shape[0], *(-1 if i == dim else 1 for i in range(1, len(shape)))])


def make_state_plan(cut: Cut, name: str) -> StatePlan | None:
    """Return the positions that a cut keeps of a parameter, buffer or constant; None if all of it stays as it is.

    Raises:
        PlanError: blocks of it would keep unequal numbers of positions.
    """
    if name not in cut.groups.facts.state_axes:
        return None
    masks, blocked = cut.state_keep(name)
    axis = cut.groups.facts.positions.get(name)
    is_renumbered = axis is not None and cut.changes(axis)
    if not is_renumbered and all(mask.all() for mask in masks):
        return None
    entry = cut.groups.graph.state[name]
    if blocked is not None and len(set(masks[blocked[0]].reshape(blocked[1], -1).sum(1).tolist())) > 1:
        raise PlanError(
            f"{name!r} would keep unequal numbers of positions in its {blocked[1]} blocks; expected equally many. The "
            f"rule of the operator that reads it forgets to balance them."
        )
    return StatePlan(
        shape=entry.shape,
        kept={dim: np.flatnonzero(mask) for dim, mask in enumerate(masks) if not mask.all()},
        blocks={blocked[0]: blocked[1]} if blocked is not None and not masks[blocked[0]].all() else {},
        numbers=Renumbering(axis.size, np.flatnonzero(cut.keep(axis))) if axis is not None and is_renumbered else None,
        is_saved=entry.is_saved,
    )


def write_state(entry: StatePlan, writer: IndexWriter) -> dict[str, Any]:
    """Return the entry of a plan's document."""
    document: dict[str, Any] = {
        "shape": list(entry.shape),
        "kept": {str(dim): writer.write(kept) for dim, kept in entry.kept.items()},
    }
    if entry.blocks:
        document["blocks"] = {str(dim): n for dim, n in entry.blocks.items()}
    if entry.numbers is not None:
        document["numbers"] = {"size": entry.numbers.size, "kept": writer.write(entry.numbers.kept)}
    if not entry.is_saved:
        document["saved"] = False
    return document


def read_state(entry: Mapping[str, Any], reader: IndexReader) -> StatePlan:
    """Read what `write_state` wrote.

    Raises:
        PlanError: an index list is damaged.
        KeyError, TypeError, ValueError: the entry is.
    """
    numbers = entry.get("numbers")
    return StatePlan(
        shape=tuple(read_size(size) for size in entry["shape"]),
        kept={read_dimension(dim): reader.read(text) for dim, text in entry["kept"].items()},
        blocks={read_dimension(dim): read_size(n) for dim, n in entry.get("blocks", {}).items()},
        numbers=None if numbers is None else Renumbering(read_size(numbers["size"]), reader.read(numbers["kept"])),
        is_saved=bool(entry.get("saved", True)),
    )
