"""Channel groups: units that play the same part in the same parameters, to be chosen among one another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np

from torchshear._arguments import check_kind, check_one_of
from torchshear.dependency.algebra._axis import Algebra
from torchshear.dependency.algebra._units import Ids
from torchshear.dependency.groups._network import Value, describe_network, draw_network
from torchshear.dependency.rules._findings import Facts
from torchshear.errors import ArgumentError
from torchshear.graph import Graph
from torchshear.graph.model._state import Mode


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A dimension of a parameter or buffer in which units of a group lie.

    Attributes:
        name: canonical qualified name of the parameter or buffer.
        dim: the dimension.
        purposes: what the dimension is for: "out", "in", "depthwise", "norm", "bias", "embedding", "statistic",
            "factor" for what a weight is computed of beside the tensor that it stands for (a mask, the scales of a
            weight norm), or "raw" for a parameter that is not the weight of a layer.
        positions: positions along the dimension; of blocked weights (see `n_blocks`) along all blocks together.
        units: for each of `positions`, the unit in 0..width-1 that it depends on.
        size: number of positions that the dimension (all blocks together) has.
        n_blocks: 0, or the number of blocks of dimension 0 whose rows each hold another block of these positions, as
            the input channels of a grouped convolution do.
        norm_scale: for the outputs of a layer, canonical name of the scale of the only batch norm that reads its
            result, of the same size and in the same order; "" if there is none.
        layer: canonical name of the first of the weights that make the units together, as those for inputs and for
            states of a recurrent layer do; "" of a weight that makes units alone, or none.
    """

    name: str
    dim: int
    purposes: frozenset[str]
    positions: Ids
    units: Ids
    size: int
    n_blocks: int = 0
    norm_scale: str = ""
    layer: str = ""

    @property
    def multiplicity(self) -> int:
        """Positions that go with one unit, at least."""
        counts = np.bincount(self.units)
        return int(counts[counts > 0].min())


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Units of which any set may be cut, within the constraints, and which are ranked against one another.

    Attributes:
        name: first member, as "layer1.0.conv1.weight[0]"; unique and the same in every analysis of the network.
        width: number of units.
        members: all dimensions that shrink when units are cut.
        balance: block label of each unit, shape (width,), if equally many must be cut in each block, else None.
        is_cross_channel: an operator's result at one unit depends on the other units (a norm, a softmax, a mean), so
            that cutting units is another computation than zeroing them.
        atoms: the units' identities in the algebra, shape (width,).
        where: the first operators that use the group, with module and source line.
        n_peers: number of dimensions that the units are shared out among and that must stay equally wide, as the layers
            of one recurrent call; 1 elsewhere, where every dimension holds all units.
        min_units: units that must stay in each of those dimensions.
        role: what the units are for, one of `torchshear.dependency.ROLES`.
        convolution_groups: the largest number of groups of a convolution of maps, with weights of four dimensions, that
            reads or makes the units; 1 for plain and depthwise ones, 0 where there is none.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    balance: Ids | None
    is_cross_channel: bool
    atoms: Ids
    where: tuple[str, ...]
    n_peers: int = 1
    min_units: int = 1
    role: str = "other"
    convolution_groups: int = 0

    def __repr__(self) -> str:
        return f"<ChannelGroup {self.name}: {self.width} units, {self.role}, {len(self.members)} members>"

    @property
    def is_prunable(self) -> bool:
        """True if a unit can go and one is left, equally many in each block."""
        return self.max_cut > 0

    @property
    def max_cut(self) -> int:
        """The largest number of units that can be cut: all but one, and equally many of balanced blocks."""
        if self.balance is None:
            return max(0, self.width - self.min_units)
        sizes = np.bincount(self.balance)
        smallest = int(sizes.min())
        per_block = smallest if (sizes > smallest).any() else smallest - 1
        most = max(0, self.width - self.min_units * self.n_peers)
        return min(per_block, most // len(sizes)) * len(sizes)

    @property
    def n_blocks(self) -> int:
        """Number of blocks that lose equally many; 1 where there is no balance."""
        return 1 if self.balance is None else int(self.balance.max()) + 1

    @property
    def multiplicity(self) -> int:
        """Positions that one unit stands for in the narrowest dimension."""
        return min(member.multiplicity for member in self.members)

    @property
    def reason(self) -> str | None:
        """The reason why nothing can be cut, or None if something can."""
        if self.is_prunable:
            return None
        if self.width <= self.min_units * self.n_peers:
            if self.width > 1:
                return f"at least {self.min_units} units of it must stay"
            if all(member.size == len(member.positions) for member in self.members):
                size = max(member.size for member in self.members)
                return (
                    f"all {size} are tied to one another, so that none goes alone" if size > 1 else "there is only one"
                )
            return "the only one of its layer that splits or shuffles send this way; the last of a part stays"
        return f"{self.n_blocks} balanced blocks of one unit each"


@dataclass(frozen=True, slots=True)
class FixedDimension:
    """A dimension of a parameter that cannot shrink.

    Attributes:
        name: qualified name of the parameter.
        dim: the dimension.
        size: its size.
        reason: what forbids it, with operator, module and source line.
    """

    name: str
    dim: int
    size: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroups(Sequence[ChannelGroup]):
    """All channel groups of a network, with the relations that they come from.

    Attributes:
        graph: the captured network.
        groups: the groups, in order of their first parameter.
        fixed: dimensions of parameters that cannot shrink, with reasons; kernel sizes and sizes of 1 left out.
        algebra: units and their relations.
        facts: axes of every value and what rules noted.
        training_facts: the same for the graph captured in train mode, where `graph.training` is one.
        prunable_outputs: names or patterns of the outputs that may shrink.
    """

    graph: Graph
    groups: tuple[ChannelGroup, ...]
    fixed: tuple[FixedDimension, ...]
    algebra: Algebra
    facts: Facts
    training_facts: Facts | None = None
    prunable_outputs: tuple[str, ...] = ()

    def __repr__(self) -> str:
        name = self.graph.model_type.rpartition(".")[2]
        n_prunable = sum(group.is_prunable for group in self.groups)
        return f"<ChannelGroups of {name}: {len(self.groups)} groups, {n_prunable} of them prunable>"

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __getitem__(self, key: Any) -> Any:
        """A group by number or name, or a slice of groups.

        Raises:
            ArgumentError: no group has that name.
        """
        if isinstance(key, str):
            for group in self.groups:
                if group.name == key:
                    return group
            raise ArgumentError(
                f"no channel group {key!r}; known are {', '.join(g.name for g in self.groups[:8])}, ..."
            )
        return self.groups[key]

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups of which something can be cut."""
        return tuple(group for group in self.groups if group.is_prunable)

    def describe(self, mode: Mode = "eval") -> tuple[Value, ...]:
        """Describe every node of the network in order of execution: groups and reasons along each dimension.

        Args:
            mode: "eval", or "train" for the graph captured in train mode where there is one of its own.

        Raises:
            ArgumentError: it is neither.
        """
        check_one_of("mode", mode, ("eval", "train"))
        group_of = np.full(len(self.algebra.store), -1, np.int64)
        for number, group in enumerate(self.groups):
            group_of[group.atoms] = number
        if mode == "train" and self.graph.training is not None and self.training_facts is not None:
            return describe_network(self.graph.training, self.algebra, self.training_facts, group_of)
        return describe_network(self.graph, self.algebra, self.facts, group_of)

    def to_networkx(self, mode: Mode = "eval") -> "nx.MultiDiGraph[str]":
        """Return the network as a graph of operators and parameters; edges carry the groups that run along them.

        All attributes are strings, numbers and truth values, so that `networkx.write_graphml`, `write_gexf` and
        `node_link_data` take the graph as it is; what is a list is JSON text, for `json.loads`.

        Args:
            mode: "eval", or "train" for the graph captured in train mode where there is one of its own.

        Returns:
            A graph with one node a value, named as in the captured graph. Node attributes:

            - `kind`: "input", "parameter", "buffer", "constant", "operator" or "output".
            - `label`: a short name to draw. `parameter`: qualified name of a parameter, buffer or constant, else "".
            - `operator`: as in "aten.conv2d.default", else "". `module`, `source`: who made the call, and where.
            - `shape`: JSON, the sizes; "batch" for a size that follows the batch.
            - `groups`: JSON, names of all channel groups that run along any dimension. `group`: the first, or "".
            - `axes`: JSON, for each dimension the names of the groups along it.
            - `fixed`: JSON, for each dimension why positions of it cannot be cut, or "".
            - `mixed`: whether the operator computes a statistic over channels.

            Of a value of several tensors, as `chunk` gives, `shape`, `axes` and `fixed` hold a list for each.
            Edge attributes: `operand` (its number among the operands), and `groups` and `axes` of the value that runs
            along the edge. Parallel edges exist: `a * a` has two.
        """
        return draw_network(self.describe(mode), tuple(group.name for group in self.groups))


def check_groups(groups: object) -> None:
    """Raise ArgumentError for what is no analysed network."""
    check_kind("groups", groups, ChannelGroups, "channel groups: torchshear.analyze(torchshear.trace(...))")
