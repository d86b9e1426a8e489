"""The batch dimension, found by captures at two batches and then made free.

Sizes in a captured graph are numbers. The model is captured at two batches, and both graphs are walked side by side. If
they make the same calls in the same order, a number that is the same in both is a constant. One that is k times the
batch in both depends on it, and is replaced by a product with the size of the input. Running the graph and the model on
a third batch then shows whether they agree.

The first batch is a prime that divides no size of the model, since reshapes are told apart by their factors.
"""

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from torchshear.graph._graph import AffineSize, DynamicShapes, Graph, affine_size
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._nodes import shape_of
from torchshear.graph._operator_record import operator_of
from torchshear.graph._outputs import output_leaves
from torchshear.graph._run import run_graph, run_model
from torchshear.graph.numerics._float64 import compute_in, to_float64
from torchshear.graph.numerics._ties import TieBreaker

# Primes of which multiples are rare among the widths and resolutions of real models.
_PRIMES = (59, 61, 71, 79, 83, 53, 47, 43, 41, 37, 31)


class _OtherNetworkError(Exception):
    """The two captures are not of one network at two batches."""


def probe_prime(model: nn.Module, inputs: ExampleInputs, graph: Graph | None = None) -> int | None:
    """Return the first batch to capture a model with: a prime that divides none of its sizes; None if there is none.

    Args:
        model: the model.
        inputs: its example inputs; without a batch there is no prime.
        graph: a capture at another batch, whose sizes are avoided as well.
    """
    if not inputs.batch_size():
        return None
    sizes = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    sizes |= {size for tensor in inputs.tensors() for size in tensor.shape[1:]}
    sizes.add(second_batch(inputs))
    if graph is not None:
        sizes |= {size for node in graph for shape in _flat_shapes(shape_of(node)) for size in shape}
    primes = (prime for prime in _PRIMES if not any(size % prime == 0 for size in sizes if size))
    return next(primes, None)


def second_batch(inputs: ExampleInputs) -> int:
    """Return the second batch to capture a model with: that of the example, or 2."""
    return max(inputs.batch_size() or 2, 2)


def hides_batch(graph: Graph) -> bool:
    """Return whether a size that does not depend on the batch is a multiple of the batch of the capture."""
    dynamic, prime = graph.dynamic_shapes, graph.batch_hint
    assert dynamic is not None
    assert prime is not None
    for node in graph:
        shape = shape_of(node)
        both = zip(_flat_shapes(shape), _flat_shapes(dynamic.other.get(node.name, shape)), strict=True)
        if any(a == b and a and a % prime == 0 for shapes in both for a, b in zip(*shapes, strict=True)):
            return True
    return False


def _flat_shapes(shape: Any) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of all tensors of a node, from the result of `shape_of`."""
    if isinstance(shape, tuple):
        if all(isinstance(size, int) for size in shape):
            yield shape
        else:
            for one in shape:
                yield from _flat_shapes(one)


def free_batch(graph: Graph, other: Graph) -> DynamicShapes | None:
    """Replace every number in a graph that depends on the batch by one that is computed from the input.

    Args:
        graph: the capture at one batch; changed in place if the batch can be freed.
        other: the capture at another batch; only read.

    Returns:
        The shapes that depend on the batch. None if the two are not the same network, or a number depends on the batch
        in another way than as a multiple of it with some more or less; the graph is then unchanged.
    """
    first, second = (
        next(n for n in one if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor) and n.meta["val"].ndim)
        for one in (graph, other)
    )
    batches = (first.meta["val"].shape[0], second.meta["val"].shape[0])
    try:
        twins = _pair_nodes(graph, other)
        arguments = {
            node: _merge_arguments((node.args, node.kwargs), (twin.args, twin.kwargs), batches, twins)
            for node, twin in twins.items()
        }
    except _OtherNetworkError:
        return None
    inputs = [node for node in graph if node.op == "placeholder"]
    sizes = _SizeNodes(graph.fx_graph, first, batches[0], last=inputs[-1])
    for node, merged in arguments.items():
        node.args, node.kwargs = map_aggregate(
            merged, lambda leaf: sizes.node(leaf) if isinstance(leaf, AffineSize) else leaf
        )
    return DynamicShapes(batches, {a.name: shape_of(b) for a, b in twins.items() if shape_of(a) != shape_of(b)})


def _pair_nodes(graph: Graph, other: Graph) -> dict[fx.Node, fx.Node]:
    """Return each node with the node at its place in the other graph.

    Raises:
        _OtherNetworkError: they make other calls, read other constants, or have values of other ranks.
    """
    if len(graph) != len(other):
        raise _OtherNetworkError
    twins = dict(zip(graph, other, strict=True))
    for a, b in twins.items():
        if a.op != b.op or (a.op != "placeholder" and a.target != b.target):
            raise _OtherNetworkError
        if a.op == "get_attr":  # the same tensor of the model, or constants that are equal as far as known
            one, two = graph.state[str(a.target)].tensor, other.state[str(b.target)].tensor
            if one is not two:
                is_alike = one.shape == two.shape and one.dtype == two.dtype
                is_known = not (one.is_meta or two.is_meta)
                if not is_alike or (is_known and not ((one == two) | ((one != one) & (two != two))).all()):
                    raise _OtherNetworkError
        if [len(shape) for shape in _flat_shapes(shape_of(a))] != [len(shape) for shape in _flat_shapes(shape_of(b))]:
            raise _OtherNetworkError
    return twins


def _merge_arguments(one: Any, two: Any, batches: tuple[int, int], twins: Mapping[fx.Node, fx.Node]) -> Any:
    """Return the arguments of a call with an `AffineSize` in place of each number that differs between two captures.

    Raises:
        _OtherNetworkError: they differ in more than numbers that depend on the batch.
    """
    if str(map_aggregate(one, lambda leaf: None)) != str(map_aggregate(two, lambda leaf: None)):  # other containers
        raise _OtherNetworkError
    others: list[Any] = []
    map_aggregate(two, others.append)
    remaining = iter(others)

    def merge(a: Any) -> Any:
        b = next(remaining)
        if isinstance(a, fx.Node):
            is_same = twins[a] is b
        elif type(a) is not type(b):
            is_same = False
        else:
            is_same = bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
        size = affine_size((a, b), batches) if not is_same and type(a) is type(b) is int else None
        if not is_same and size is None:
            raise _OtherNetworkError
        return a if is_same else size

    return map_aggregate(one, merge)


@dataclass(slots=True)
class _SizeNodes:
    """Nodes that compute sizes from the batch, made when they are first needed.

    Attributes:
        graph: the graph.
        source: an input with a batch.
        batch: the batch of the capture.
        last: the node behind which the next one is inserted.
        nodes: nodes that were made, by the size that they compute.
    """

    graph: fx.Graph
    source: fx.Node
    batch: int
    last: fx.Node
    nodes: dict[AffineSize, fx.Node] = field(default_factory=dict)

    def node(self, size: AffineSize) -> fx.Node:
        """Return the node that computes a size."""
        if size not in self.nodes:
            target: Any = torch.ops.aten.sym_size.int
            args: tuple[Any, ...] = (self.source, 0)
            if size.plus:
                target, args = operator.add, (self.node(AffineSize(size.times, 0)), size.plus)
            elif size.times != 1:
                target, args = operator.mul, (self.node(AffineSize(1, 0)), size.times)
            with self.graph.inserting_after(self.last):
                self.last = self.nodes[size] = self.graph.call_function(target, args)
            self.last.meta["val"] = size.at(self.batch)
        return self.nodes[size]


def agrees_with_model(graph: Graph, model: nn.Module) -> bool:
    """Return whether a graph computes what its model does, at another batch than those that it was captured at.

    It may not if the model's Python reads the batch size. Without values, as on the meta device, nothing is compared
    and the answer is yes.

    Args:
        graph: the captured model, with a free batch.
        model: the model, in the graph's mode.
    """
    if any(tensor.is_meta for tensor in [*graph.inputs.tensors(), *(entry.tensor for entry in graph.state.values())]):
        return True
    # A batch of one if the model takes that: batch norms over one value a channel cannot be trained. Of two if not, or
    # if the graph was captured at odd batches only.
    second = graph.dynamic_shapes.batches[1] if graph.dynamic_shapes is not None else 1
    norms = (operator_of(node).norm for node in graph)
    takes_one = graph.mode == "eval" or not any(norm is not None and norm.over == "batch" for norm in norms)
    for size in (1, 2) if takes_one and second % 2 == 0 else (2,):
        inputs = graph.inputs.with_batch(size)
        torch.manual_seed(0)
        try:
            expected = output_leaves(run_model(model, inputs))
        except Exception:  # the model's own code may not take this batch
            continue
        try:
            return _agrees_on(graph, model, inputs, expected)
        except Exception:  # nor may a call in the graph, which then is not the model
            return False
    return False


def _agrees_on(graph: Graph, model: nn.Module, inputs: ExampleInputs, expected: list[Any]) -> bool:
    """Return whether a graph gives the outputs of its model on some inputs.

    Outputs are compared up to their last digits and, where they are not the same, again in float64, or as far as their
    dtype tells where the model refuses that: fused kernels, which a capture takes apart, round in another way than
    their parts. Both runs draw the same random numbers, as for a dropout mask, and choose alike among equal values.
    """
    torch.manual_seed(0)
    actual = output_leaves(run_graph(graph, inputs))
    if _are_close(expected, actual, 16 * min(_epsilons(expected), default=0.0)):
        return True
    choices = TieBreaker()
    for dtype in (torch.float64, None):
        given = to_float64(inputs) if dtype is not None else inputs
        torch.manual_seed(0)
        try:
            with compute_in(dtype or torch.float32), choices.record():
                expected = output_leaves(run_model(model, given))
        except Exception:  # a kernel, or a check in the model's code, may refuse float64
            continue
        # Half of the digits of the coarsest dtype; 1e-9 in float64.
        tolerance = max((eps**0.5 for eps in _epsilons(expected) if eps > 1e-12), default=1e-9)
        torch.manual_seed(0)
        with compute_in(dtype or torch.float32), choices.replay(tolerance):
            actual = output_leaves(run_graph(graph, given))
        return _are_close(expected, actual, tolerance)
    return False


def _epsilons(outputs: list[Any]) -> list[float]:
    """Return the spacing of numbers near 1 in each floating dtype of some outputs."""
    dtypes = {value.dtype for value in outputs if isinstance(value, Tensor)}
    return [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]


def _are_close(expected: list[Any], actual: list[Any], tolerance: float) -> bool:
    """Return whether outputs are equal one by one, up to a tolerance.

    The tolerance is relative to each value plus the ordinary size of values in its tensor, which is the lower quartile
    of those that are not zero: no filler, as in a mask, sets it. Integers and truth values must be equal.
    """
    if len(expected) != len(actual):
        return False
    for a, b in zip(expected, actual, strict=True):
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            continue
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return False
        if torch.equal(a, b):
            continue
        one, two = (value.to(torch.complex128 if value.is_complex() else torch.float64) for value in (a, b))
        is_close = (one == two) | (one.isnan() & two.isnan())
        if tolerance and (a.is_floating_point() or a.is_complex()):
            sizes = one.abs()
            ordinary = sizes[(sizes > 0) & sizes.isfinite()]
            scale = ordinary.kthvalue(max(1, ordinary.numel() // 4)).values if ordinary.numel() else sizes.new_ones(())
            is_close |= ((one - two).abs() <= tolerance * (sizes + scale)) & sizes.isfinite()
        if not is_close.all():
            return False
    return True
