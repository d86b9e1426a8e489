"""Running a model, to see whether it runs and whether a captured graph computes the same."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.errors import first_line
from torchshear.graph._graph import Graph, output_nodes
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._nodes import shape_of
from torchshear.graph._operator_record import operator_of
from torchshear.graph._outputs import flatten_output, output_leaves
from torchshear.graph._run import graph_output
from torchshear.graph.model._state import Mode, in_mode, preserve_state
from torchshear.graph.numerics._float64 import compute_in, to_float64
from torchshear.graph.numerics._ties import TieBreaker

# Structure of outputs, with the shapes of those that are tensors.
_Structure = tuple[pytree.TreeSpec, list[tuple[int, ...] | None]]


def run_model(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Return the outputs of a model without gradients; its state is put back."""
    own = inputs.copy()
    with torch.no_grad(), preserve_state(model):
        return model(*own.args, **own.kwargs)


def run_graph(graph: Graph, inputs: ExampleInputs) -> Any:
    """Return the outputs of a graph without gradients, computed with the tensors of the model."""
    own = inputs.copy()
    state = {name: entry.tensor for name, entry in graph.state.items()}
    with torch.no_grad():
        return graph_output(graph.fx_graph, state, pytree.tree_leaves((own.args, own.kwargs)))


def run_failure(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> str | None:
    """Return the error that a run of a model in a mode raises, in a line; None if it runs. The model is restored."""
    with in_mode(model, mode):
        try:
            run_model(model, inputs)
        except Exception as error:  # a forward may raise anything
            return f"{type(error).__name__}: {first_line(error)[:160]}"
    return None


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


def outputs_differ_in_training(graph: Graph, model: nn.Module) -> bool:
    """Return whether a model's outputs have another structure or other shapes in train mode than in its eval graph.

    Args:
        graph: the model captured in eval mode.
        model: the model.
    """
    batch = 1 if graph.dynamic_shapes is not None else graph.inputs.batch_size()
    inputs = graph.inputs.with_batch(1) if batch == 1 else graph.inputs
    trained = _structure(model, inputs, "train")
    expected = _captured_structure(graph, batch or 1) or _structure(model, inputs, "eval")
    if trained is None and batch == 1:  # batch norms need two values a channel
        two = graph.inputs.with_batch(2)
        trained, expected = (_structure(model, two, mode) for mode in ("train", "eval"))
    return None not in (trained, expected) and trained != expected


def _structure(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> _Structure | None:
    """Return structure and shapes of the model's outputs in a mode; None if it does not run."""
    with in_mode(model, mode):
        try:
            leaves, spec = flatten_output(run_model(model, inputs))
        except Exception:  # the model's own code may not run in this mode
            return None
    return spec, [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]


def _captured_structure(graph: Graph, batch: int) -> _Structure | None:
    """Return structure and shapes of the captured outputs at a batch; None if a size is no simple function of it."""
    shapes: list[tuple[int, ...] | None] = []
    for _, node in output_nodes(graph):
        shape = shape_of(node) if isinstance(node, fx.Node) else None
        if shape is not None and graph.dynamic_shapes is not None:
            formulas = [graph.batch_formula(node, dim) for dim in range(len(shape))]
            if any(formula is None and graph.is_dynamic(node, dim) for dim, formula in enumerate(formulas)):
                return None
            shape = tuple(f.at(batch) if f is not None else size for f, size in zip(formulas, shape, strict=True))
        shapes.append(shape)
    return graph.out_spec, shapes
