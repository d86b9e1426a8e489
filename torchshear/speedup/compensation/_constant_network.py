"""The original network with constants on its cut channels: what multiplies is zero on them, what adds stays.

The cut rows of weights that make channels are zero, norms give their shift there, and biases stay. A cut channel then
holds a constant, such as act(shift) behind a norm and an activation, until a call brings it together with data. A call
that would carry something from cut channels to kept ones either sees the constants, or zeros behind a `Barrier`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

from torchshear.dependency import Axes
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules._call import bind_arguments
from torchshear.graph import Graph
from torchshear.graph._nodes import is_only_read
from torchshear.graph._operator_record import operator_of
from torchshear.graph.masked._call import MaskedCall, masked_form
from torchshear.speedup.rewriting._slicing import Bools, keep_mask, map_axes, zero_cut

ReadValue = Callable[[fx.Node], Any]  # operand -> its value
ComputeCall = Callable[[fx.Node, Sequence[ReadValue]], list[Any]]  # call, operands in each run -> its value in each run

# Roles of the dimensions along which a weight makes channels.
_MAKING = frozenset({"out", "depthwise", "embedding"})


@dataclass(frozen=True, slots=True, eq=False)
class Barrier:
    """Cut channels that a call sees as zeros.

    Attributes:
        kind: "channels", those in `hidden` along dimension `dim` of one operand; "inputs", all in values that depend on
            the inputs of the model; "all", all in parameters as well.
        operand: name of a node.
        dim: a dimension of its value.
        hidden: mask of hidden channels of that dimension.
        means: numbers that the call sees in place of those zeros along `dim` of the operand, at each position; None for
            zeros.
    """

    kind: Literal["channels", "inputs", "all"]
    operand: str = ""
    dim: int = 0
    hidden: Bools | None = None
    means: Tensor | None = None


class ConstantNetwork:
    """The original graph with constants on its cut channels.

    Args:
        graph: the captured graph, in eval mode.
        cut: the units that are removed.
        state: canonical name -> original tensor, in the dtype to compute in.

    Attributes:
        from_inputs: nodes whose values depend on the inputs of the model.
    """

    def __init__(self, graph: Graph, cut: Cut, state: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.cut = cut
        self.state = state
        self.facts = cut.groups.facts
        self._loaded: dict[str, Tensor] = {}
        self.from_inputs: set[fx.Node] = set()
        for node in graph:
            if node.op == "placeholder" or not self.from_inputs.isdisjoint(node.all_input_nodes):
                self.from_inputs.add(node)

    def run(self, inputs: Sequence[list[Any]], compute: ComputeCall) -> list[Any]:
        """Run the graph on several inputs side by side, and return its output for each.

        Args:
            inputs: flat inputs of each run.
            compute: computes a call in all runs, from its operands in each.
        """
        nodes = list(self.graph)
        last_use = {operand: node for node in nodes for operand in node.all_input_nodes}
        values: dict[fx.Node, list[Any]] = {}
        leaves: list[Iterator[Any]] = [iter(flat) for flat in inputs]
        reads: list[ReadValue] = [lambda n, run=run: values[n][run] for run in range(len(inputs))]  # type: ignore[misc]
        for node in nodes:
            if node.op == "placeholder":
                values[node] = [next(flat) for flat in leaves]
            elif node.op == "get_attr":
                values[node] = [self._load(node) for _ in inputs]
            elif node.op == "output":
                return [fx.map_arg(node.args[0], read) for read in reads]
            else:
                values[node] = compute(node, reads)
            for operand in node.all_input_nodes:
                if last_use[operand] is node:
                    values.pop(operand, None)
        raise AssertionError("a graph ends with its output")

    def call(self, node: fx.Node, read: ReadValue) -> Any:
        """Compute a call, across cut channels by its masked form; a norm gives its shift on cut channels."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), read)
        form = masked_form(node)
        if form is not None and any(self.cut.changes(axis) for axis in self.facts.cross_channel.get(node.name, ())):

            def kept_masks(operand: fx.Node) -> dict[int, Tensor]:
                axes, value = self.facts.axes.get(operand.name), read(operand)
                own: Axes = axes if isinstance(axes, tuple) and isinstance(value, Tensor) else ()
                sizes = [(dim, axis, value.shape[dim]) for dim, axis in enumerate(own) if self.cut.changes(axis)]
                masks = {dim: keep_mask(axis, size, self.cut).copy() for dim, axis, size in sizes}
                return {dim: torch.from_numpy(mask).to(value.device) for dim, mask in masks.items()}

            value = self.zero_cut(node, form(MaskedCall(node, args, kwargs, kept_masks)))
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._with_shift(node, value, read)

    def _with_shift(self, node: fx.Node, value: Any, read: ReadValue) -> Any:
        """Return a norm's value with its shift on cut channels, as if its scale were zero there."""
        norm, masks = operator_of(node).norm, self.cut_masks(node)
        if norm is None or norm.channels % value.ndim not in masks:
            return value
        dim = norm.channels % value.ndim
        index = torch.from_numpy(np.flatnonzero(masks[dim])).to(value.device)
        bias = bind_arguments(node).get(norm.shift)
        shift = torch.zeros(value.shape[dim]).to(value) if bias is None else read(bias)
        line, shape = [1] * value.ndim, list(value.shape)
        line[dim] = shape[dim] = len(index)
        return value.index_copy(dim, index, shift[index].to(value).reshape(line).expand(shape))

    def read_through(self, barrier: Barrier | None, read: ReadValue) -> ReadValue:
        """Return a function that reads operands through a barrier."""
        if barrier is None:
            return read

        def read_behind(node: fx.Node) -> Any:
            value = read(node)
            if barrier.kind == "channels":
                if node.name != barrier.operand or barrier.hidden is None:
                    return value
                hidden = torch.from_numpy(np.flatnonzero(barrier.hidden)).to(value.device)
                return value.index_fill(barrier.dim, hidden, 0)
            if barrier.kind == "all" or node in self.from_inputs:
                value = self.zero_cut(node, value)
            if node.name != barrier.operand or barrier.means is None:
                return value
            line = [1] * value.ndim
            line[barrier.dim] = -1
            return value + barrier.means.to(value).reshape(line)

        return read_behind

    def zero_cut(self, node: fx.Node, value: Any) -> Any:
        """Return a copy of a node's value with zeros on all cut positions."""
        axes = self.facts.axes.get(node.name)
        return map_axes(lambda tensor, own: zero_cut(tensor.clone(), own, self.cut), value, axes)

    def cut_masks(self, node: fx.Node) -> dict[int, Bools]:
        """Return masks of the cut positions of a node's value, for each dimension that loses some."""
        axes = self.facts.axes.get(node.name)
        own: Axes = axes if isinstance(axes, tuple) else ()
        return {dim: ~self.cut.keep(axis) for dim, axis in enumerate(own) if self.cut.changes(axis)}

    def _load(self, node: fx.Node) -> Tensor:
        """Return a parameter or buffer; a copy where a call may write to it.

        Along dimensions that make channels its cut positions are zero. A tensor that is no layer's weight makes
        channels along all of them.
        """
        name = str(node.target)
        if name not in self._loaded:
            tensor = self.state[name].clone()
            blocked = self.facts.blocked.get(name)
            for dim, axis in enumerate(self.facts.state_axes.get(name) or ()):
                purposes = self.facts.purposes.get((name, dim), set())
                is_blocked = blocked is not None and blocked[0] == dim
                makes_channels = bool(purposes & _MAKING) or (tensor.ndim > 1 and not purposes)
                if makes_channels and not is_blocked and self.cut.changes(axis):
                    index = torch.from_numpy(np.flatnonzero(~self.cut.keep(axis)))
                    tensor.index_fill_(dim, index.to(tensor.device), 0)
            self._loaded[name] = tensor
        tensor = self._loaded[name]
        return tensor if is_only_read(node) and tensor.ndim > 1 else tensor.clone()
