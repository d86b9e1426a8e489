"""The network on fewer channels as a reference: the original graph on tensors of full size, with masked parameters.

No value is set to zero because a rule says so. An operator that mixes positions of which some are cut computes what its
masked form gives (`torchshear.graph.MaskedCall`). Which positions those are is claimed by the rules and checked on the
data: on two inputs at once, a position said to be cut must hold the same number on both, or a copy of what another
position holds, or something that depends on other cut positions. One that does none of this is alive, and the claim is
wrong.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from torchshear.dependency import Axes, Cut
from torchshear.dependency._call import Facts
from torchshear.errors import VerificationError, first_line
from torchshear.graph import MaskedCall, locate, masked_form
from torchshear.graph._run import is_only_read
from torchshear.speedup.comparing._compare import relative_error, tolerance
from torchshear.speedup.rewriting._cut_positions import keep_of

Kept = dict[int, Tensor]
_SAME = 1e-11  # relative difference of sums over equal numbers


class MaskedNetwork:
    """Runs a captured graph as the network without the cut positions.

    Args:
        graph: nodes in execution order.
        facts: what the rules found out about this graph.
        cut: the units that are cut.
        state: canonical name -> tensor, masked.
        excused: calls that are known to be excused; added to.

    Attributes:
        excused: name of a call -> where it is, for calls whose result at kept positions is another one than that of the
            operator itself.
    """

    def __init__(
        self,
        graph: fx.Graph,
        facts: Facts,
        cut: Cut,
        state: Mapping[str, Tensor],
        excused: dict[str, str] | None = None,
    ) -> None:
        self.graph = graph
        self.facts = facts
        self.cut = cut
        self.state = state
        self.excused = {} if excused is None else excused

    def values(self, inputs: Sequence[list[Any]]) -> Iterator[tuple[fx.Node, list[Any]]]:
        """Run on several inputs of the same shapes at once, and give each node with its values.

        Raises:
            VerificationError: a position that is said to be cut is not.
        """
        runs = [_Run(self, leaves) for leaves in inputs]
        for node in self.graph.nodes:
            try:
                values = [run.step(node) for run in runs]
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                raise VerificationError(
                    f"{node.name!r}, {locate(node)}, cannot be computed on kept positions ({type(error).__name__}: "
                    f"{first_line(error)[:160]}): the rule of that operator, or of one before it, does not describe "
                    f"its call."
                ) from error
            if node.op == "call_function" and len(runs) > 1:
                self._check(node, runs)
            yield node, values
            for run in runs:
                run.forget(node)

    def kept(self, node: fx.Node, value: Any) -> Kept:
        """Masks of the kept positions of a value, for each dimension that loses some."""
        axes = self.facts.axes.get(node.name)
        return self._masks(axes, value) if isinstance(axes, tuple) and isinstance(value, Tensor) else {}

    def _masks(self, axes: Axes, value: Tensor) -> Kept:
        found: Kept = {}
        for dim, axis in enumerate(axes[: value.ndim]):
            if not axis.rows and self.cut.changes(axis):
                keep = keep_of(axis, value.shape[dim], self.cut)
                found[dim] = torch.from_numpy(keep.copy()).to(value.device)
        return found

    def is_mixed(self, node: fx.Node) -> bool:
        """Whether a call mixes positions of which some are cut."""
        return any(self.cut.changes(axis) for axis in self.facts.mixed.get(node.name, ()))

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[fx.Node, Any]) -> Any:
        """The value of a call: by its masked form if it mixes cut positions."""
        if not self.is_mixed(node):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        form = masked_form(node)
        assert form is not None, f"{node.target} mixes positions and has no masked form"
        value = form(MaskedCall(node, args, kwargs, lambda operand: self.kept(operand, values[operand])))
        if node.name not in self.excused and self._is_another(node, value, args, kwargs):
            self.excused[node.name] = f"{node.name} ({locate(node)})"
        return value

    def _is_another(self, node: fx.Node, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the masked form of a call, which gave a value, is another function than the operator itself."""
        with torch.no_grad():
            plain = node.target(*args, **kwargs)  # type: ignore[operator]
        kept = [_at_kept(one, self._of_result(node, i, one)) for i, one in enumerate(_tensors(value))]
        itself = [_at_kept(one, self._of_result(node, i, one)) for i, one in enumerate(_tensors(plain))]
        return relative_error(itself, kept) > tolerance(itself)

    def _of_result(self, node: fx.Node, index: int, value: Tensor) -> Kept:
        axes = self.facts.axes.get(node.name)
        own = axes[index] if isinstance(axes, list) else axes
        return self._masks(own, value) if isinstance(own, tuple) else {}

    # -- what is said to be cut must be -------------------------------------------------------------------------------

    def _check(self, node: fx.Node, runs: "Sequence[_Run]") -> None:
        """See that no position of a value that is said to be cut is alive.

        Raises:
            VerificationError: one is.
        """
        with _disable_current_modes(), torch._C.DisableTorchFunction():  # which take time, and change nothing here
            suspects = list(self._suspects(node, [_tensors(run.values[node]) for run in runs[:2]]))
        for index, dim, positions in suspects:
            moved = [run.moved(node, index, dim, positions) for run in runs]
            alive = positions[~torch.stack(moved).any(0)]
            if alive.numel():
                raise VerificationError(
                    f"position {int(alive[0])} of dimension {dim} of {node.name!r}, {locate(node)}, is said to be cut, "
                    f"but its value follows the inputs: the rule of that operator, or of one before it, does not "
                    f"describe its call."
                )

    def _suspects(self, node: fx.Node, both: Sequence[list[Tensor]]) -> Iterator[tuple[int, int, Tensor]]:
        """Results, dimensions and positions said to be cut that follow the inputs, and are no copies of others."""
        for index, (one, other) in enumerate(zip(*both, strict=True)):
            for dim, keep in self._of_result(node, index, one).items():
                gone = (~keep).nonzero().flatten()
                left, right = one.detach(), other.detach()
                pair = left.index_select(dim, gone), right.index_select(dim, gone)
                if torch.equal(*pair):  # as nearly all are
                    continue
                suspects = gone[_varying(*pair, dim)]
                if suspects.numel():
                    suspects = suspects[~_are_copies((left, right), dim, suspects)]
                if suspects.numel():
                    yield index, dim, suspects


class _Run:
    """One run of the network, step by step."""

    def __init__(self, network: MaskedNetwork, leaves: list[Any]) -> None:
        self.network = network
        self.values: dict[fx.Node, Any] = {}
        self._inputs = iter(leaves)
        self._before: dict[fx.Node, Any] = {}
        self._last = {operand: node for node in network.graph.nodes for operand in node.all_input_nodes}

    def step(self, node: fx.Node) -> Any:
        """The value of the next node, which is `node`."""
        values = self.values
        if node.op == "placeholder":
            values[node] = next(self._inputs)
        elif node.op == "get_attr":
            tensor = self.network.state[str(node.target)]
            values[node] = tensor if tensor.ndim > 1 and is_only_read(node) else tensor.clone()
        elif node.op == "output":
            values[node] = fx.map_arg(node.args[0], lambda operand: values[operand])
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: values[operand])
            if _writes(node):
                operands = node.all_input_nodes
                self._before = {o: values[o].clone() for o in operands if isinstance(values[o], Tensor)}
            values[node] = self.network.call(node, args, kwargs, values)
        return values[node]

    def forget(self, node: fx.Node) -> None:
        """Drop values that no later node reads."""
        self._before = {}
        for operand in node.all_input_nodes:
            if self._last[operand] is node:
                self.values.pop(operand, None)

    def moved(self, node: fx.Node, index: int, dim: int, positions: Tensor) -> Tensor:
        """Which positions of a result change with the numbers at cut positions of the operands.

        Weights keep theirs, which are zero. Integers, as of a list of channels to pick, are exchanged for kept ones.
        """
        seen = {o: self._junk(o, self._before.get(o, self.values[o])) for o in node.all_input_nodes}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: seen[operand])
        with torch.no_grad():
            probed = _tensors(self.network.call(node, args, kwargs, seen))[index]
        before = _tensors(self.values[node])[index].detach()
        return _varying(before.index_select(dim, positions), probed.index_select(dim, positions), dim)

    def _junk(self, operand: fx.Node, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._spoilt(one, self.network._of_result(operand, i, one)) for i, one in enumerate(value)]
        if not isinstance(value, Tensor) or (operand.op == "get_attr" and not _are_integers(value)):
            return value
        return self._spoilt(value, self.network.kept(operand, value))

    @staticmethod
    def _spoilt(value: Tensor, kept: Kept) -> Tensor:
        value = value.detach().clone()
        if value.dtype is torch.bool:
            return value
        for dim, keep in kept.items():
            gone = (~keep).nonzero().flatten()
            if _are_integers(value):
                left = keep.nonzero().flatten()
                others = left[torch.arange(len(gone), device=left.device) % len(left)]
                value.index_copy_(dim, gone, value.index_select(dim, others))
                continue
            part = value.index_select(dim, gone)
            places = torch.arange(1, part.numel() + 1, dtype=torch.float64, device=value.device)
            noise = 1 + 0.5 * torch.cos(places * 3**0.5).reshape(part.shape)
            value.index_copy_(dim, gone, noise.to(value.dtype))
        return value


def _are_integers(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype is not torch.bool


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [one for one in value if isinstance(one, Tensor)] if isinstance(value, list | tuple) else []


def _at_kept(value: Tensor, kept: Kept) -> Tensor:
    value = value.detach()
    for dim, mask in kept.items():
        value = value.index_select(dim, mask.nonzero().flatten())
    return value


def _varying(left: Tensor, right: Tensor, dim: int) -> Tensor:
    """Positions along a dimension at which two values differ by more than rounding."""
    if not left.numel():
        return torch.zeros(left.shape[dim], dtype=torch.bool, device=left.device)
    if not left.is_floating_point() and not left.is_complex():
        differ = left != right
    else:
        limit = tolerance([left]) * (1 + left.abs().nan_to_num(0, 0, 0))
        differ = ~(((left - right).abs() <= limit) | (left == right) | (left.isnan() & right.isnan()))
    return differ.movedim(dim, 0).reshape(left.shape[dim], -1).any(1)


def _are_copies(values: Sequence[Tensor], dim: int, suspects: Tensor) -> Tensor:
    """Which positions hold exactly what another position of the same dimension holds, in all of the values."""
    rows = torch.cat([value.movedim(dim, 0).reshape(value.shape[dim], -1) for value in values], 1)
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj()).flatten(1)
    rows = rows.to(torch.float64).nan_to_num(0, 1e3, -1e3)
    weights = torch.cos(torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device) * 2**0.5)
    sums, sizes = rows @ weights, rows.abs().sum(1)
    near = (sums[suspects, None] - sums[None]).abs() <= _SAME * sizes[suspects, None]
    return near.sum(1) > 1
