"""Dimensions of values along which the samples of a batch stand."""

from torchshear.errors import DataError
from torchshear.graph import Graph
from torchshear.graph._nodes import shape_of


def sample_input(graph: Graph) -> tuple[int, int] | None:
    """Return the number of the flat input that has the samples along dimension 0, and their number in the capture.

    It is the first whose size there is free, or else the first that has dimensions.

    Raises:
        DataError: there were none in the capture.
    """
    nodes = [node for node in graph if node.op == "placeholder"]
    batched = [number for number, node in enumerate(nodes) if shape_of(node)]
    free = [number for number in batched if graph.is_dynamic(nodes[number], 0)]
    for number in free or batched:
        size = shape_of(nodes[number])[0]
        if not size:
            raise DataError("the model was captured with inputs that hold no sample; trace it with at least one.")
        return number, size
    return None


def sample_dim(graph: Graph, batch: int, shape: tuple[int, ...], other: int, known: int | None = None) -> int | None:
    """The dimension of a value along which samples stand: the batch itself, or dimension 0 if it is a multiple of it.

    Where the batch of the graph is fixed, a dimension is the batch if it is dimension 0 and of the right size.

    Args:
        graph: the captured model.
        batch: number of samples in the capture; see `sample_input`.
        shape: of the value.
        other: a dimension that it is not.
        known: the dimension that the operator takes for the batch, if it tells; it may be of no sample even so.
    """
    if known is not None:
        return known if shape[known] >= batch and shape[known] % batch == 0 else None
    if graph.batch_hint is not None:
        exact = [dim for dim, size in enumerate(shape) if size == batch and dim != other]
        if exact:
            return exact[0]
    return 0 if other != 0 and shape and shape[0] >= batch and shape[0] % batch == 0 else None
