"""Taps: values in which the units of a group can be seen, made by its layers or by the activations behind them."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import fx

from torchshear.calibration._recurrent import axes_of, is_recurrent, passes
from torchshear.calibration._weight_calls import is_state
from torchshear.dependency import ChannelGroups, Member
from torchshear.dependency.algebra._units import Ids
from torchshear.dependency.groups._purposes import MAKING_PURPOSES
from torchshear.dependency.rules._call import bind_arguments
from torchshear.dependency.rules._findings import Result
from torchshear.dependency.rules._weights import weight_behind
from torchshear.errors import DataError
from torchshear.graph import Graph
from torchshear.graph._nodes import shape_of
from torchshear.graph._operator_record import Activation, operator_name, operator_of

_Activation = tuple[fx.Node, fx.Node | None]  # an activation, and what is added to another branch in front of it


@dataclass(frozen=True, slots=True, eq=False)
class Tap:
    """One dimension of a value in which units of a group stand.

    Attributes:
        node: name of the node that gives the value, or of a layer inside a recurrent call.
        dim: the dimension.
        size: of that dimension.
        positions: positions along it.
        units: for each of `positions`, the unit of the group.
        operator: what the value comes from, as in "aten.relu.default".
        has_zeros: whether that operator is an activation whose results are exactly zero over a range of inputs.
        is_nonnegative: whether its results are never below zero.
        samples: dimension along which the samples stand; None if there is none.
        through: name of an activation that the value is put through before it is looked at; "" if it is not.
    """

    node: str
    dim: int
    size: int
    positions: Ids
    units: Ids
    operator: str
    has_zeros: bool = False
    is_nonnegative: bool = False
    samples: int | None = None
    through: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Key of its sums: name of the value that is looked at, and the dimension."""
        return f"{self.node}>{self.through}" if self.through else self.node, self.dim


@dataclass(frozen=True, slots=True, eq=False)
class GroupTaps:
    """Taps of one group.

    Attributes:
        made: results of the layers that make its units; where gates stand.
        activated: results of the first activations behind them; a recurrent layer has its own inside.
        by_layer: weight of a layer -> the same of that layer alone. Where its activation is behind a sum with another
            branch, what it adds to the sum is put through that activation, unless this has weights of its own.
    """

    made: tuple[Tap, ...]
    activated: tuple[Tap, ...]
    by_layer: Mapping[str, tuple[Tap, ...]] = field(default_factory=dict)

    @property
    def visible(self) -> tuple[Tap, ...]:
        """Taps behind the activations of the group, or behind its layers if it has no activation."""
        return self.activated or self.made


def find_taps(groups: ChannelGroups) -> dict[str, GroupTaps]:
    """For each group that can shrink, the values in which its units can be seen."""
    places = _Places(groups)
    taps: dict[str, GroupTaps] = {}
    for number, group in enumerate(groups):
        if group.is_prunable:
            makers_of: dict[str, list[fx.Node]] = {}
            for member in group.members:  # a weight from a group to itself has two
                makers_of.setdefault(member.name, []).extend(places.makers(member))
            makers = list(dict.fromkeys(node for nodes in makers_of.values() for node in nodes))
            made = [tap for node in makers for tap in places.of(node, number)]
            shown = {node: list(_find_activations(node, number, places, set(makers))) for node in makers}
            activated = dict.fromkeys(found for node in makers for found, _ in shown[node])
            seen = [tap for node in activated for tap in places.of(node, number)]
            by_layer = {
                name: tuple(_of_layer(nodes, number, places, shown)) for name, nodes in makers_of.items() if nodes
            }
            taps[group.name] = GroupTaps(tuple(made), tuple(seen), by_layer)
    return taps


def _of_layer(
    makers: list[fx.Node], group: int, places: "_Places", shown: Mapping[fx.Node, list[_Activation]]
) -> list[Tap]:
    """Return the taps of the results of one layer's own calls."""
    found: dict[tuple[str, int], Tap] = {}
    for activation, before in [pair for node in makers for pair in shown[node]]:
        branch = before if len(activation.all_input_nodes) == 1 else None
        for tap in places.of(activation if branch is None else branch, group):
            if branch is not None:
                tap = replace(
                    tap,
                    operator=operator_name(activation),
                    has_zeros=_gives_zeros(activation),
                    is_nonnegative=_is_nonnegative(activation),
                    through=activation.name,
                )
            found.setdefault(tap.key, tap)
    return list(found.values()) or [tap for node in makers for tap in places.of(node, group)]


class _Places:
    """Positions of the units of each group in the values of a graph."""

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
        for node in filter(is_state, groups.graph):
            self._nodes_of.setdefault(str(node.target), []).append(node)
        source = sample_input(groups.graph)
        self._batch = source[1] if source is not None else 1
        self._along: dict[int, tuple[object, Mapping[int, tuple[Ids, Ids]]]] = {}

    def of(self, node: fx.Node, group: int) -> list[Tap]:
        """Dimensions of a value in which a group stands."""
        axes = self.groups.facts.axes.get(node.name)
        if is_recurrent(node):
            return self._in_passes(node, axes, group)
        found: list[Tap] = []
        if isinstance(axes, tuple) and len(axes) == len(shape_of(node)):
            for dim, axis in enumerate(axes):
                at = self._units_along(axis.units).get(group)
                if at is not None:
                    samples = self._sample_dim(shape_of(node), dim)
                    zeros, nonnegative = _gives_zeros(node), _is_nonnegative(node)
                    name = operator_name(node)
                    found.append(Tap(node.name, dim, axis.size, *at, name, zeros, nonnegative, samples))
        return found

    def _in_passes(self, node: fx.Node, results: Result, group: int) -> list[Tap]:
        """Of a recurrent call what each layer and direction gives at all steps."""
        found: list[Tap] = []
        own = passes(node)
        for one, axis in zip(own, axes_of(results, len(own)), strict=True):
            at = self._units_along(axis.units).get(group)
            if at is not None:
                samples = self._sample_dim(one.shape, one.dim, one.batch)
                zeros = one.has_zeros
                found.append(Tap(one.name, one.dim, axis.size, *at, operator_name(node), zeros, zeros, samples))
        return found

    def _sample_dim(self, shape: tuple[int, ...], other: int, known: int | None = None) -> int | None:
        return sample_dim(self.groups.graph, self._batch, shape, other, known)

    def has(self, node: fx.Node, group: int) -> bool:
        """Return whether a group stands in a value, or in one of several that a call gives."""
        results = self.groups.facts.axes.get(node.name)
        each = results if isinstance(results, list) else [results or ()]
        return any(group in self._units_along(axis.units) for axes in each for axis in axes)

    def makers(self, member: Member) -> Iterator[fx.Node]:
        """Calls that make units of a group from a weight: the first ones that anything computed enters, too."""
        waiting = list(self._nodes_of.get(member.name, ())) if member.purposes & MAKING_PURPOSES else []
        while waiting:
            for user in waiting.pop().users:
                if user in self.computed and weight_behind(user, {}) is None:
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


def _find_activations(maker: fx.Node, group: int, places: _Places, makers: set[fx.Node]) -> Iterator[_Activation]:
    """Yield the activations behind a call; a recurrent call is one itself."""
    if is_recurrent(maker):
        yield maker, None
    else:
        yield from _activations(maker, group, places, makers)


def _activations(start: fx.Node, group: int, places: _Places, makers: set[fx.Node]) -> Iterator[_Activation]:
    """The first activations behind a value; one sum with another branch may lie between, which is told with them."""
    waiting: deque[tuple[fx.Node, fx.Node | None]] = deque([(start, None)])
    seen = {start}
    while waiting:
        node, branch = waiting.popleft()
        for user in node.users:
            if user in seen or user in makers or not places.has(user, group):
                continue
            seen.add(user)
            if _is_activation(user):
                yield user, branch
                continue
            is_sum = sum(n in places.computed for n in user.all_input_nodes) > 1
            if not is_sum or branch is None:
                waiting.append((user, node if is_sum else branch))


def _is_activation(node: fx.Node) -> bool:
    return operator_of(node).activation is not None


def _gives_zeros(node: fx.Node) -> bool:
    activation = operator_of(node).activation
    return activation is not None and (activation.has_zeros or _lower_bound(node, activation) == 0)


def _is_nonnegative(node: fx.Node) -> bool:
    activation = operator_of(node).activation
    return activation is not None and (activation.is_nonnegative or _lower_bound(node, activation) >= 0)


def _lower_bound(node: fx.Node, activation: Activation) -> float:
    """The least result by an argument of the call; minus infinity where none says."""
    low = bind_arguments(node).get(activation.lower_bound)
    return low if isinstance(low, int | float) else -math.inf


def sample_input(graph: Graph) -> tuple[int, int] | None:
    """Return the number of the flat input that has the samples along dimension 0, and their number in the capture.

    It is the first whose size there is free, or else the first that has dimensions.

    Raises:
        DataError: there were none in the capture.
    """
    nodes = [node for node in graph if node.op == "placeholder"]
    batched = [number for number, node in enumerate(nodes) if shape_of(node)]
    free = [number for number in batched if graph.is_dynamic(nodes[number], 0)]
    for number in free or batched:
        size = shape_of(nodes[number])[0]
        if not size:
            raise DataError("the model was captured with inputs that hold no sample; trace it with at least one.")
        return number, size
    return None


def sample_dim(graph: Graph, batch: int, shape: tuple[int, ...], other: int, known: int | None = None) -> int | None:
    """The dimension of a value along which samples stand: the batch itself, or dimension 0 if it is a multiple of it.

    Where the batch of the graph is fixed, a dimension is the batch if it is dimension 0 and of the right size.

    Args:
        graph: the captured model.
        batch: number of samples in the capture; see `sample_input`.
        shape: of the value.
        other: a dimension that it is not.
        known: the dimension that the operator takes for the batch, if it tells; it may be of no sample even so.
    """
    if known is not None:
        return known if shape[known] >= batch and shape[known] % batch == 0 else None
    if graph.batch_hint is not None:
        exact = [dim for dim, size in enumerate(shape) if size == batch and dim != other]
        if exact:
            return exact[0]
    return 0 if other != 0 and shape and shape[0] >= batch and shape[0] % batch == 0 else None
