"""Cost of a network by the widths of its groups alone, before units are chosen: what solvers of budgets ask."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from torchshear.dependency.algebra._axis import Axis
from torchshear.dependency.algebra._units import Ids
from torchshear.dependency.groups._groups import ChannelGroups
from torchshear.dependency.groups._width_form import NO_GROUP, WidthForm, groups_of_units, terms_of_axis
from torchshear.graph import Cost
from torchshear.graph._nodes import shape_of, tensor_operands
from torchshear.graph._operator_record import node_macs

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Size:
    """One size of a shape: an axis by its number, and what its positions are to be divided by."""

    number: int
    divisor: int = 1


_Sizes = tuple[_Size, ...] | tuple[tuple[_Size, ...], ...]  # the latter of several values, as `chunk` gives


class WidthCost:
    """Parameters, multiply-accumulate operations and bytes as a function of kept widths.

    The size of an axis is a sum of products of widths: positions that depend on units of the same groups go together,
    and of n such positions n * (product over these groups of kept units / units) are left. That is exact where all
    units of a group stand for equally many positions, as in every axis but those that join unequal multiples of the
    same units or hold some pairs of them only; `Cut.cost` has the exact figure of a choice of units. Sizes enter
    parameters, operations and bytes as products, so that each is multilinear in the widths.

    Args:
        groups: the analysed network.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        self._groups = groups
        self._widths = np.array([group.width for group in groups], np.float64)
        self._group_of = groups_of_units(groups)
        self._numbers: dict[int, int] = {}
        self._held: list[Axis] = []  # so that the identities of their arrays stay theirs
        self._terms: list[tuple[Ids, Ids]] = []
        self._state = {name: self._state_sizes(name) for name in groups.graph.state}
        self._tensors = [
            (self._state[name], entry.kind == "parameter", entry.tensor.element_size())
            for name, entry in groups.graph.state.items()
        ]
        self._calls = [self._call(node) for node in groups.graph if _has_macs(node)]
        depth = max((of.shape[1] for of, _ in self._terms), default=0)
        padded = [np.pad(of, ((0, 0), (0, depth - of.shape[1])), constant_values=NO_GROUP) for of, _ in self._terms]
        self._of = np.concatenate([*padded, np.zeros((0, depth), np.int64)])
        self._counts = np.concatenate([*(counts for _, counts in self._terms), np.zeros(0, np.int64)])
        self._axis_of = np.repeat(np.arange(len(self._terms)), [len(counts) for _, counts in self._terms])

    def __call__(self, widths: Ids) -> Cost:
        """Cost at kept widths.

        Args:
            widths: kept units of each group, in the order of the groups, shape (n_groups,).
        """
        shares = np.append(np.asarray(widths, np.float64) / self._widths, 1.0)
        terms = self._counts * shares[self._of].prod(1)
        n_params, macs, size_bytes = self._sums(np.bincount(self._axis_of, terms, len(self._terms)).tolist())
        return Cost(round(n_params), round(macs) // (self._groups.graph.batch_hint or 1), round(size_bytes))

    def forms(self) -> dict[str, WidthForm]:
        """Return each attribute of a cost as a polynomial in the shares of units that groups keep."""
        n_params, macs, size_bytes = self._sums([WidthForm.of_terms(of, counts) for of, counts in self._terms])
        none, batch = WidthForm({}), self._groups.graph.batch_hint or 1
        return {"n_params": none + n_params, "macs": (none + macs) / batch, "size_bytes": none + size_bytes}

    def _sums(self, sizes: list[Any]) -> tuple[Any, Any, Any]:
        """Return parameters, operations of the whole batch, and bytes, from the size of every axis."""
        n_elements = [prod(_values(one, sizes)) for one, _, _ in self._tensors]
        n_params = sum(n for n, (_, is_parameter, _) in zip(n_elements, self._tensors, strict=True) if is_parameter)
        size_bytes = sum(n * n_bytes for n, (_, _, n_bytes) in zip(n_elements, self._tensors, strict=True))
        macs = sum(
            node_macs(target, [_values(one, sizes) for one in given], _values(made, sizes))
            for target, given, made in self._calls
        )
        return n_params, macs, size_bytes

    def _call(self, node: fx.Node) -> tuple[str, list[_Sizes], _Sizes]:
        return str(node.target), [self._value(n) for n in tensor_operands(node)], self._value(node)

    def _value(self, node: fx.Node) -> _Sizes:
        if node.op == "get_attr":
            return self._state[str(node.target)]
        axes = self._groups.facts.axes.get(node.name)
        if axes is None:
            shape = shape_of(node)
            is_one = all(isinstance(size, int) for size in shape)
            return self._constants(shape) if is_one else tuple(self._constants(part) for part in shape)
        if isinstance(axes, list):
            return tuple(tuple(_Size(self._number(axis)) for axis in part) for part in axes)
        return tuple(_Size(self._number(axis)) for axis in axes)

    def _state_sizes(self, name: str) -> tuple[_Size, ...]:
        facts = self._groups.facts
        if name not in facts.state_axes:
            return self._constants(self._groups.graph.state[name].shape)
        sizes = [_Size(self._number(axis)) for axis in facts.state_axes[name]]
        if name in facts.blocked:
            dim, axis, n_blocks = facts.blocked[name]
            sizes[dim] = _Size(self._number(axis), n_blocks)
        return tuple(sizes)

    def _constants(self, shape: tuple[int, ...]) -> tuple[_Size, ...]:
        """Sizes that no cut changes."""
        first = len(self._terms)
        self._terms += [(np.zeros((1, 0), np.int64), np.array([size])) for size in shape]
        return tuple(_Size(number) for number in range(first, len(self._terms)))

    def _number(self, axis: Axis) -> int:
        known = self._numbers.get(id(axis.units))
        if known is None:
            known = self._numbers[id(axis.units)] = len(self._terms)
            self._held.append(axis)
            self._terms.append(terms_of_axis(self._groups, self._group_of, axis))
        return known


def _has_macs(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if not isinstance(node.meta.get("val"), Tensor | tuple | list):
        return False
    operands = tensor_operands(node)
    return bool(operands) and node_macs(str(node.target), [shape_of(n) for n in operands], shape_of(node)) > 0


def _values(shape: Any, sizes: list[Any]) -> Any:
    """Numbers or polynomials in the structure of sizes."""
    if isinstance(shape, _Size):
        return sizes[shape.number] / shape.divisor
    return tuple(_values(one, sizes) for one in shape)
