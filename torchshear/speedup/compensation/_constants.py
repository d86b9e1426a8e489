"""The network whose cut channels are constants: the original graph, in which only what multiplies is zero on them.

The cut rows of weights that make channels are zero, and norms give their shift there; biases stay. A cut channel then
holds a constant, as the shift of its norm behind an activation, for as long as no call brings it together with data.
A call that would carry something from cut channels to kept ones sees the constants, or is told not to.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from torchshear.dependency import Axes, Cut
from torchshear.dependency._call import bind_arguments
from torchshear.graph import Graph, MaskedCall, masked_form
from torchshear.graph._operator import operator_of
from torchshear.graph._run import is_only_read
from torchshear.speedup.rewriting._slicing import keep_mask, map_axes, zero_cut

Bools = npt.NDArray[np.bool_]
Look = Callable[[fx.Node], Any]
Decide = Callable[[fx.Node, Sequence[Look]], list[Any]]

# Roles of the dimensions along which a weight makes channels.
_MAKING = frozenset({"out", "depthwise", "embedding"})


@dataclass(frozen=True, slots=True, eq=False)
class Barrier:
    """Which cut channels a call sees as zeros.

    Attributes:
        kind: "some", those in `hidden` along dimension `dim` of the operand named; "inputs", all in what comes from the
            inputs of the model; "all", all in parameters as well.
        operand: name of a node.
        dim: a dimension of its value.
        hidden: a mask over that dimension.
        means: what the call sees in place of those zeros along `dim` of the operand, at each position; None: nothing.
    """

    kind: Literal["some", "inputs", "all"]
    operand: str = ""
    dim: int = 0
    hidden: Bools | None = None
    means: Tensor | None = None


class ConstantNetwork:
    """The original graph with constants on its cut channels.

    Args:
        graph: the captured graph, in eval mode.
        cut: the units that are cut.
        state: canonical name -> original tensor, in the dtype to compute in.
    """

    def __init__(self, graph: Graph, cut: Cut, state: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.cut = cut
        self.state = state
        self._facts = cut.groups.facts
        self._made: dict[str, Tensor] = {}
        self.from_inputs: set[fx.Node] = set()
        for node in graph:
            if node.op == "placeholder" or not self.from_inputs.isdisjoint(node.all_input_nodes):
                self.from_inputs.add(node)

    def walk(self, inputs: Sequence[list[Any]], decide: Decide) -> list[Any]:
        """Run the graph on several inputs at once, and give its output for each.

        Args:
            inputs: flat inputs of each run.
            decide: gives the values of a call, one a run, from what its operands are in each.
        """
        nodes = list(self.graph)
        last_use = {operand: node for node in nodes for operand in node.all_input_nodes}
        values: dict[fx.Node, list[Any]] = {}
        given: list[Iterator[Any]] = [iter(leaves) for leaves in inputs]
        looks: list[Look] = [lambda n, run=run: values[n][run] for run in range(len(inputs))]  # type: ignore[misc]
        for node in nodes:
            if node.op == "placeholder":
                values[node] = [next(leaves) for leaves in given]
            elif node.op == "get_attr":
                values[node] = [self._loaded(node) for _ in inputs]
            elif node.op == "output":
                return [fx.map_arg(node.args[0], look) for look in looks]
            else:
                values[node] = decide(node, looks)
            for operand in node.all_input_nodes:
                if last_use[operand] is node:
                    values.pop(operand, None)
        raise AssertionError("a graph ends with its output")

    def call(self, node: fx.Node, look: Look) -> Any:
        """The value of a call: a norm's shift on cut channels; where positions are mixed, of kept ones alone."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), look)
        form = masked_form(node)
        if form is not None and any(self.cut.changes(axis) for axis in self._facts.mixed.get(node.name, ())):
            value = form(MaskedCall(node, args, kwargs, lambda operand: self._kept(operand, look(operand))))
            value = self.zeroed(node, value)
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._shifted(node, value, look)

    def behind(self, barrier: Barrier | None, look: Look) -> Look:
        """What a call sees of its operands through a barrier."""
        if barrier is None:
            return look

        def seen(node: fx.Node) -> Any:
            value = look(node)
            if barrier.kind == "some":
                return _hidden(value, barrier) if node.name == barrier.operand else value
            if barrier.kind == "all" or node in self.from_inputs:
                value = self.zeroed(node, value)
            return _with_means(value, barrier) if node.name == barrier.operand else value

        return seen

    def zeroed(self, node: fx.Node, value: Any) -> Any:
        """A copy of a node's value with zeros on all cut positions."""
        axes = self._facts.axes.get(node.name)
        return map_axes(lambda tensor, own: zero_cut(tensor.clone(), own, self.cut), value, axes)

    def gone(self, node: fx.Node) -> dict[int, Bools]:
        """Dimensions of a node's value that lose positions, with masks of those."""
        axes = self._facts.axes.get(node.name)
        own: Axes = axes if isinstance(axes, tuple) else ()
        return {dim: ~self.cut.keep(axis) for dim, axis in enumerate(own) if self.cut.changes(axis)}

    def _loaded(self, node: fx.Node) -> Tensor:
        """A parameter or buffer; a tensor of its own where a call may write to it."""
        name = str(node.target)
        if name not in self._made:
            self._made[name] = self._multipliers_zeroed(name)
        tensor = self._made[name]
        return tensor if is_only_read(node) and tensor.ndim > 1 else tensor.clone()

    def _multipliers_zeroed(self, name: str) -> Tensor:
        """Zero the cut positions along dimensions that make channels; of what is no layer's weight, all cut ones."""
        tensor, facts = self.state[name].clone(), self._facts
        axes, blocked = facts.state_axes.get(name), facts.blocked.get(name)
        if axes is None:
            return tensor
        roles = [facts.roles.get((name, dim), set()) for dim in range(len(axes))]
        for dim, axis in enumerate(axes):
            is_blocked = blocked is not None and blocked[0] == dim
            is_raw = tensor.ndim > 1 and not roles[dim]
            if (is_raw or roles[dim] & _MAKING) and not is_blocked and self.cut.changes(axis):
                tensor.index_fill_(dim, torch.from_numpy(np.flatnonzero(~self.cut.keep(axis))).to(tensor.device), 0)
        return tensor

    def _kept(self, node: fx.Node, value: Any) -> dict[int, Tensor]:
        """Masks of the kept positions of a value, for each dimension that loses some."""
        axes = self._facts.axes.get(node.name)
        own: Axes = axes if isinstance(axes, tuple) and isinstance(value, Tensor) else ()
        sizes = [(dim, axis, value.shape[dim]) for dim, axis in enumerate(own) if self.cut.changes(axis)]
        return {d: torch.from_numpy(keep_mask(axis, n, self.cut).copy()).to(value.device) for d, axis, n in sizes}

    def _shifted(self, node: fx.Node, value: Any, look: Look) -> Any:
        """A norm's value with its shift on cut channels, as if its scale were zero there."""
        norm, gone = operator_of(node).norm, self.gone(node)
        if norm is None or not gone:
            return value
        dim = norm.channels % value.ndim
        if dim not in gone:
            return value
        index = torch.from_numpy(np.flatnonzero(gone[dim])).to(value.device)
        bias = bind_arguments(node).get(norm.shift)
        shift = torch.zeros(value.shape[dim]).to(value) if bias is None else look(bias)
        line = [1] * value.ndim
        line[dim] = len(index)
        shape = list(value.shape)
        shape[dim] = len(index)
        return value.index_copy(dim, index, shift[index].to(value).reshape(line).expand(shape))


def _hidden(value: Tensor, barrier: Barrier) -> Tensor:
    assert barrier.hidden is not None
    return value.index_fill(barrier.dim, torch.from_numpy(np.flatnonzero(barrier.hidden)).to(value.device), 0)


def _with_means(value: Tensor, barrier: Barrier) -> Tensor:
    if barrier.means is None:
        return value
    line = [1] * value.ndim
    line[barrier.dim] = -1
    return value + barrier.means.to(value).reshape(line)
