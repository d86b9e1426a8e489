"""Outputs of modules that an operand of a product is made of, such as the queries of a fused projection.

The graph is run once, with random numbers in place of the outputs in question. An operand is made of an output if it
has a gradient there. It is proportional to it if it equals the output times that gradient (Euler's theorem): that holds
for reshapes, splits and rotations, not for a sum with a bias or a norm.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import OutputSlice
from torchshear.graph._location import module_outputs
from torchshear.graph.numerics._float64 import compute_in

Pair = tuple[fx.Node, fx.Node]
Run = Callable[[torch.dtype, Callable[[fx.Node, Any], Any]], Iterator[tuple[fx.Node, Any]]]
Slices = frozenset[OutputSlice]
Sides = tuple[Slices | None, Slices | None]
_SAME = 1e-4  # relative difference of equal numbers; unequal ones, being random, differ by more
_NOISE = 0.1  # what is added to parameters, of which many are zero at first
_ZERO = 1e-9  # of the largest gradient


def find_origins(pairs: Mapping[fx.Node, Sequence[Pair]], cut: Cut, run: Run, dtype: torch.dtype) -> dict[Pair, Sides]:
    """For two operands of a product, find the slices of outputs that each is proportional to.

    Args:
        pairs: call -> left and right operand of each product in it.
        cut: the units that are removed.
        run: runs the rewritten graph in a dtype, with a function that replaces the value of each node; gives nodes
            with their values.
        dtype: dtype to compute in.

    Returns:
        The slices of both operands, none of which the other is made of as well; None where there are no such.
    """
    return _OriginTracker(pairs, cut).run(run, dtype)


class _OriginTracker:
    """One run of the graph."""

    def __init__(self, pairs: Mapping[fx.Node, Sequence[Pair]], cut: Cut) -> None:
        self.cut = cut
        self.outputs = module_outputs(cut.groups.graph)
        self.modules = {node.name: module for node, module in self.outputs.items()}
        self.pairs = {node.name: list(some) for node, some in pairs.items()}
        operands = {operand for some in pairs.values() for both in some for operand in both}
        self.ends = {operand.name: {end.name for end in self._ends(operand)} for operand in operands}
        self.replaced = frozenset().union(*self.ends.values())
        self.uses = Counter(operand.name for some in pairs.values() for both in some for operand in both)
        self.generator = torch.Generator().manual_seed(0)
        self.leaves: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}

    def run(self, run: Run, dtype: torch.dtype) -> dict[Pair, Sides]:
        """Run the graph as far as the last product."""
        found: dict[Pair, Sides] = {}
        left = len(self.pairs)
        with torch.enable_grad(), compute_in(dtype), torch.random.fork_rng(devices=[]):
            for node, value in run(dtype, self._replace):
                if node.name in self.ends:
                    self.values[node.name] = value
                for both in self.pairs.get(node.name, ()):
                    found[both] = self._sides(*both)
                    self._drop(both)
                left -= node.name in self.pairs
                if not left:
                    break
        return found

    def _drop(self, both: Pair) -> None:
        """Drop operands, and the tensors kept for their gradients, after the last product that reads them."""
        for operand in both:
            self.uses[operand.name] -= 1
            if not self.uses[operand.name]:
                self.values.pop(operand.name, None)

    def _ends(self, node: fx.Node) -> set[fx.Node]:
        """Return the outputs of modules and the parameters that a value is computed from, without outputs between."""
        ends: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            latest = waiting.pop()
            if latest in self.outputs or latest.op == "get_attr":
                ends.add(latest)
            elif latest not in seen:
                waiting += latest.all_input_nodes
            seen.add(latest)
        return ends

    def _replace(self, node: fx.Node, value: Any) -> Any:
        """Replace the output of a module by random numbers, and add noise to a parameter."""
        if node.name not in self.replaced or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if node.name not in self.modules:
            return value + _NOISE * self._random(value).abs()
        leaf = self.leaves[node.name] = self._random(value).requires_grad_()
        return leaf.clone()

    def _random(self, like: Tensor) -> Tensor:
        """Return random numbers of a shape, without use of any device's generator."""
        return torch.randn(like.shape, generator=self.generator).to(like.device, like.dtype)

    def _sides(self, left: fx.Node, right: fx.Node) -> Sides:
        (total, of_left), (other, of_right) = self._gradients(left.name), self._gradients(right.name)
        return self._slices(total, of_left, of_right), self._slices(other, of_right, of_left)

    def _gradients(self, name: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a random sum over an operand, and its gradient for each output that has one."""
        operand, leaves = self.values[name], {end: self.leaves[end] for end in self.ends[name] & self.leaves.keys()}
        total = (operand * self._random(operand)).sum()
        if not total.requires_grad:
            return total, {}
        found = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
        return total, {end: grad for end, grad in zip(leaves, found, strict=True) if grad is not None}

    def _slices(self, total: Tensor, own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Slices | None:
        """Return the slices of outputs, all or one, that belong to one operand alone and that it is proportional to."""
        apart = {name: self._slice(name, grad, other.get(name)) for name, grad in own.items()}
        slices = {name: output for name, output in apart.items() if output is not None}
        shares = {name: float((own[name] * self.leaves[name]).sum().detach()) for name in slices}
        for names in (list(slices), *([name] for name in slices)):
            if abs(sum(shares[name] for name in names) - float(total.detach())) <= _SAME * abs(float(total.detach())):
                return frozenset(slices[name] for name in names) or None
        return None

    def _slice(self, name: str, own: Tensor, other: Tensor | None) -> OutputSlice | None:
        """Return the positions of an output that one operand is made of, if the other is made of none of them."""
        module = self.modules[name]
        if other is None:
            return OutputSlice(module)
        axes = self.cut.groups.facts.axes[name]
        for dim, axis in enumerate(axes if isinstance(axes, tuple) else ()):
            mine, others = _nonzero_positions(own, dim), _nonzero_positions(other, dim)
            if self.cut.changes(axis) and not bool((mine & others).any()):
                positions = tuple(mine.nonzero().flatten().tolist())
                return OutputSlice(module, dim - own.ndim, own.shape[dim], positions)
        return None


def _nonzero_positions(gradient: Tensor, dim: int) -> Tensor:
    """Return a mask of the positions of a dimension at which a gradient is not zero."""
    size = gradient.abs().movedim(dim, 0).flatten(1).amax(1)
    return size > _ZERO * size.max()
