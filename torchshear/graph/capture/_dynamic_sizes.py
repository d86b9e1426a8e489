"""Dimensions of the inputs, other than the batch, on whose sizes a captured graph does not depend."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor, fx, nn

from torchshear.graph._contract import drop_opaque_outputs
from torchshear.graph._graph import Graph
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph.capture._replay import can_run_without_values, second_capture
from torchshear.graph.model._caches import clear_caches, find_caches
from torchshear.graph.model._process import silence_torch
from torchshear.graph.model._state import in_mode

Place = tuple[int, int]  # number of a tensor among the inputs, and a dimension of it


def dynamic_dimensions(model: nn.Module, graphs: Sequence[Graph]) -> frozenset[Place]:
    """Find dimensions that may have other sizes than in the example.

    The model is run without values at twice the size and at one more. Where it runs, the calls of both runs and their
    arguments must be those of a run at the size of the example: a size that is a number in the graph, or that the
    model's Python asks for, makes others. A size that several inputs share is tried in all of them at once as well.

    Args:
        model: the model that was captured.
        graphs: its graphs, one for each mode.
    """
    inputs = graphs[0].inputs
    tensors = inputs.tensors()
    places = [(n, dim) for n, tensor in enumerate(tensors) for dim in range(1, tensor.ndim) if tensor.shape[dim] > 1]
    free = {place for place in places if all(_is_free(model, graph, {place}) for graph in graphs)}
    shared: dict[int, set[Place]] = defaultdict(set)
    for place in set(places) - free:
        shared[tensors[place[0]].shape[place[1]]].add(place)
    for some in shared.values():
        if len({number for number, _ in some}) > 1 and all(_is_free(model, graph, some) for graph in graphs):
            free |= some
    return frozenset(free)


def _is_free(model: nn.Module, graph: Graph, places: set[Place]) -> bool:
    """Whether some dimensions of inputs may have another size."""
    with silence_torch(), in_mode(model, graph.mode), drop_opaque_outputs(model):
        clear_caches(model, find_caches(model, graph.inputs))
        expected = second_capture(graph, model, graph.inputs)
        if expected is None:
            return False
        found = [
            second_capture(graph, model, other)
            for other in _resized(graph.inputs, places)
            if can_run_without_values(model, other)
        ]
        return bool(found) and all(one is not None and _are_equal(expected.fx_graph, one.fx_graph) for one in found)


def _resized(inputs: ExampleInputs, places: set[Place]) -> Iterator[ExampleInputs]:
    """The example with some dimensions twice as large, and larger by one."""
    for times, more in ((2, 0), (1, 1)):
        numbers = iter(range(len(inputs.tensors())))

        def resized(tensor: Tensor, times: int = times, more: int = more, numbers: Iterator[int] = numbers) -> Tensor:
            number = next(numbers)
            shape = [size * times + more if (number, dim) in places else size for dim, size in enumerate(tensor.shape)]
            return tensor.new_empty(shape)

        yield inputs.map(resized)


def _are_equal(one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs of the same nodes have the same arguments."""
    for a, b in zip(one.nodes, other.nodes, strict=True):
        if str((a.target, a.args, a.kwargs)) != str((b.target, b.args, b.kwargs)):
            return False
    return True
