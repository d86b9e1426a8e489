"""Smaller images for comparisons: convolutions compute the same on few pixels as on many, in less time."""

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear.graph import ExampleInputs, Graph, output_leaves
from torchshear.graph._run import graph_output
from torchshear.graph.capture._check import run_model
from torchshear.graph.model._state import in_mode
from torchshear.speedup.comparing._compare import relative_error, tolerance

_LARGE = 128  # rows and columns from which on an image is cut
_SMALL = 64


def smaller_inputs(graph: Graph, model: nn.Module, example: ExampleInputs | None = None) -> ExampleInputs:
    """The example with images cut to fewer pixels, if the graph takes them and gives then what the model gives.

    It does not where sizes of the images are numbers in the graph, as numbers of patches are in transformers. The
    example is returned as it is then.

    Args:
        graph: the captured model.
        model: the model; it is run, and left as it was.
        example: what to cut; None for the example that the graph was captured with.
    """
    example = graph.inputs if example is None else example
    small = example.map(_cut)
    shapes = [[tensor.shape for tensor in inputs.tensors()] for inputs in (example, small)]
    if graph.parts is not None or shapes[0] == shapes[1]:
        return example
    one = small.with_batch(1) if graph.batch_hint is not None else small
    state = {name: entry.tensor for name, entry in graph.state.items()}
    try:
        with in_mode(model, "eval"), torch.no_grad():
            found = output_leaves(graph_output(graph.fx_graph, state, pytree.tree_leaves((one.args, one.kwargs))))
            expected = output_leaves(run_model(model, one))
    except Exception:  # the code, or a call in the graph, does not take this size, and may say so in any way
        return example
    return small if relative_error(expected, found) <= tolerance(expected) else example


def _cut(tensor: Tensor) -> Tensor:
    is_image = tensor.ndim >= 4 and tensor.is_floating_point() and min(tensor.shape[-2:]) >= _LARGE
    return tensor[..., :_SMALL, :_SMALL].contiguous() if is_image else tensor
