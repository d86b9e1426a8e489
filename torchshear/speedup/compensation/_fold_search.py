"""Search for layers whose bias can take the constants, or the means, of the cut channels that they read.

The graph is run with constants on its cut channels. Calls in whose kept results that makes a difference read them.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.dependency.rules._call import bind_arguments
from torchshear.graph._location import locate
from torchshear.graph._operator_record import operator_of
from torchshear.speedup._relative_error import relative_error
from torchshear.speedup.compensation._constant_network import Barrier, ConstantNetwork, ReadValue
from torchshear.speedup.compensation._fold_record import FoldedConstants, SkippedConstants
from torchshear.speedup.rewriting._slicing import Bools, is_touched, map_axes, select_kept, writes_to_operand

Means = Mapping[tuple[str, int], Tensor]


# Relative differences that equal values may have, by dtype.
_SAME = {torch.float64: 1e-11, torch.float32: 1e-5}
_SAME_IN_NARROWER = 1e-2
_UNEVEN = "what they add is not the same at every position, as where padding with zeros cuts it off"


@dataclass(slots=True)
class FoldDecisions:
    """Results of a search.

    Attributes:
        folded: layers with their constants.
        skipped: readers that see zeros.
        changes: canonical name of a tensor -> number of each channel that is added to it.
        barriers: name of a call -> cut channels that it sees as zeros.
        default_barrier: the same for all other calls; None for none.
    """

    folded: list[FoldedConstants] = field(default_factory=list)
    skipped: list[SkippedConstants] = field(default_factory=list)
    changes: dict[str, Tensor] = field(default_factory=dict)
    barriers: dict[str, Barrier] = field(default_factory=dict)
    default_barrier: Barrier | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _LayerInput:
    """Operand of a layer with cut channels.

    Attributes:
        operand: the operand.
        dim: its dimension of channels.
        is_cut: mask of the cut channels.
        out_dim: dimension of channels of the layer's value.
    """

    operand: fx.Node
    dim: int
    is_cut: Bools
    out_dim: int


class FoldSearch(ABC):
    """A search over the calls of a network.

    Args:
        network: the network with constants on its cut channels.

    Attributes:
        decisions: what has been found so far.
    """

    def __init__(self, network: ConstantNetwork) -> None:
        self.network = network
        self.decisions = FoldDecisions()
        dtypes = {t.dtype for t in network.state.values() if t.is_floating_point()}
        self.tolerance = max((_SAME.get(dtype, _SAME_IN_NARROWER) for dtype in dtypes), default=1e-11)
        self._noise = torch.Generator().manual_seed(0)
        self._n_reads: Counter[str] = Counter()  # of each parameter and buffer
        for user in network.graph:
            fx.map_arg((user.args, user.kwargs), self._count_read)

    def _count_read(self, operand: fx.Node) -> fx.Node:
        self._n_reads[str(operand.target)] += operand.op == "get_attr"
        return operand

    def run(self, inputs: list[list[Any]]) -> FoldDecisions:
        """Run the network on several inputs side by side, and decide for each call.

        Args:
            inputs: flat inputs of each run, at least two.
        """
        self.network.run(inputs, self._compute)
        return self.decisions

    def _compute(self, node: fx.Node, reads: Sequence[ReadValue]) -> list[Any]:
        """Compute a call in all runs, behind a barrier if it reads cut channels that cannot be folded."""
        network = self.network
        if not is_touched(node, network.facts, network.cut):
            values = [network.call(node, read) for read in reads]
        else:
            before = [read_before_write(node, read) for read in reads] if writes_to_operand(node) else reads
            masked = self.call_behind(node, before, Barrier("all"))
            through = [network.call(node, read) for read in reads]
            values = self.choose(node, before, through, masked)
            if values is not through and writes_to_operand(node):  # views of the same memory must hold the new values
                values = [one.copy_(value) for one, value in zip(through, values, strict=True)]
        if str(node.target) == "aten.embedding.default":  # noise, since random tokens could be out of range
            for run, value in enumerate(values[1:], 1):
                noise = torch.randn(value.shape, generator=self._noise, dtype=torch.float64).to(value)
                values[run] = value + network.zero_cut(node, noise * value.std().clamp_min(1e-3))
        return values

    @abstractmethod
    def choose(self, node: fx.Node, reads: Sequence[ReadValue], through: list[Any], masked: list[Any]) -> list[Any]:
        """Decide about a call, and return its values in all runs.

        Args:
            node: the call.
            reads: its operands in each run, before it writes to them.
            through: its values with constants on cut channels.
            masked: its values with zeros there.
        """

    def call_behind(self, node: fx.Node, reads: Sequence[ReadValue], barrier: Barrier) -> list[Any]:
        """Compute a call in all runs behind a barrier."""
        return [self.network.call(node, self.network.read_through(barrier, read)) for read in reads]

    def are_same(self, node: fx.Node, left: list[Any], right: list[Any]) -> bool:
        """Check that values of a node agree at kept positions."""
        axes, cut = self.network.facts.axes.get(node.name), self.network.cut

        def kept(values: list[Any]) -> list[Any]:
            sliced = [map_axes(lambda tensor, own: select_kept(tensor, own, cut), one, axes) for one in values]
            return pytree.tree_leaves(sliced)

        return relative_error(kept(left), kept(right)) <= self.tolerance

    def skip(self, node: fx.Node, n_channels: int, reason: str) -> None:
        """Note that a call sees some channels as zeros, and why."""
        self.decisions.skipped.append(SkippedConstants(_layer_of(node), n_channels, reason))

    def layer_input(self, node: fx.Node) -> _LayerInput | str:
        """Return what a layer reads, or the reason why the call cannot take constants."""
        product = operator_of(node).product
        if product is None or not product.bias:
            return f"{locate(node).operator} has no bias"
        arguments = bind_arguments(node)
        operand, weight = arguments[product.left], arguments[product.right]
        if weight in self.network.from_inputs:
            return "the weight is computed from the input"
        if arguments.get("beta", 1) != 1:
            return "its bias is multiplied by a number"
        masks = self.network.cut_masks(operand)
        if len(masks) != 1:
            return "its input shrinks in several dimensions, or not in one of its own"
        ((dim, is_cut),) = masks.items()
        return _LayerInput(operand, dim, is_cut, node.meta["val"].ndim + product.channels)

    def fold(self, node: fx.Node, out_dim: int, n_channels: int, some: list[Tensor], none: list[Tensor]) -> bool:
        """Fold what channels add to a layer, if it is the same in all places and runs and has a place to go.

        Args:
            node: the layer.
            out_dim: dimension of channels of its value.
            n_channels: number of channels that are folded.
            some: values of the layer with the constants, in each run.
            none: values without them.

        Returns:
            Whether it was folded; if not, it is noted as skipped.
        """
        added = torch.cat([(a - b).movedim(out_dim, 0).flatten(1) for a, b in zip(some, none, strict=True)], 1)
        is_cut = self.network.cut_masks(node).get(out_dim)
        if is_cut is not None:
            added = added.masked_fill(torch.from_numpy(is_cut).to(added.device)[:, None], 0)
        scale = max(float(value.abs().max()) for value in (*some, *none))
        if not bool((added.amax(1) - added.amin(1)).max() <= self.tolerance * scale):  # NaN is not the same
            self.skip(node, n_channels, _UNEVEN)
            return False
        product = operator_of(node).product
        assert product is not None
        bias, sign = bind_arguments(node)[product.bias], 1
        what, problem = "bias", ""
        if not isinstance(bias, fx.Node):  # a batch norm right behind it takes the constants by its mean
            users = list(node.users)
            norm = operator_of(users[0]).norm if len(users) == 1 else None
            given = bind_arguments(users[0]) if norm is not None else {}
            if norm is None or norm.over != "batch" or given.get(norm.own) or given.get(norm.input) is not node:
                problem = "no bias to fold into, and no batch norm right behind it"
            else:
                bias, what, sign = given.get(norm.mean), "running mean", -1
        problem = problem or self._find_obstacle(bias, what)
        if problem:
            self.skip(node, n_channels, problem)
            return False
        self.decisions.changes[str(bias.target)] = sign * added.mean(1)
        self.decisions.folded.append(FoldedConstants(_layer_of(node), str(bias.target), n_channels))
        return True

    def _find_obstacle(self, node: Any, what: str) -> str:
        """Say why a tensor cannot take constants; "" if it can."""
        if not isinstance(node, fx.Node):
            return "no bias to fold into"
        if node.op != "get_attr":
            return f"its {what} is computed"
        if node.meta["val"].ndim != 1:
            return f"its {what} is not one value a channel"
        name = str(node.target)
        return "" if self._n_reads[name] == 1 else f"its {what} {name!r} is read elsewhere, too"


class ConstantSearch(FoldSearch):
    """Folds the constants that cut channels hold without any input."""

    def choose(self, node: fx.Node, reads: Sequence[ReadValue], through: list[Any], masked: list[Any]) -> list[Any]:
        """Let a call see the constants where that changes nothing or they fold; else put it behind a barrier."""
        if self.are_same(node, through, masked):
            return through
        layer = self.layer_input(node)
        if isinstance(layer, str):
            self.skip(node, self._n_not_zero(node, reads), layer)
        else:
            values = self._fold_constants(node, layer, reads, through)
            if values is not None:
                return values
        # Hide the cut channels: in what comes from the inputs if that is enough, else in parameters too.
        barrier = Barrier("inputs")
        values = self.call_behind(node, reads, barrier)
        if not self.are_same(node, values, masked):
            barrier, values = Barrier("all"), masked
        self.decisions.barriers[node.name] = barrier
        return values

    def _fold_constants(
        self, node: fx.Node, layer: _LayerInput, reads: Sequence[ReadValue], through: list[Any]
    ) -> list[Any] | None:
        """Fold those cut channels of a layer that are constant; return its values then, or None if none is folded."""
        lines = torch.cat([read(layer.operand).movedim(layer.dim, 0).flatten(1) for read in reads], 1)
        low, high = lines.amin(1), lines.amax(1)
        size = torch.maximum(low.abs(), high.abs())
        is_constant = layer.is_cut & (high - low <= self.tolerance * size).cpu().numpy()
        is_not_zero = layer.is_cut & (size > 0).cpu().numpy()
        hidden = layer.is_cut & ~is_constant
        n_hidden, n_constant = int((hidden & is_not_zero).sum()), int((is_constant & is_not_zero).sum())
        if n_hidden:
            self.skip(node, n_hidden, "they are not constant: they depend on the input or on the position")
        if not n_constant:
            return None
        barrier = Barrier("channels", layer.operand.name, layer.dim, hidden)
        some = self.call_behind(node, reads, barrier) if hidden.any() else through
        none = self.call_behind(node, reads, Barrier("channels", layer.operand.name, layer.dim, layer.is_cut))
        if not self.fold(node, layer.out_dim, n_constant, some, none):
            return None
        if hidden.any():
            self.decisions.barriers[node.name] = barrier
        return some

    def _n_not_zero(self, node: fx.Node, reads: Sequence[ReadValue]) -> int:
        """Count the cut channels that are not zero in an operand that depends on the inputs."""
        counts = [0]
        for operand in node.all_input_nodes:
            for dim, is_cut in self.network.cut_masks(operand).items() if operand in self.network.from_inputs else ():
                rows = [read(operand).movedim(dim, 0).flatten(1).ne(0).any(1).cpu().numpy() for read in reads]
                counts.append(int((np.logical_or.reduce(rows) & is_cut).sum()) if len(rows[0]) == len(is_cut) else 0)
        return max(counts)


class MeanSearch(FoldSearch):
    """Folds means of cut channels over data, in a network with zeros on its cut channels.

    Args:
        network: the network.
        means: (name of the node that a layer reads, dimension of its channels) -> mean of each channel.
    """

    def __init__(self, network: ConstantNetwork, means: Means) -> None:
        super().__init__(network)
        self.means = means
        self.decisions.default_barrier = Barrier("all")

    def choose(self, node: fx.Node, reads: Sequence[ReadValue], through: list[Any], masked: list[Any]) -> list[Any]:
        """Let a layer see means where they fold, else zeros."""
        layer = self.layer_input(node)
        if isinstance(layer, str):
            return masked
        means = self.means.get((layer.operand.name, layer.dim))
        is_cut = torch.from_numpy(layer.is_cut)
        if means is None or len(means) != len(is_cut):
            self.skip(node, int(is_cut.sum()), "what it reads was not seen on the data")
            return masked
        means = torch.where(is_cut, means, torch.zeros_like(means))
        barrier = Barrier("inputs", layer.operand.name, layer.dim, means=means)
        some = self.call_behind(node, reads, barrier)
        if self.are_same(node, some, masked):
            return masked
        if not self.fold(node, layer.out_dim, int(np.count_nonzero(means)), some, masked):
            return masked
        self.decisions.barriers[node.name] = barrier
        return some


def _layer_of(node: fx.Node) -> str:
    """Return the name of the module that makes a call, or of the operator where that is the model itself."""
    return locate(node).module or locate(node).operator


def read_before_write(node: fx.Node, read: ReadValue) -> ReadValue:
    """Return a function that reads copies of the operands of a call, taken before it writes to them."""
    now = {n: read(n).clone() if isinstance(read(n), Tensor) else read(n) for n in node.all_input_nodes}
    return lambda n: now[n]
