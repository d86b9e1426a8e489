"""Where in a graph the units of a group can be seen: values that its layers make, behind activations, and read."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx

from torchshear.dependency import ChannelGroups, Member
from torchshear.dependency._registry import operator_name
from torchshear.dependency._units import Ids
from torchshear.graph import Graph
from torchshear.graph._graph import shape_of
from torchshear.pruners._roles import MAKING_ROLES

# Activations by operator, and whether their results are exactly zero over a range of inputs.
_HAS_ZEROS = {
    **dict.fromkeys(("relu", "relu_", "relu6", "relu6_", "threshold", "threshold_"), True),
    **dict.fromkeys(("hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "hardshrink", "softshrink"), True),
    **dict.fromkeys(("gelu", "gelu_", "silu", "silu_", "mish", "mish_", "tanh", "tanh_", "sigmoid", "sigmoid_"), False),
    **dict.fromkeys(("elu", "elu_", "celu", "selu", "selu_", "leaky_relu", "leaky_relu_", "softplus"), False),
    **dict.fromkeys(("prelu", "_prelu_kernel", "rrelu", "log_sigmoid", "logit", "softsign"), False),
}
_CLAMPS = frozenset({"hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_"})
_NONNEGATIVE = frozenset({"relu", "relu_", "relu6", "relu6_", "hardsigmoid", "hardsigmoid_", "sigmoid", "sigmoid_"})
_CHANNEL_OF_INPUT = {  # dimension of the first operand that a layer sums over
    **dict.fromkeys(("linear", "addmm", "matmul", "mm", "bmm"), -1),
    **{f"conv{kind}{rank}d": 1 for kind in ("", "_transpose") for rank in (1, 2, 3)},
}


@dataclass(frozen=True, slots=True, eq=False)
class Tap:
    """One dimension of a value in which units of a group stand.

    Attributes:
        node: name of the node that gives the value.
        dim: the dimension.
        positions: positions along it.
        units: for each of `positions`, the unit of the group.
        operator: what the value comes from, as in "aten.relu.default".
        has_zeros: whether that operator is an activation whose results are exactly zero over a range of inputs.
        is_nonnegative: whether its results are never below zero.
    """

    node: str
    dim: int
    positions: Ids
    units: Ids
    operator: str
    has_zeros: bool = False
    is_nonnegative: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class GroupTaps:
    """Where a group can be seen.

    Attributes:
        made: results of the layers that make its units; where gates stand.
        activated: results of the first activations behind them.
    """

    made: tuple[Tap, ...]
    activated: tuple[Tap, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A call that reads a weight.

    Attributes:
        node: name of the call.
        weight: canonical name of its weight.
        bias: canonical name of its bias, or "".
        source: name of the node that it reads.
        dim: dimension of what it reads that it sums over, from 0; None for a norm, a depthwise or another layer.
    """

    node: str
    weight: str
    bias: str
    source: str
    dim: int | None


def find_taps(groups: ChannelGroups) -> dict[str, GroupTaps]:
    """For each group that can shrink, the values in which its units can be seen."""
    places = _Places(groups)
    taps: dict[str, GroupTaps] = {}
    for number, group in enumerate(groups):
        if group.is_prunable:
            makers = list(dict.fromkeys(node for member in group.members for node in places.makers(member)))
            made = [tap for node in makers for tap in places.of(node, number)]
            activated = dict.fromkeys(n for node in makers for n in _activations(node, number, places, set(makers)))
            seen = [tap for node in activated for tap in places.of(node, number)]
            taps[group.name] = GroupTaps(tuple(made), tuple(seen))
    return taps


def find_layers(graph: Graph) -> Iterator[Layer]:
    """All calls that read a weight and perhaps a bias."""
    for node in graph:
        operands = list(node.all_input_nodes) if node.op == "call_function" else []
        held = [n for n in operands if _is_state(n)]
        computed = [n for n in operands if not _is_state(n)]
        if not held or not computed:
            continue
        names = [str(n.target) for n in held]
        weight = next((n for n in names if graph.state[n].tensor.ndim > 1), names[0])  # `addmm` has the bias first
        bias = next((n for n in names if n != weight and graph.state[n].tensor.ndim == 1), "")
        dim = _CHANNEL_OF_INPUT.get(_short(node))
        if dim is not None and dim < 0:
            dim += len(shape_of(computed[0]))
        yield Layer(node.name, weight, bias, computed[0].name, dim)


def _is_state(node: fx.Node) -> bool:
    return node.op == "get_attr"


class _Places:
    """Which units of which group stand where in the values of a graph."""

    def __init__(self, groups: ChannelGroups) -> None:
        self.groups = groups
        size = len(groups.algebra.store)
        self._group_of = np.full(size, -1, np.int64)
        self._unit_of = np.zeros(size, np.int64)
        for number, group in enumerate(groups):
            self._group_of[group.atoms] = number
            self._unit_of[group.atoms] = np.arange(group.width)
        self.computed: set[fx.Node] = set()
        for node in groups.graph:
            if node.op == "placeholder" or any(n in self.computed for n in node.all_input_nodes):
                self.computed.add(node)
        self._nodes_of: dict[str, list[fx.Node]] = {}
        for node in filter(_is_state, groups.graph):
            self._nodes_of.setdefault(str(node.target), []).append(node)
        self._along: dict[int, tuple[object, Mapping[int, tuple[Ids, Ids]]]] = {}

    def of(self, node: fx.Node, group: int) -> list[Tap]:
        """Dimensions of a value in which a group stands."""
        axes = self.groups.facts.axes.get(node.name)
        found: list[Tap] = []
        if isinstance(axes, tuple) and len(axes) == len(shape_of(node)):
            for dim, axis in enumerate(axes):
                at = self._units_along(axis.units).get(group)
                if at is not None:
                    zeros, nonnegative = _gives_zeros(node), _is_nonnegative(node)
                    found.append(Tap(node.name, dim, *at, operator_name(node), zeros, nonnegative))
        return found

    def makers(self, member: Member) -> Iterator[fx.Node]:
        """Calls that make units of a group from a weight: the first ones that anything computed enters, too."""
        waiting = list(self._nodes_of.get(member.name, ())) if member.roles & MAKING_ROLES else []
        while waiting:
            for user in waiting.pop().users:
                if user in self.computed:
                    yield user
                else:
                    waiting.append(user)

    def _units_along(self, units: Ids) -> Mapping[int, tuple[Ids, Ids]]:
        known = self._along.get(id(units))
        if known is None:
            rows = self.groups.algebra.store.resolve(units)
            positions, columns = np.nonzero(rows)
            atoms = rows[positions, columns]
            of = self._group_of[atoms]
            by_group = {
                int(number): (positions[of == number], self._unit_of[atoms[of == number]])
                for number in np.unique(of[of >= 0])
            }
            known = self._along[id(units)] = (units, by_group)
        return known[1]


def _activations(start: fx.Node, group: int, places: _Places, makers: set[fx.Node]) -> Iterator[fx.Node]:
    """The first activations behind a value; one sum with another branch may lie between."""
    waiting, seen = deque([(start, 0)]), {start}
    while waiting:
        node, sums = waiting.popleft()
        for user in node.users:
            if user in seen or user in makers or not places.of(user, group):
                continue
            seen.add(user)
            if _is_activation(user):
                yield user
                continue
            sums_here = sums + (sum(n in places.computed for n in user.all_input_nodes) > 1)
            if sums_here <= 1:
                waiting.append((user, sums_here))


def _short(node: fx.Node) -> str:
    parts = operator_name(node).split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "aten" else ""


def _is_activation(node: fx.Node) -> bool:
    return _short(node) in _HAS_ZEROS or _short(node) in _CLAMPS


def _gives_zeros(node: fx.Node) -> bool:
    return _lower_bound(node) == 0 if _short(node) in _CLAMPS else _HAS_ZEROS.get(_short(node), False)


def _is_nonnegative(node: fx.Node) -> bool:
    return _lower_bound(node) >= 0 if _short(node) in _CLAMPS else _short(node) in _NONNEGATIVE


def _lower_bound(clamp: fx.Node) -> float:
    low = clamp.args[1] if len(clamp.args) > 1 else clamp.kwargs.get("min", clamp.kwargs.get("min_val"))
    return low if isinstance(low, int | float) else -math.inf
