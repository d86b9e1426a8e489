"""Where constants of cut channels can go: the biases of the layers that read them, found by running the graph."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.dependency._call import bind_arguments
from torchshear.graph import locate
from torchshear.graph._operator import operator_of
from torchshear.speedup.comparing._relative_error import relative_error
from torchshear.speedup.compensation._constants import Barrier, Bools, ConstantNetwork, Look
from torchshear.speedup.compensation._fold_record import FoldedConstants, SkippedConstants
from torchshear.speedup.rewriting._slicing import is_touched, map_axes, select_kept, writes_to_operand

# Relative differences that equal values may have, by dtype.
_SAME = {torch.float64: 1e-11, torch.float32: 1e-5}
_SAME_IN_NARROWER = 1e-2
UNEVEN = "what they add is not the same at every position, as where padding with zeros cuts it off"


@dataclass(slots=True)
class Places:
    """What a search finds.

    Attributes:
        folded: layers with their constants.
        skipped: readers that see zeros.
        changes: canonical name of a tensor -> what is added to it, over all of its positions.
        barriers: name of a node -> what it does not see.
        others: what all other calls do not see of cut channels; None: they see them.
    """

    folded: list[FoldedConstants] = field(default_factory=list)
    skipped: list[SkippedConstants] = field(default_factory=list)
    changes: dict[str, Tensor] = field(default_factory=dict)
    barriers: dict[str, Barrier] = field(default_factory=dict)
    others: Barrier | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """A tensor of one value a channel that can take a constant: added to it, or for a mean taken from it."""

    name: str
    sign: int


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What a layer reads: the operand, its dimension with cut channels, which are cut, and the layer's arguments."""

    operand: fx.Node
    dim: int
    gone: Bools
    channel: int


def find_places(network: ConstantNetwork, inputs: list[list[Any]]) -> Places:
    """Run a network on several inputs side by side, and fold where all agree on what the constants add.

    A call through which kept values become others than with zeros on the cut channels reads them. If it is a layer,
    what they add is the same for every sample and position, and it has a place to put that, the place is noted;
    else the call is shut off from the channels.

    Args:
        network: the network with constants.
        inputs: flat inputs of each run, at least two.
    """
    search = Search(network)
    network.walk(inputs, search.decide)
    return search.places


class Search:
    """Which calls of a network read constants of cut channels, and where these can go."""

    def __init__(self, network: ConstantNetwork) -> None:
        self.network = network
        self.places = Places()
        self.n_uses = Counter(
            str(node.target) for user in network.graph for node in _operands(user) if node.op == "get_attr"
        )
        dtypes = {t.dtype for t in network.state.values() if t.is_floating_point()}
        self.tolerance = max((_SAME.get(dtype, _SAME_IN_NARROWER) for dtype in dtypes), default=1e-11)
        self.noise = torch.Generator().manual_seed(0)

    def decide(self, node: fx.Node, looks: Sequence[Look]) -> list[Any]:
        """The values of a call, behind a barrier if it reads cut channels and they cannot be folded."""
        network = self.network
        if not is_touched(node, network.cut.groups.facts, network.cut):
            return [self._varied(node, network.call(node, look), run) for run, look in enumerate(looks)]
        before = [kept_as_is(node, look) for look in looks] if writes_to_operand(node) else looks
        masked = self._all(node, before, Barrier("all"))
        through = [network.call(node, look) for look in looks]
        values = self._chosen(node, before, through, masked)
        if values is not through and writes_to_operand(node):  # who looks at the same memory must see it
            values = [one.copy_(value) for one, value in zip(through, values, strict=True)]
        return [self._varied(node, value, run) for run, value in enumerate(values)]

    def _chosen(self, node: fx.Node, before: Sequence[Look], through: list[Any], masked: list[Any]) -> list[Any]:
        """What a call gives with the constants where that changes nothing or folds, else behind a barrier."""
        if self._are_same(node, through, masked):
            return through
        values = self._folded(node, before, through)
        return self._shut(node, before, masked) if values is None else values

    def _all(self, node: fx.Node, looks: Sequence[Look], barrier: Barrier) -> list[Any]:
        return [self.network.call(node, self.network.behind(barrier, look)) for look in looks]

    def _shut(self, node: fx.Node, looks: Sequence[Look], masked: list[Any]) -> list[Any]:
        """Hide the cut channels: in what comes from the inputs if that is enough, else in parameters too."""
        barrier = Barrier("inputs")
        values = self._all(node, looks, barrier)
        if not self._are_same(node, values, masked):
            barrier, values = Barrier("all"), masked
        self.places.barriers[node.name] = barrier
        return values

    def _folded(self, node: fx.Node, looks: Sequence[Look], through: list[Any]) -> list[Any] | None:
        """Note what constants add to a layer; its values then, or None if it cannot be."""
        read = self._read(node)
        if isinstance(read, str):
            self._skip(node, self._n_moved(node, looks), read)
            return None
        constant, moved = self._constants(read, looks)
        hidden = read.gone & ~constant
        n_loose = int((hidden & moved).sum())
        if n_loose:
            self._skip(node, n_loose, "they are not constant: they depend on the input or on the position")
        n_fixed = int((constant & moved).sum())
        if not n_fixed:
            return None
        barrier = Barrier("some", read.operand.name, read.dim, hidden)
        none = self._all(node, looks, Barrier("some", read.operand.name, read.dim, read.gone))
        some = self._all(node, looks, barrier) if hidden.any() else through
        added, target = self._same_everywhere(node, read.channel, some, none), self._target(node)
        if added is None:
            self._skip(node, n_fixed, UNEVEN)
        elif isinstance(target, str):
            self._skip(node, n_fixed, target)
        else:
            self.places.changes[target.name] = target.sign * added
            self.places.folded.append(FoldedConstants(layer_of(node), target.name, n_fixed))
            if hidden.any():
                self.places.barriers[node.name] = barrier
            return some
        return None

    def _skip(self, node: fx.Node, n_channels: int, reason: str) -> None:
        self.places.skipped.append(SkippedConstants(layer_of(node), n_channels, reason))

    def _read(self, node: fx.Node) -> _Read | str:
        """What a layer reads; or why the call is none that takes constants."""
        layer = operator_of(node).product
        if layer is None or not layer.bias:
            return f"{locate(node).operator} has no bias"
        arguments = bind_arguments(node)
        operand, weight = arguments[layer.left], arguments[layer.right]
        if weight in self.network.from_inputs:
            return "the weight is computed from the input"
        if arguments.get("beta", 1) != 1:
            return "its bias is multiplied by a number"
        gone = self.network.gone(operand)
        if len(gone) != 1:
            return "its input shrinks in several dimensions, or not in one of its own"
        ((dim, mask),) = gone.items()
        return _Read(operand, dim, mask, node.meta["val"].ndim + layer.channels)

    def _constants(self, read: _Read, looks: Sequence[Look]) -> tuple[Bools, Bools]:
        """Masks of the cut channels that are constant in all runs, and of those that are not zero."""
        rows = [look(read.operand).movedim(read.dim, 0).flatten(1) for look in looks]
        lines = torch.cat(rows, 1)
        low, high = lines.amin(1), lines.amax(1)
        size = torch.maximum(low.abs(), high.abs())
        is_constant = (high - low <= self.tolerance * size).cpu().numpy()
        moved = (size > 0).cpu().numpy()
        return read.gone & is_constant, read.gone & moved

    def _n_moved(self, node: fx.Node, looks: Sequence[Look]) -> int:
        """Number of cut channels that are not zero in any operand from the inputs."""
        counts = [0]
        for operand in node.all_input_nodes:
            for dim, gone in self.network.gone(operand).items() if operand in self.network.from_inputs else ():
                rows = [look(operand).movedim(dim, 0).flatten(1).ne(0).any(1).cpu().numpy() for look in looks]
                counts.append(int((np.logical_or.reduce(rows) & gone).sum()) if len(rows[0]) == len(gone) else 0)
        return max(counts)

    def _same_everywhere(self, node: fx.Node, channel: int, some: list[Tensor], none: list[Tensor]) -> Tensor | None:
        """What constants add to each channel of a layer; None where it is not the same in all places and runs."""
        gone = self.network.gone(node).get(channel)
        lines = torch.cat([(a - b).movedim(channel, 0).flatten(1) for a, b in zip(some, none, strict=True)], 1)
        if gone is not None:
            lines = lines.masked_fill(torch.from_numpy(gone).to(lines.device)[:, None], 0)
        scale = max(float(value.abs().max()) for value in (*some, *none))
        if not bool((lines.amax(1) - lines.amin(1)).max() <= self.tolerance * scale):  # NaN is not the same
            return None
        return lines.mean(1)

    def _target(self, node: fx.Node) -> _Target | str:
        """Where the constants of a layer can go; or why nowhere."""
        layer = operator_of(node).product
        assert layer is not None
        bias = bind_arguments(node)[layer.bias]
        if isinstance(bias, fx.Node):
            return self._own(bias, "bias", 1)
        users = list(node.users)
        norm = operator_of(users[0]).norm if len(users) == 1 else None
        given = bind_arguments(users[0])
        if norm is None or norm.over != "batch" or given.get(norm.own) or given.get(norm.input) is not node:
            return "no bias to fold into, and no batch norm right behind it"
        mean = given.get(norm.mean)
        return self._own(mean, "running mean", -1) if isinstance(mean, fx.Node) else "no bias to fold into"

    def _own(self, node: fx.Node, what: str, sign: int) -> _Target | str:
        if node.op != "get_attr":
            return f"its {what} is computed"
        if node.meta["val"].ndim != 1:
            return f"its {what} is not one value a channel"
        name = str(node.target)
        return _Target(name, sign) if self.n_uses[name] == 1 else f"its {what} {name!r} is read elsewhere, too"

    def _are_same(self, node: fx.Node, left: list[Any], right: list[Any]) -> bool:
        """Whether values agree on kept positions."""
        kept = [pytree.tree_leaves([self._kept(node, value) for value in values]) for values in (left, right)]
        return relative_error(*kept) <= self.tolerance

    def _kept(self, node: fx.Node, value: Any) -> Any:
        axes = self.network.cut.groups.facts.axes.get(node.name)
        return map_axes(lambda tensor, own: select_kept(tensor, own, self.network.cut), value, axes)

    def _varied(self, node: fx.Node, value: Any, run: int) -> Any:
        """The same with noise on what tokens become in all runs but the first: random tokens could be out of range."""
        if run == 0 or str(node.target) != "aten.embedding.default":
            return value
        noise = torch.randn(value.shape, generator=self.noise, dtype=torch.float64).to(value)
        return value + self.network.zeroed(node, noise * value.std().clamp_min(1e-3))


def _operands(node: fx.Node) -> list[fx.Node]:
    """Operands of a node, each as often as it is given."""
    found: list[fx.Node] = []

    def collect(operand: fx.Node) -> fx.Node:
        found.append(operand)
        return operand

    fx.map_arg((node.args, node.kwargs), collect)
    return found


def layer_of(node: fx.Node) -> str:
    """Name of the module that makes a call, or of the operator where that is the model itself."""
    return locate(node).module or locate(node).operator


def kept_as_is(node: fx.Node, look: Look) -> Look:
    """What the operands of a call are now, before it writes to them."""
    now = {n: look(n).clone() if isinstance(look(n), Tensor) else look(n) for n in node.all_input_nodes}
    return lambda n: now[n]
