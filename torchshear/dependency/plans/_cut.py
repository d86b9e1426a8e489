"""A choice of kept units and what follows from it: kept positions of every axis, masks, sizes and cost."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from torchshear.dependency.algebra._axis import Axis
from torchshear.dependency.algebra._units import PAD, Ids
from torchshear.dependency.groups._groups import ChannelGroups
from torchshear.errors import PlanError
from torchshear.graph import Cost, Graph
from torchshear.graph._graph import is_in_parts
from torchshear.graph._location import locate
from torchshear.graph._nodes import shape_of, tensor_operands
from torchshear.graph._operator_record import node_macs

Bools = npt.NDArray[np.bool_]


class Cut:
    """Kept units of every group, checked against all constraints.

    Args:
        groups: the analysed network.
        kept: group name -> kept units as sorted indices; groups not named keep everything.

    Raises:
        PlanError: a group is unknown, indices are out of range or repeated, nothing would be left of a dimension, or
            balanced blocks would lose unequal numbers.
    """

    def __init__(self, groups: ChannelGroups, kept: Mapping[str, Ids]) -> None:
        self.groups = groups
        self._known: dict[int, tuple[Axis, Bools]] = {}  # with the axis, so that its array keeps its identity
        self._cut = np.zeros(len(groups.algebra.store), bool)
        self._masks: dict[str, Bools] = {}
        by_name = {group.name: group for group in groups}
        for name, indices in kept.items():
            if name not in by_name:
                raise PlanError(f"channel group {name!r} is not in this network; the plan is of another model.")
            indices, width = np.asarray(indices), by_name[name].width
            if indices.size and (indices.min() < 0 or indices.max() >= width):
                raise PlanError(
                    f"kept units {int(indices.min())}..{int(indices.max())} of group {name!r}; expected indices below "
                    f"its width {width}. The plan is damaged or of another model."
                )
            mask = self._masks[name] = np.zeros(width, bool)
            mask[indices.astype(np.int64)] = True
            if mask.sum() != indices.size:
                raise PlanError(f"kept units of group {name!r} are named twice; the plan is damaged.")
            if not mask.any():
                raise PlanError(f"group {name!r} would keep no unit; keep at least one.")
            gone = by_name[name].atoms[~mask]
            self._cut[groups.algebra.store.resolve(gone[:, None])] = True
        self._cut[PAD] = False
        self._check()

    @property
    def kept(self) -> dict[str, Ids]:
        """Group name -> kept units, ascending, for the groups that were named."""
        return {name: np.flatnonzero(mask) for name, mask in self._masks.items()}

    def keep(self, axis: Axis) -> Bools:
        """Return the mask of kept positions of an axis; shape (positions,)."""
        known = self._known.get(id(axis.units))
        if known is None:
            rows = self.groups.algebra.store.resolve(axis.units)
            mask = np.asarray(~self._cut[rows].any(1)) if rows.shape[1] else np.ones(len(rows), bool)
            mask.flags.writeable = False
            known = self._known[id(axis.units)] = (axis, mask)
        return known[1]

    def changes(self, axis: Axis) -> bool:
        """Return True if any position of the axis is cut."""
        return not bool(self.keep(axis).all())

    def _check(self) -> None:
        facts = self.groups.facts
        for balance in facts.balances:
            left = self.keep(balance.axis).reshape(balance.n_blocks, -1).sum(1)
            if len(set(left.tolist())) > 1 or left[0] == 0:
                raise PlanError(
                    f"{balance.n_blocks} blocks keep {left.tolist()} channels; expected equally many, at least one, in "
                    f"each: {locate(balance.node)}. Cut as many units in each block of the group's `balance`."
                )
        for minimum in facts.minimums:
            n_left = int(self.keep(minimum.axis).sum())
            if n_left < minimum.count:
                raise PlanError(
                    f"{n_left} of {minimum.axis.size} channels stay; expected at least {minimum.count}: "
                    f"{locate(minimum.node)}. Keep `min_units` units of the group."
                )
        for group in self.groups:
            mask = self._masks.get(group.name)
            left_units = ~self._cut[self.groups.algebra.store.resolve(group.atoms[:, None])].any(1)
            if not np.array_equal(left_units, np.ones(group.width, bool) if mask is None else mask):
                raise PlanError(f"units of group {group.name!r} are tied to units of other groups that go.")
        for name, axes in facts.state_axes.items():
            for dim, axis in enumerate(axes):
                if axis.size and not self.keep(axis).any():
                    raise PlanError(f"nothing is left of dimension {dim} of {name!r}; keep at least one unit.")

    def state_keep(self, name: str) -> tuple[list[Bools], tuple[int, int] | None]:
        """Kept positions of each dimension of a parameter or buffer.

        Returns:
            A mask for each dimension, and (dimension, number of blocks) if the mask of that dimension runs over all
            blocks of dimension 0.
        """
        axes = list(self.groups.facts.state_axes[name])
        blocked = self.groups.facts.blocked.get(name)
        if blocked is None:
            return [self.keep(axis) for axis in axes], None
        dim, axis, n_blocks = blocked
        axes[dim] = axis
        return [self.keep(axis) for axis in axes], (dim, n_blocks)

    def state_shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a parameter or buffer after the cut."""
        if name not in self.groups.facts.state_axes:
            return self.groups.graph.state[name].shape
        masks, blocked = self.state_keep(name)
        sizes = [int(mask.sum()) for mask in masks]
        if blocked is not None:
            sizes[blocked[0]] //= blocked[1]
        return tuple(sizes)

    def shape(self, node: fx.Node) -> Any:
        """Shape of a node's value after the cut; structure as `shape_of`."""
        axes = self.groups.facts.axes.get(node.name)
        if node.op == "get_attr":
            return self.state_shape(str(node.target))
        if axes is None:
            return shape_of(node)
        sizes = [
            tuple(int(self.keep(axis).sum()) for axis in part) for part in (axes if isinstance(axes, list) else [axes])
        ]
        return tuple(sizes) if isinstance(axes, list) else sizes[0]

    def cost(self) -> Cost:
        """Parameters, multiply-accumulate operations and bytes after the cut."""
        return _cost(self.groups.graph, self.groups.graph.state, self.shape, self.state_shape)


def dense_cost(graph: Graph) -> Cost:
    """Count parameters, multiply-accumulate operations and bytes of the network as it is."""
    return _cost(graph, graph.state, shape_of, lambda name: graph.state[name].shape)


def _cost(
    graph: Graph,
    names: Iterable[str],
    shape: Callable[[fx.Node], Any],
    state_shape: Callable[[str], tuple[int, ...]],
    counts: Callable[[fx.Node], bool] = lambda node: True,
) -> Cost:
    """Count over some tensors and nodes, by the shapes that functions give."""
    sizes = {name: int(np.prod(state_shape(name), dtype=np.int64)) for name in names}
    n_params = sum(size for name, size in sizes.items() if graph.state[name].kind == "parameter")
    size_bytes = sum(size * graph.state[name].tensor.element_size() for name, size in sizes.items())
    return Cost(n_params, graph_macs(graph, shape, counts), size_bytes)


def graph_macs(
    graph: Graph, shape: Callable[[fx.Node], Any], counts: Callable[[fx.Node], bool] = lambda node: True
) -> int:
    """Count the multiply-accumulate operations of one sample over some nodes, by the shapes that a function gives."""
    total = 0
    for node in graph:
        if counts(node) and node.op == "call_function" and isinstance(node.meta.get("val"), Tensor | tuple | list):
            operands = tensor_operands(node)
            if operands and isinstance(node.target, torch._ops.OpOverload):
                total += node_macs(str(node.target), [shape(n) for n in operands], shape(node))
    return total // (graph.batch_hint or 1)


def part_costs(cut: Cut) -> dict[str, tuple[Cost, Cost]]:
    """Count parameters and operations of each part of a model before and after a cut.

    Args:
        cut: a cut of a model of which parts were captured.

    Returns:
        Name of a part -> (before, after). Tied parameters count in each part that holds them; each captured call counts
        once in the work. Empty for a model that was captured whole.
    """
    graph = cut.groups.graph
    parts = graph.parts
    if parts is None:
        return {}

    def cost(name: str, shape: Callable[[fx.Node], Any], state_shape: Callable[[str], tuple[int, ...]]) -> Cost:
        one = parts.of(name)
        held = {graph.aliases[alias] for alias in graph.aliases if is_in_parts(alias, one)}
        return _cost(graph, held, shape, state_shape, lambda node: is_in_parts(locate(node).module, one))

    return {
        name: (cost(name, shape_of, lambda key: graph.state[key].shape), cost(name, cut.shape, cut.state_shape))
        for name in parts.names
    }
