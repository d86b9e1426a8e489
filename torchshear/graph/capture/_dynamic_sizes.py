"""Dimensions of the inputs, other than the batch, on whose sizes a captured graph does not depend."""

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor, nn

from torchshear.graph._graph import Graph
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._outputs import drop_opaque_outputs
from torchshear.graph.capture._replay import can_run_without_values, replay
from torchshear.graph.model._process import silence_torch
from torchshear.graph.model._state import clear_caches, find_caches, in_mode

Place = tuple[int, int]  # number of a tensor among the inputs, and a dimension of it


def dynamic_dimensions(model: nn.Module, graphs: Sequence[Graph]) -> frozenset[Place]:
    """Find the dimensions of the inputs that may have other sizes than in the example.

    The model is run without values at twice the size and at one more. Where it runs, both runs must make the calls of a
    run at the size of the example, with the same arguments: a size that is a number in the graph, or that the model's
    Python reads, gives others. A size that several inputs share is also tried in all of them at once.

    Args:
        model: the model that was captured.
        graphs: its graphs, one for each mode.
    """
    tensors = graphs[0].inputs.tensors()
    places = [(n, dim) for n, tensor in enumerate(tensors) for dim in range(1, tensor.ndim) if tensor.shape[dim] > 1]
    found = {place for place in places if all(_can_resize(model, graph, {place}) for graph in graphs)}
    by_size: dict[int, set[Place]] = defaultdict(set)
    for place in set(places) - found:
        by_size[tensors[place[0]].shape[place[1]]].add(place)
    for shared in by_size.values():
        if len({number for number, _ in shared}) > 1 and all(_can_resize(model, graph, shared) for graph in graphs):
            found |= shared
    return frozenset(found)


def _can_resize(model: nn.Module, graph: Graph, places: set[Place]) -> bool:
    """Return whether the graph stays the same where some dimensions of the inputs have another size."""
    with silence_torch(), in_mode(model, graph.mode), drop_opaque_outputs(model):
        clear_caches(model, find_caches(model, graph.inputs))
        expected = replay(graph, model, graph.inputs)
        if expected is None:
            return False
        others = (_resize(graph.inputs, places, 2, 0), _resize(graph.inputs, places, 1, 1))
        found = [replay(graph, model, other) for other in others if can_run_without_values(model, other)]
    calls = [(node.target, node.args, node.kwargs) for node in expected]
    return bool(found) and all(
        one is not None and str([(node.target, node.args, node.kwargs) for node in one]) == str(calls) for one in found
    )


def _resize(inputs: ExampleInputs, places: set[Place], times: int, plus: int) -> ExampleInputs:
    """Return inputs without values in which the sizes of some dimensions are `times * size + plus`."""
    numbers = iter(range(len(inputs.tensors())))

    def resize(tensor: Tensor) -> Tensor:
        number = next(numbers)
        shape = [size * times + plus if (number, dim) in places else size for dim, size in enumerate(tensor.shape)]
        return tensor.new_empty(shape)

    return inputs.map(resize)
