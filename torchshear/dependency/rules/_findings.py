"""All that rules find out about a graph besides the relations between units: axes, roles, constraints, edits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import fx

from torchshear.dependency.algebra._axis import Axes, Axis
from torchshear.dependency.rules._role_evidence import Contraction
from torchshear.graph._location import locate

Result = Axes | list[Axes] | None
Keep = Callable[[Axis], npt.NDArray[np.bool_]]
NewValue = Callable[[Keep], Any]


class FixReason(NamedTuple):
    """The reason why an axis is fixed: what a call does with it. It becomes a text only when somebody reads it."""

    why: str
    node: fx.Node

    def __str__(self) -> str:
        """Describe the reason in a phrase, with operator, module and source line."""
        return f"{self.why}: {locate(self.node)}"


UNCHANGED: Final = object()  # value of an edit that leaves its argument as it is


@dataclass(frozen=True, slots=True)
class SizeFactor:
    """A new size for an argument that is computed in the graph: the old value times new / old."""

    old: int
    new: int


@dataclass(frozen=True, slots=True)
class Edit:
    """The change of one argument of a call when units are cut.

    Attributes:
        name: schema name of the argument, or "call" for operator and arguments together.
        index: element of the argument when it is a list, else None.
        value: gives the new value, from a function that tells which positions of an axis are kept.
    """

    name: str
    index: int | None
    value: NewValue


@dataclass(frozen=True, slots=True)
class Balance:
    """The demand that equal blocks of an axis lose equally many positions.

    Attributes:
        axis: the axis.
        n_blocks: number of its blocks.
        node: the call that demands it.
        is_joint: the blocks are dimensions of different tensors, whose units would otherwise be groups of their own.
    """

    axis: Axis
    n_blocks: int
    node: fx.Node
    is_joint: bool = False


@dataclass(frozen=True, slots=True)
class Minimum:
    """The demand that at least `count` positions of an axis stay, made by a call."""

    axis: Axis
    count: int
    node: fx.Node


@dataclass(slots=True)
class Facts:
    """All that rules find out about a graph. Keys are names of nodes, or canonical names of parameters and buffers.

    Attributes:
        axes: node -> axes of its value.
        state_axes: parameter, buffer or constant -> its axes.
        blocked: weight -> (dimension, axis, number of blocks) where block b of dimension 0 holds block b of the axis
            along that dimension, as in grouped convolutions.
        purposes: (weight, dimension) -> what the dimension is for, see `Member.purposes`.
        edits: node -> changes of its arguments.
        cross_channel: node -> axes whose positions depend on one another in its result (a norm, a softmax, a mean).
        balances: demands that blocks lose equally many positions.
        minimums: demands that so many positions stay.
        positions: buffer -> the axis of which it holds positions.
        values: buffer or constant whose values were read -> their digest.
        layers: weight -> the first weight of its layer, if that has several.
        nonempty: axes of which something must stay.
        index_axes: node, or "node:result" -> the axis of which its values are positions, chosen by data.
        carriers: computed weight -> the tensor that it stands for.
        contractions: node -> its sums of products; attention has two.
        declared_roles: role of groups -> axes that a rule says have it.
    """

    axes: dict[str, Result] = field(default_factory=dict)
    state_axes: dict[str, Axes] = field(default_factory=dict)
    blocked: dict[str, tuple[int, Axis, int]] = field(default_factory=dict)
    purposes: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    cross_channel: dict[str, list[Axis]] = field(default_factory=dict)
    balances: list[Balance] = field(default_factory=list)
    minimums: list[Minimum] = field(default_factory=list)
    positions: dict[str, Axis] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    nonempty: list[Axis] = field(default_factory=list)
    index_axes: dict[str, Axis] = field(default_factory=dict)
    carriers: dict[str, fx.Node] = field(default_factory=dict)
    contractions: dict[str, list[Contraction]] = field(default_factory=dict)
    declared_roles: dict[str, list[Axis]] = field(default_factory=dict)

    def for_other_graph(self) -> "Facts":
        """Return facts for another graph over the same parameters: these are shared, values of nodes are not."""
        shared = (
            "state_axes", "blocked", "purposes", "balances", "minimums", "positions", "values", "layers", "nonempty",
        )  # fmt: skip
        return Facts(**{name: getattr(self, name) for name in shared})

    def copy(self) -> "Facts":
        """Return a copy to which more can be added; axes are frozen and shared."""
        return Facts(**{one.name: _copy(getattr(self, one.name)) for one in fields(self)})


def _copy(table: Any) -> Any:
    """Copy a table and the lists or sets in it."""
    if isinstance(table, Mapping):
        return {key: value.copy() if isinstance(value, list | set) else value for key, value in table.items()}
    return table.copy()
