"""Running a model, to see whether it runs and whether a captured graph computes the same."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchshear.errors import first_line
from torchshear.graph._contract import flat_output, output_leaves
from torchshear.graph._graph import Graph, shape_of
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._operator import operator_of
from torchshear.graph._outputs import output_nodes
from torchshear.graph._run import graph_output
from torchshear.graph.model._state import Mode, in_mode, preserve_state
from torchshear.graph.numerics._float64 import compute_in, to_float64
from torchshear.graph.numerics._ties import TieBreaker


def agrees(graph: Graph, model: nn.Module) -> bool:
    """Whether a graph computes what the model does, on another batch than those that it was captured at.

    It may not if the model's Python looks at the batch size. A model on the meta device is believed.

    Args:
        graph: the captured model, with a free batch.
        model: the model, in the graph's mode.
    """
    if any(tensor.is_meta for tensor in [*graph.inputs.tensors(), *(entry.tensor for entry in graph.state.values())]):
        return True
    for size in _third_batches(graph):
        inputs = graph.inputs.with_batch(size)
        try:
            expected = _seeded(lambda inputs=inputs: run_model(model, inputs))  # type: ignore[misc]
        except Exception:  # the model's own code may not take this batch
            continue
        try:
            return _agrees_on(graph, model, inputs, expected)
        except Exception:  # nor may a call in the graph, which then is not the model
            return False
    return False


def _third_batches(graph: Graph) -> tuple[int, ...]:
    """A batch of one if the model takes that; of two if not, or if the graph was captured at odd batches only."""
    second = graph.second.batches.second if graph.second is not None else 1
    # Batch norms over one value a channel cannot be trained.
    norms = (operator_of(node).norm for node in graph)
    takes_one = graph.mode == "eval" or not any(norm is not None and norm.over == "batch" for norm in norms)
    return (1, 2) if takes_one and second % 2 == 0 else (2,)


def _agrees_on(graph: Graph, model: nn.Module, inputs: ExampleInputs, expected: Any) -> bool:
    """Compare outputs up to their last digits; where they are not the same, in float64 or as far as the dtype tells.

    Fused kernels, which a capture takes apart, round in another way than their parts. What is drawn at random, as a
    dropout mask is, is drawn alike, and what is chosen among equal values is chosen alike.
    """
    wanted, found = output_leaves(expected), output_leaves(_seeded(lambda: run_graph(graph, inputs)))
    if _are_close(wanted, found, _last_digits(wanted)):
        return True
    choices = TieBreaker()
    for dtype in (torch.float64, None):
        given = to_float64(inputs) if dtype is not None else inputs
        try:
            with compute_in(dtype or torch.float32), choices.record():
                wanted = output_leaves(_seeded(lambda given=given: run_model(model, given)))  # type: ignore[misc]
        except Exception:  # a kernel, or a check in the model's code, may refuse float64
            continue
        tolerance = _tolerance(wanted)
        with compute_in(dtype or torch.float32), choices.replay(tolerance):
            found = output_leaves(_seeded(lambda given=given: run_graph(graph, given)))  # type: ignore[misc]
        return _are_close(wanted, found, tolerance)
    return False


def _seeded(run: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return run()


def run_graph(graph: Graph, inputs: ExampleInputs) -> Any:
    """The graph's outputs on some inputs, with the tensors of the model."""
    own = inputs.copy()
    state = {name: entry.tensor for name, entry in graph.state.items()}
    with torch.no_grad():
        return graph_output(graph.fx_graph, state, pytree.tree_leaves((own.args, own.kwargs)))


def run_failure(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> str | None:
    """What a model raises when it is run in a mode, in a line, or None if it runs; it is left as it was."""
    with in_mode(model, mode):
        try:
            run_model(model, inputs)
        except Exception as error:  # a forward may raise anything
            return f"{type(error).__name__}: {first_line(error)[:160]}"
    return None


def differs_in_training(graph: Graph, model: nn.Module) -> bool:
    """Whether outputs have another structure or other shapes in train mode than in a graph captured in eval mode.

    Args:
        graph: the model in eval mode.
        model: the model.
    """
    batch = 1 if graph.second is not None else graph.inputs.batch_size()
    inputs = graph.inputs.with_batch(1) if batch == 1 else graph.inputs
    trained = _structure(model, inputs, "train")
    expected = _captured_structure(graph, batch or 1) or _structure(model, inputs, "eval")
    if trained is None and batch == 1:  # batch norms need two values a channel
        two = graph.inputs.with_batch(2)
        trained, expected = (_structure(model, two, mode) for mode in ("train", "eval"))
    return None not in (trained, expected) and trained != expected


_Structure = tuple[
    pytree.TreeSpec, list[tuple[int, ...] | None]
]  # of outputs, with the shapes of those that are tensors


def _structure(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> _Structure | None:
    """Structure and shapes of the model's outputs in a mode; None if it does not run."""
    with in_mode(model, mode):
        try:
            leaves, spec = flat_output(run_model(model, inputs))
        except Exception:  # the model's own code may not run in this mode
            return None
    return spec, [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]


def _captured_structure(graph: Graph, batch: int) -> _Structure | None:
    """Structure and shapes of the captured outputs at a batch; None if a size follows it in no simple way."""
    shapes: list[tuple[int, ...] | None] = []
    for _, node in output_nodes(graph):
        shape = shape_of(node) if isinstance(node, fx.Node) else None
        if shape is not None and graph.second is not None:
            follows = [graph.batch_formula(node, dim) for dim in range(len(shape))]
            if any(one is None and graph.is_dynamic(node, dim) for dim, one in enumerate(follows)):
                return None
            shape = tuple(one.at(batch) if one is not None else size for one, size in zip(follows, shape, strict=True))
        shapes.append(shape)
    return graph.out_spec, shapes


def run_model(model: nn.Module, inputs: ExampleInputs) -> Any:
    """The model's outputs; its state is put back."""
    own = inputs.copy()
    with torch.no_grad(), preserve_state(model):
        return model(*own.args, **own.kwargs)


def _last_digits(outputs: list[Any]) -> float:
    """How far apart the order of a few sums puts equal computations, by the finest dtype of the outputs."""
    dtypes = {value.dtype for value in outputs if isinstance(value, torch.Tensor)}
    return 16 * min((torch.finfo(d).eps for d in dtypes if d.is_floating_point or d.is_complex), default=0.0)


def _tolerance(outputs: list[Any]) -> float:
    """How far equal computations may be apart: half of the digits of the coarsest dtype, 1e-9 in float64."""
    dtypes = {value.dtype for value in outputs if isinstance(value, torch.Tensor)}
    eps = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    return float(max((eps**0.5 for eps in eps if eps > 1e-12), default=1e-9))


def _are_close(expected: list[Any], actual: list[Any], tolerance: float) -> bool:
    """Whether outputs are equal one by one, up to a tolerance relative to each value and to the ordinary ones."""
    if len(expected) != len(actual):
        return False
    for a, b in zip(expected, actual, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.shape != b.shape or not _is_close(a, b, tolerance):
                return False
        elif isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return False
    return True


def _is_close(expected: torch.Tensor, actual: torch.Tensor, tolerance: float) -> bool:
    """Compare one output. Its ordinary size is the lower quartile of what is not zero, which no filler sets."""
    if torch.equal(expected, actual):
        return True
    one, two = (value.to(torch.complex128 if value.is_complex() else torch.float64) for value in (expected, actual))
    same = (one == two) | (one.isnan() & two.isnan())
    if not tolerance or (not expected.is_floating_point() and not expected.is_complex()):
        return bool(same.all())
    sizes = one.abs()
    ordinary = sizes[(sizes > 0) & sizes.isfinite()]
    scale = ordinary.kthvalue(max(1, ordinary.numel() // 4)).values if ordinary.numel() else sizes.new_ones(())
    return bool((same | ((one - two).abs() <= tolerance * (sizes + scale)) & sizes.isfinite()).all())
