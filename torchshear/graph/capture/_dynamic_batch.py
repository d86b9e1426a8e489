"""The batch dimension: told by captures at two batches, and then made free.

Sizes in a captured graph are numbers. The model is captured at two batches, and both graphs are walked side by side. If
they are the same calls in the same order, a number that is the same in both is a constant, and one that is k times the
batch in both follows it, and is replaced by a product with the size of the input. Whether the graph then computes what
the model does on yet another batch is found by running both.

The first batch is a prime that divides no size of the model: reshapes are told apart by their factors.
"""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchshear.graph._follow import Batches, Follows, SecondShapes
from torchshear.graph._graph import Graph, shape_of
from torchshear.graph._inputs import ExampleInputs

# Primes of which multiples are rare among the widths and resolutions of real models.
_PRIMES = (59, 61, 71, 79, 83, 53, 47, 43, 41, 37, 31)


class _DiffersError(Exception):
    """The captures are not of one network with another batch."""


def probe_prime(model: nn.Module, inputs: ExampleInputs, graph: Graph | None = None) -> int | None:
    """The first batch to capture a model with: a prime that divides none of its sizes; None if there is no batch.

    Args:
        model: the model.
        inputs: its example inputs.
        graph: a capture at another batch, of which the sizes inside are minded as well.
    """
    if not inputs.batch_size():
        return None
    sizes = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    sizes |= {size for tensor in inputs.tensors() for size in tensor.shape[1:]}
    sizes.add(second_batch(inputs))
    if graph is not None:
        sizes |= {size for node in graph for shape in _shapes(shape_of(node)) for size in shape}
    primes = (prime for prime in _PRIMES if not any(size % prime == 0 for size in sizes if size))
    return next(primes, None)


def second_batch(inputs: ExampleInputs) -> int:
    """The second batch to capture a model with: that of the example, or 2."""
    return max(inputs.batch_size() or 2, 2)


def hides_batch(graph: Graph) -> bool:
    """Whether a size that does not follow the batch is a multiple of the prime that the graph was captured with."""
    second, prime = graph.second, graph.batch_hint
    assert second is not None
    assert prime is not None
    for node in graph:
        both = zip(_shapes(shape_of(node)), _shapes(second.shapes.get(node.name, shape_of(node))), strict=True)
        if any(a == b and a and a % prime == 0 for shapes in both for a, b in zip(*shapes, strict=True)):
            return True
    return False


def _shapes(shape: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of all tensors of a node, from what `shape_of` gives."""
    if isinstance(shape, tuple):
        if all(isinstance(size, int) for size in shape):
            yield shape
        else:
            for one in shape:
                yield from _shapes(one)


def free_batch(graph: Graph, other: Graph) -> SecondShapes | None:
    """Replace every number in a graph that follows the batch by one that is computed from the input.

    Args:
        graph: the capture at one batch; changed in place if the batch is free.
        other: the capture at another one; only read.

    Returns:
        Which sizes follow the batch; None if the two are not the same network, or a number follows the batch in
        another way than a multiple of it with some more or less. The graph is then as it was.
    """
    try:
        batches = Batches(*(next(_batched_inputs(one)).meta["val"].shape[0] for one in (graph, other)))
        twins = _pairs(graph, other)
        arguments = {
            a: _Pairing(batches, twins).merged((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in twins.items()
        }
        shapes = {a.name: shape_of(b) for a, b in twins.items() if _differ(shape_of(a), shape_of(b))}
    except _DiffersError:
        return None
    sizes = _Sizes(graph.fx_graph, next(_batched_inputs(graph)), batches.first)
    for node, (args, kwargs) in arguments.items():
        node.args, node.kwargs = _written((args, kwargs), sizes)
    return SecondShapes(batches, shapes)


def _batched_inputs(graph: Graph) -> Iterator[fx.Node]:
    for node in graph:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].ndim:
            yield node


# -- walking both ------------------------------------------------------------------------------------------------------


def _pairs(graph: Graph, other: Graph) -> dict[fx.Node, fx.Node]:
    """Each node with the one at its place in the other graph.

    Raises:
        _DiffersError: they are not the same calls, or read other constants.
    """
    if len(graph) != len(other):
        raise _DiffersError
    twins = dict(zip(graph, other, strict=True))
    for a, b in twins.items():
        if a.op != b.op or (a.op != "placeholder" and a.target != b.target):
            raise _DiffersError
        if a.op == "get_attr" and not _is_same(graph.state[a.target].tensor, other.state[b.target].tensor):  # type: ignore[index]
            raise _DiffersError
    return twins


def _is_same(one: Tensor, two: Tensor) -> bool:
    """Whether two captures read the same tensor: the model's own, or equal constants, as far as they have values."""
    if one is two:
        return True
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return one.is_meta or two.is_meta or bool(((one == two) | ((one != one) & (two != two))).all())


def _differ(one: Any, two: Any) -> bool:
    """Whether shapes differ in sizes.

    Raises:
        _DiffersError: they have other numbers of dimensions.
    """
    if [len(shape) for shape in _shapes(one)] != [len(shape) for shape in _shapes(two)]:
        raise _DiffersError
    return bool(one != two)


class _Pairing:
    """Merges the arguments of one call in two captures."""

    def __init__(self, batches: Batches, twins: Mapping[fx.Node, fx.Node]) -> None:
        self._batches = batches
        self._twins = twins

    def merged(self, one: Any, two: Any) -> Any:
        """Arguments with `Follows` in place of the numbers that differ; containers keep their type.

        Raises:
            _DiffersError: they are not the same but for numbers that follow the batch.
        """
        if isinstance(one, fx.Node):
            return self._same(one, self._twins[one] is two)
        if type(one) is not type(two):
            raise _DiffersError
        if isinstance(one, int) and not isinstance(one, bool):
            return one if one == two else self._number(one, two)
        if isinstance(one, list | tuple):
            return type(one)(self._items(one, two))
        if isinstance(one, dict):
            self._same(one, list(one) == list(two))
            return dict(zip(one, self._items(one.values(), two.values()), strict=True))
        if isinstance(one, slice):
            return slice(*self._items((one.start, one.stop, one.step), (two.start, two.stop, two.step)))
        return self._same(one, _are_equal(one, two))

    def _items(self, one: Iterable[Any], two: Iterable[Any]) -> list[Any]:
        left, right = list(one), list(two)
        self._same(left, len(left) == len(right))
        return [self.merged(a, b) for a, b in zip(left, right, strict=True)]

    def _number(self, one: int, two: int) -> Follows:
        found = self._batches.follow(one, two)
        if found is None:
            raise _DiffersError
        return found

    def _same(self, value: Any, is_same: bool) -> Any:
        if not is_same:
            raise _DiffersError
        return value


def _are_equal(one: Any, two: Any) -> bool:
    if isinstance(one, fx.GraphModule):  # a branch or the body of a loop, in which no number may follow the batch
        return str(one.graph) == str(two.graph)
    return bool(one == two) or (isinstance(one, float) and math.isnan(one) and math.isnan(two))


# -- writing -----------------------------------------------------------------------------------------------------------


class _Sizes:
    """Nodes that compute numbers from the batch, made when they are first asked for."""

    def __init__(self, graph: fx.Graph, source: fx.Node, probe: int) -> None:
        self._made: dict[Follows, fx.Node] = {}
        self._graph = graph
        self._source = source
        self._last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        self._probe = probe

    def node(self, number: Follows) -> fx.Node:
        """The node that computes a number."""
        if number not in self._made:
            if number.more:
                node = self._insert(operator.add, (self.node(Follows(number.times, 0)), number.more))
            elif number.times != 1:
                node = self._insert(operator.mul, (self.node(Follows(1, 0)), number.times))
            else:
                node = self._insert(torch.ops.aten.sym_size.int, (self._source, 0))
            node.meta["val"] = number.times * self._probe + number.more
            self._made[number] = node
        return self._made[number]

    def _insert(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        with self._graph.inserting_after(self._last):
            node: fx.Node = self._graph.call_function(target, args)
        self._last = node
        return node


def _written(value: Any, sizes: _Sizes) -> Any:
    """Arguments with nodes in place of the numbers that follow the batch; containers keep their type."""
    if isinstance(value, Follows):
        return sizes.node(value)
    if isinstance(value, list | tuple):
        return type(value)(_written(item, sizes) for item in value)
    if isinstance(value, dict):
        return {key: _written(item, sizes) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_written(item, sizes) for item in (value.start, value.stop, value.step)))
    return value
