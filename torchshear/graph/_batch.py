"""The batch dimension: captured with a size that nothing else in the model has, and then made free.

Sizes in a captured graph are numbers. If the batch is captured as a prime that divides no size of the model, every
number in the graph that it divides stands for so many samples, and is replaced by a product with the size of the
input. That is twice as fast as a capture with symbolic sizes. Whether the graph then computes what the model does on
other batches is found by running both.
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchshear.graph._inputs import ExampleInputs

# Primes of which multiples are rare among the widths and resolutions of real models.
_PRIMES = (59, 61, 71, 79, 83, 53, 47, 43, 41, 37, 31)
_UNBOUNDED = 2**62  # ends of slices that run to the last position are above this


def probe_batches(model: nn.Module, inputs: ExampleInputs) -> list[int]:
    """Batches to capture the model with: primes that divide none of its sizes; none if there is no batch.

    A second one is for the case that the model computes a size inside that is a multiple of the first.
    """
    if not inputs.batch_size():
        return []
    sizes = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    sizes |= {size for tensor in inputs.tensors() for size in tensor.shape[1:]}
    return [prime for prime in _PRIMES if not any(size % prime == 0 for size in sizes if size)][:2]


def free_batch(graph: fx.Graph, probe: int) -> None:
    """Replace every number in a graph that is a multiple of the probed batch by one that follows the input's batch.

    Args:
        graph: a graph captured with a batch of `probe`; changed in place.
        probe: the prime from `probe_batches`.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    sizes = _Sizes(graph, next(n for n in inputs if _is_batched(n)), inputs[-1], probe)
    for node in list(graph.nodes):
        if node.op in ("call_function", "output") and node not in sizes.made.values():
            node.args = _mapped(node.args, sizes)
            node.kwargs = _mapped(node.kwargs, sizes)


def _is_batched(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 0


class _Sizes:
    """Nodes that compute multiples of the batch, made when they are first asked for."""

    def __init__(self, graph: fx.Graph, source: fx.Node, last_input: fx.Node, probe: int) -> None:
        self.probe = probe
        self.made: dict[int, fx.Node] = {}
        self._graph = graph
        self._source = source
        self._last = last_input

    def times(self, count: int) -> fx.Node:
        """The node of `count` times the batch."""
        if count not in self.made:
            if count == 1:
                node = self._insert(torch.ops.aten.sym_size.int, (self._source, 0))
            else:
                node = self._insert(operator.mul, (self.times(1), count))
            node.meta["val"] = count * self.probe
            self.made[count] = node
        return self.made[count]

    def _insert(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        with self._graph.inserting_after(self._last):
            self._last = self._graph.call_function(target, args)
        return self._last


def _mapped(value: Any, sizes: _Sizes) -> Any:
    """Arguments with multiples of the probe replaced; containers keep their type."""
    if isinstance(value, fx.Node | bool):
        return value
    if isinstance(value, int):
        multiple = value != 0 and abs(value) < _UNBOUNDED and value % sizes.probe == 0
        return sizes.times(value // sizes.probe) if multiple else value
    if isinstance(value, list | tuple):
        return type(value)(_items(value, sizes))
    if isinstance(value, dict):
        return {key: _mapped(item, sizes) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*_items((value.start, value.stop, value.step), sizes))
    return value


def _items(values: Iterable[Any], sizes: _Sizes) -> list[Any]:
    return [_mapped(value, sizes) for value in values]
