"""Outputs of the model that may shrink: what a cut leaves of each, and how a plan file says so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan_file import IndexReader, IndexWriter, read_dimension, read_name, read_size
from torchshear.dependency.rules._findings import Facts
from torchshear.graph import Graph
from torchshear.graph._graph import output_nodes, shape_with_batch
from torchshear.graph._names import matches
from torchshear.graph.model._state import Mode

Indices = npt.NDArray[np.int64]


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
