"""Reference for networks with cross-channel operators: the original graph at full size, with masked parameters.

No value is set to zero because a rule says so. An operator that computes over an axis with cut positions gives what
its masked form gives (`torchshear.dependency.MaskedCall`). The rules claim which positions these are, and the claim is
checked on the data: on two inputs at once, a position that is said to be cut must hold the same number on both, or a
copy of another position, or a number that depends on other cut positions. If it does none of this, the claim is wrong.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules._findings import Facts
from torchshear.errors import VerificationError, first_line
from torchshear.graph._location import locate
from torchshear.graph._nodes import is_only_read
from torchshear.graph.masked._call import MaskedCall, masked_form
from torchshear.speedup._relative_error import relative_error, tolerance
from torchshear.speedup.rewriting._slicing import keep_mask, writes_to_operand

KeptMasks = dict[int, Tensor]  # dimension -> mask of its kept positions
_SAME = 1e-11  # relative difference of sums over equal numbers


class MaskedNetwork:
    """Runs a captured graph as the network without the cut positions.

    Args:
        graph: nodes in execution order.
        facts: what the rules found out about this graph.
        cut: the units that are removed.
        state: canonical name -> masked tensor.
        excused: calls that are known to be excused; added to.

    Attributes:
        excused: name of a call -> its place, for calls whose masked form differs at kept positions from the operator.
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
        """Run on several inputs of the same shapes side by side, and yield each node with its values.

        Raises:
            VerificationError: a position that is said to be cut is not.
        """
        runs = [_NetworkRun(self, leaves) for leaves in inputs]
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
                self._check_cut_positions(node, runs)
            yield node, values
            for run in runs:
                run.forget(node)

    def kept_masks(self, node: fx.Node, value: Any, index: int = 0) -> KeptMasks:
        """Return masks of the kept positions of a value, for each of its dimensions that loses some.

        Args:
            node: the call that gives the value.
            value: the value; other things than tensors have no masks.
            index: number of the value, if the call gives several.
        """
        axes = self.facts.axes.get(node.name)
        axes = axes[index] if isinstance(axes, list) else axes
        if not isinstance(axes, tuple) or not isinstance(value, Tensor):
            return {}
        return {
            dim: torch.from_numpy(keep_mask(axis, value.shape[dim], self.cut).copy()).to(value.device)
            for dim, axis in enumerate(axes[: value.ndim])
            if not axis.rows and self.cut.changes(axis)
        }

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[fx.Node, Any]) -> Any:
        """Compute a call; by its masked form if it is a cross-channel operator over an axis that is cut."""
        target: Any = node.target
        if not any(self.cut.changes(axis) for axis in self.facts.cross_channel.get(node.name, ())):
            return target(*args, **kwargs)
        form = masked_form(node)
        assert form is not None, f"{node.target} is a cross-channel operator without a masked form"
        masked = form(MaskedCall(node, args, kwargs, lambda operand: self.kept_masks(operand, values[operand])))
        if node.name not in self.excused:
            with torch.no_grad():
                plain = target(*args, **kwargs)
            kept = [
                [_select_kept(one, self.kept_masks(node, one, i)) for i, one in enumerate(_tensors(value))]
                for value in (plain, masked)
            ]
            if relative_error(*kept) > tolerance(kept[0]):
                self.excused[node.name] = f"{node.name} ({locate(node)})"
        return masked

    def _check_cut_positions(self, node: fx.Node, runs: "Sequence[_NetworkRun]") -> None:
        """See that no position of a call's values that is said to be cut follows the inputs.

        Raises:
            VerificationError: one does.
        """
        suspects: list[tuple[int, int, Tensor]] = []  # number of the value, dimension, positions
        with _disable_current_modes(), torch._C.DisableTorchFunction():  # which take time, and change nothing here
            pairs = zip(*(_tensors(run.values[node]) for run in runs[:2]), strict=True)
            for index, (one, other) in enumerate(pairs):
                for dim, keep in self.kept_masks(node, one, index).items():
                    is_cut = (~keep).nonzero().flatten()
                    left, right = (value.detach().index_select(dim, is_cut) for value in (one, other))
                    if torch.equal(left, right):  # as nearly all are
                        continue
                    positions = is_cut[_differ(left, right, dim)]
                    if positions.numel():
                        positions = positions[~_are_copies((one.detach(), other.detach()), dim, positions)]
                    if positions.numel():
                        suspects.append((index, dim, positions))
        for index, dim, positions in suspects:
            follow_cut = [run.depend_on_cut(node, index, dim, positions) for run in runs]
            alive = positions[~torch.stack(follow_cut).any(0)]
            if alive.numel():
                raise VerificationError(
                    f"position {int(alive[0])} of dimension {dim} of {node.name!r}, {locate(node)}, is said to be cut, "
                    f"but its value follows the inputs: the rule of that operator, or of one before it, does not "
                    f"describe its call."
                )


class _NetworkRun:
    """One run of the network, node by node."""

    def __init__(self, network: MaskedNetwork, leaves: list[Any]) -> None:
        self.network = network
        self.values: dict[fx.Node, Any] = {}
        self._inputs = iter(leaves)
        self._before: dict[fx.Node, Any] = {}  # operands as they were before the last call wrote to them
        self._last = {operand: node for node in network.graph.nodes for operand in node.all_input_nodes}

    def step(self, node: fx.Node) -> Any:
        """Compute the next node, which is `node`."""
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
            if writes_to_operand(node):
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

    def depend_on_cut(self, node: fx.Node, index: int, dim: int, positions: Tensor) -> Tensor:
        """Return a mask of the positions that change with the numbers at cut positions of the call's operands.

        Weights keep their numbers, which are zero there.
        """
        changed = {o: self._change_cut(o, self._before.get(o, self.values[o])) for o in node.all_input_nodes}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: changed[operand])
        with torch.no_grad():
            after = _tensors(self.network.call(node, args, kwargs, changed))[index]
        before = _tensors(self.values[node])[index].detach()
        return _differ(before.index_select(dim, positions), after.index_select(dim, positions), dim)

    def _change_cut(self, operand: fx.Node, value: Any) -> Any:
        """Return an operand with other numbers at its cut positions; integers become those at kept positions."""
        if isinstance(value, list | tuple):
            return [_with_other_numbers(one, self.network.kept_masks(operand, one, i)) for i, one in enumerate(value)]
        if not isinstance(value, Tensor) or (operand.op == "get_attr" and not _is_integer(value)):
            return value
        return _with_other_numbers(value, self.network.kept_masks(operand, value))


def _with_other_numbers(value: Tensor, kept: KeptMasks) -> Tensor:
    value = value.detach().clone()
    if value.dtype is torch.bool:
        return value
    for dim, keep in kept.items():
        is_cut = (~keep).nonzero().flatten()
        if _is_integer(value):  # as a list of channels to pick
            left = keep.nonzero().flatten()
            others = left[torch.arange(len(is_cut), device=left.device) % len(left)]
            value.index_copy_(dim, is_cut, value.index_select(dim, others))
            continue
        part = value.index_select(dim, is_cut)
        places = torch.arange(1, part.numel() + 1, dtype=torch.float64, device=value.device)
        noise = 1 + 0.5 * torch.cos(places * 3**0.5).reshape(part.shape)
        value.index_copy_(dim, is_cut, noise.to(value.dtype))
    return value


def _is_integer(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype is not torch.bool


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [one for one in value if isinstance(one, Tensor)] if isinstance(value, list | tuple) else []


def _select_kept(value: Tensor, kept: KeptMasks) -> Tensor:
    value = value.detach()
    for dim, mask in kept.items():
        value = value.index_select(dim, mask.nonzero().flatten())
    return value


def _differ(left: Tensor, right: Tensor, dim: int) -> Tensor:
    """Return a mask of the positions along a dimension at which two values differ by more than rounding."""
    if not left.numel():
        return torch.zeros(left.shape[dim], dtype=torch.bool, device=left.device)
    if not left.is_floating_point() and not left.is_complex():
        differ = left != right
    else:
        limit = tolerance([left]) * (1 + left.abs().nan_to_num(0, 0, 0))
        differ = ~(((left - right).abs() <= limit) | (left == right) | (left.isnan() & right.isnan()))
    return differ.movedim(dim, 0).reshape(left.shape[dim], -1).any(1)


def _are_copies(values: Sequence[Tensor], dim: int, positions: Tensor) -> Tensor:
    """Return a mask of the positions that hold, in all of the values, exactly what another position holds."""
    rows = torch.cat([value.movedim(dim, 0).reshape(value.shape[dim], -1) for value in values], 1)
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj()).flatten(1)
    rows = rows.to(torch.float64).nan_to_num(0, 1e3, -1e3)
    weights = torch.cos(torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device) * 2**0.5)
    sums, sizes = rows @ weights, rows.abs().sum(1)
    near = (sums[positions, None] - sums[None]).abs() <= _SAME * sizes[positions, None]
    return near.sum(1) > 1
