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
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from torchshear.graph._graph import AffineSize, DynamicShapes, Graph, affine_size
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._nodes import shape_of

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
    sizes = _SizeNodes(graph.fx_graph, first, batches[0])
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
        if a.op == "get_attr" and not _is_same_tensor(graph.state[a.target].tensor, other.state[b.target].tensor):  # type: ignore[index]
            raise _OtherNetworkError
        if [len(shape) for shape in _flat_shapes(shape_of(a))] != [len(shape) for shape in _flat_shapes(shape_of(b))]:
            raise _OtherNetworkError
    return twins


def _is_same_tensor(one: Tensor, two: Tensor) -> bool:
    """Return whether two captures read the same tensor of the model, or constants that are equal as far as known."""
    if one is two:
        return True
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return one.is_meta or two.is_meta or bool(((one == two) | ((one != one) & (two != two))).all())


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
        elif isinstance(a, fx.GraphModule):  # a branch or a loop, in which no number may depend on the batch
            is_same = str(a.graph) == str(b.graph)
        else:
            is_same = bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
        size = affine_size((a, b), batches) if not is_same and type(a) is type(b) is int else None
        if not is_same and size is None:
            raise _OtherNetworkError
        return a if is_same else size

    return map_aggregate(one, merge)


class _SizeNodes:
    """Nodes that compute sizes from the batch, made when they are first needed.

    Args:
        graph: the graph; nodes are inserted after its inputs.
        source: an input with a batch.
        batch: the batch of the capture.
    """

    def __init__(self, graph: fx.Graph, source: fx.Node, batch: int) -> None:
        self._graph = graph
        self._source = source
        self._batch = batch
        self._nodes: dict[AffineSize, fx.Node] = {}
        self._last = [node for node in graph.nodes if node.op == "placeholder"][-1]

    def node(self, size: AffineSize) -> fx.Node:
        """Return the node that computes a size."""
        if size not in self._nodes:
            target: Any = torch.ops.aten.sym_size.int
            args: tuple[Any, ...] = (self._source, 0)
            if size.plus:
                target, args = operator.add, (self.node(AffineSize(size.times, 0)), size.plus)
            elif size.times != 1:
                target, args = operator.mul, (self.node(AffineSize(1, 0)), size.times)
            with self._graph.inserting_after(self._last):
                self._last = self._nodes[size] = self._graph.call_function(target, args)
            self._last.meta["val"] = size.at(self._batch)
        return self._nodes[size]
