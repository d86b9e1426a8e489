"""The kept positions of one tensor: of a parameter or buffer, or of an output of the model that may shrink."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from torchshear._arguments import matches
from torchshear.dependency.groups._groups import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan_file import IndexReader, IndexWriter, read_dimension, read_name, read_size
from torchshear.dependency.rules._findings import Facts
from torchshear.errors import PlanError
from torchshear.graph import Graph
from torchshear.graph._graph import output_nodes, shape_with_batch
from torchshear.graph.model._state import Mode

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


def check_consistency(kept: Mapping[str, Indices], state: Mapping[str, StatePlan], groups: ChannelGroups) -> None:
    """Check that the kept positions of every parameter and buffer follow from the kept units of the groups.

    Args:
        kept: group name -> kept units, by a plan.
        state: canonical name -> kept positions, by the same plan.
        groups: the analysed network that it is for.

    Raises:
        PlanError: they do not, or a group or a constraint does not fit the network.
    """
    cut = Cut(groups, kept)
    for name, entry in groups.graph.state.items():
        if entry.kind == "constant":
            continue
        follows = make_state_plan(cut, name)
        if not _are_equal(state.get(name), follows):
            said = state[name].new_shape if name in state else entry.shape
            shape = entry.shape if follows is None else follows.new_shape
            raise PlanError(
                f"the plan contradicts itself: by its groups {name!r} becomes {shape}, and by its own entry {said}, or "
                f"other positions of it stay. A plan that was edited cannot be used: say what to keep with "
                f"torchshear.pruners.plan_from_kept."
            )
    unknown = sorted(state.keys() - groups.graph.state.keys())
    if unknown:
        raise PlanError(f"the plan shrinks {unknown[0]!r}, which the network does not have; make a new plan for it.")


def _are_equal(left: StatePlan | None, right: StatePlan | None) -> bool:
    if left is None or right is None:
        return left is right
    lists: list[dict[int | str, Indices]] = []
    for entry in (left, right):
        lists.append({dim: kept for dim, kept in entry.kept.items()})  # noqa: C416 - a wider key
        if entry.numbers is not None:
            lists[-1][f"numbers of {entry.numbers.size}"] = entry.numbers.kept
    return (
        (left.shape, dict(left.blocks), left.is_saved) == (right.shape, dict(right.blocks), right.is_saved)
        and lists[0].keys() == lists[1].keys()
        and all(np.array_equal(kept, lists[1][key]) for key, kept in lists[0].items())
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


@dataclass(frozen=True, slots=True, eq=False)
class OutputPlan:
    """The kept positions of one output of the model that may shrink.

    Attributes:
        name: its name, as "last_hidden_state" or "features.3".
        index: its place among all outputs, flattened.
        shape: sizes before, None where they follow the batch.
        kept: dimension -> positions that stay, ascending; dimensions not named stay whole.
        note: why nothing of it can go, or "".
        mode: the mode in which the model gives it; "eval" where a capture of train mode was not needed.
    """

    name: str
    index: int
    shape: tuple[int | None, ...]
    kept: Mapping[int, Indices]
    note: str = ""
    mode: Mode = "eval"

    @property
    def shape_after(self) -> tuple[int | None, ...]:
        """Sizes after, None where they follow the batch."""
        return tuple(len(self.kept[dim]) if dim in self.kept else size for dim, size in enumerate(self.shape))


def output_plans(cut: Cut) -> tuple[OutputPlan, ...]:
    """Return the kept positions of each output that may shrink, also in train mode if that gives other outputs."""
    groups = cut.groups
    graphs = [(groups.graph, groups.facts)]
    if groups.graph.training is not None and groups.training_facts is not None:
        graphs.append((groups.graph.training, groups.training_facts))
    return tuple(
        _output_plan(cut, graph, facts, name, index, value)
        for graph, facts in graphs
        for index, (name, value) in enumerate(output_nodes(graph))
        if isinstance(value, fx.Node) and any(matches(pattern, name) for pattern in groups.prunable_outputs)
    )


def _output_plan(cut: Cut, graph: Graph, facts: Facts, name: str, index: int, node: fx.Node) -> OutputPlan:
    axes = facts.axes.get(node.name)
    if not isinstance(axes, tuple):
        return OutputPlan(name, index, (), {}, "it is no tensor", graph.mode)
    algebra = cut.groups.algebra
    kept = {dim: np.flatnonzero(cut.keep(axis)) for dim, axis in enumerate(axes) if cut.changes(axis)}
    shape = shape_with_batch(graph, node)
    own = [axis for axis, size in zip(axes, shape, strict=True) if size is not None]
    reasons = [str(algebra.store.first_reason(axis.units) or "fixed") for axis in own if algebra.is_fixed(axis)]
    note = "; ".join(dict.fromkeys(reasons)) if len(reasons) == len(own) else ""
    return OutputPlan(name, index, shape, kept, note, graph.mode)


def write_outputs(patterns: Sequence[str], outputs: Sequence[OutputPlan], writer: IndexWriter) -> dict[str, Any]:
    """Return the entries of a plan file; none where no output may shrink."""
    if not patterns:
        return {}
    entries = [
        {
            "name": output.name,
            "index": output.index,
            "shape": list(output.shape),
            "kept": {str(dim): writer.write(kept) for dim, kept in output.kept.items()},
            **({"note": output.note} if output.note else {}),
            **({"mode": output.mode} if output.mode != "eval" else {}),
        }
        for output in outputs
    ]
    return {"prunable_outputs": list(patterns), "outputs": entries}


def read_outputs(entries: Sequence[Mapping[str, Any]], reader: IndexReader) -> tuple[OutputPlan, ...]:
    """Read the outputs of a plan file.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the entries are damaged.
    """
    return tuple(
        OutputPlan(
            read_name(entry["name"]),
            read_size(entry["index"]),
            tuple(None if size is None else read_size(size) for size in entry["shape"]),
            {read_dimension(dim): reader.read(text) for dim, text in entry["kept"].items()},
            read_name(entry.get("note", "")),
            _read_mode(entry.get("mode", "eval")),
        )
        for entry in entries
    )


def _read_mode(text: object) -> Mode:
    if text not in ("eval", "train"):
        raise ValueError(f"{text!r} is no mode")
    return "eval" if text == "eval" else "train"
