"""Capture of a model in eval or train mode, with a free batch where the model allows; the model is left as it was."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.errors import CaptureError
from torchshear.graph._graph import Graph, is_in_parts, output_nodes
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._nodes import shape_of
from torchshear.graph._outputs import drop_opaque_outputs, without_opaque
from torchshear.graph._run import run_model
from torchshear.graph.capture._backwards import compare_backwards
from torchshear.graph.capture._dynamic_batch import (
    agrees_with_model,
    free_batch,
    hides_batch,
    probe_prime,
    second_batch,
)
from torchshear.graph.capture._export import RefusedBranches, capture_error, export, find_origin, without_stack_traces
from torchshear.graph.capture._part_advice import advise_parts
from torchshear.graph.capture._recording import record_parts
from torchshear.graph.capture._replay import read_state_names, replay
from torchshear.graph.model._checks import check_model
from torchshear.graph.model._process import run_exclusively
from torchshear.graph.model._state import Mode, clear_caches, find_caches, in_mode

# Structure of outputs, with the shapes of those that are tensors.
_Structure = tuple[pytree.TreeSpec, list[tuple[int, ...] | None]]


@run_exclusively()
def trace(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    submodules: Sequence[str] | None = None,
) -> Graph:
    """Capture a model, or some of its modules, in eval mode as a graph of ATen operators.

    The model may live on the meta device, whole or without its buffers (`torchshear.graph.parameters_on_meta`).
    Parameters, buffers, mode, gradients, hooks and the state of the random number generators are left as they were.

    With `submodules`, for models that torch.export cannot take whole: the model is run once, the calls of the named
    modules are recorded, and they alone are captured, with every signature that they are called with. Inputs and
    outputs of each keep their shapes, and so do parameters of theirs that the rest of the model holds or reads as well.

    Args:
        model: the model; called as `model(*args, **kwargs)`.
        args: example positional arguments; a tensor counts as one argument. If all tensors share the size of dimension
            0, that size stays free wherever the model allows.
        kwargs: example keyword arguments.
        submodules: qualified names of modules, none inside another, as `["backbone", "head"]`; None for the whole
            model.

    Returns:
        The captured graph; that of parts holds the operators of all of their calls.

    Raises:
        ArgumentError: `model` is not a module, `args` is not a tensor or a tuple, or a name in `submodules` is unknown,
            is the whole model, lies in another one named, or is never called.
        CaptureError: torch.export cannot capture the model or a part; names the part, the module and the line, and
            modules that can be pruned as parts.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> torchshear.trace(model, torch.randn(1, 4))
        <Graph of Sequential in eval mode: 9 nodes, 4 tensors>
    """
    inputs = ExampleInputs.of(args, kwargs)
    if submodules is not None:
        return _trace_parts(model, inputs, submodules)
    try:
        return trace_inputs(model, inputs)
    except CaptureError as error:
        _, module, _ = find_origin(model, error.__cause__ or error)
        advice = advise_parts(model, inputs, module, _can_export, partial(_trace_parts, model, inputs))
        raise CaptureError(f"{error} {advice}".rstrip()) from error.__cause__


def _trace_parts(model: nn.Module, inputs: ExampleInputs, submodules: Sequence[str]) -> Graph:
    return trace_inputs(*record_parts(model, submodules, inputs))


def _can_export(module: nn.Module, inputs: ExampleInputs) -> bool:
    try:
        with in_mode(module, "eval"):
            export(module, inputs, inputs, "eval", None)
    except Exception:  # whatever it is that forbids capture
        return False
    return True


def trace_inputs(model: nn.Module, inputs: ExampleInputs) -> Graph:
    """Capture a model as `trace` does, with example inputs that are checked already.

    The model is captured in train mode as well if it may read other tensors there or give other outputs.

    Raises:
        ArgumentError: `model` is not an nn.Module.
        CaptureError: torch.export cannot capture the model.
    """
    graph = capture_in_mode(model, inputs, "eval")
    own = {name for name, entry in graph.state.items() if entry.tensor.ndim and is_in_parts(name, graph.parts)}
    unread = own - _names_read(graph)
    has_other_outputs = outputs_differ_in_training(graph, model)
    if not has_other_outputs and not (unread and _may_read_in_training(model, inputs, unread)):
        return graph
    try:
        training = capture_in_mode(model, inputs, "train", graph)
    except CaptureError:
        try:  # without the branches that are taken at random
            with RefusedBranches():
                training = replace(capture_in_mode(model, inputs, "train"), has_assumed_branches=True)
        except CaptureError:
            return graph  # tensors that only training reads stay whole, and the report lists them as unread
    if not has_other_outputs and not unread & _names_read(training):
        return graph
    state = types.MappingProxyType({**training.state, **graph.state})  # each graph has constants of its own
    return replace(graph, training=training, state=state)


def _names_read(graph: Graph) -> set[str]:
    """Return the names of the parameters, buffers and constants that a graph reads."""
    return {str(node.target) for node in graph if node.op == "get_attr"}


def _may_read_in_training(model: nn.Module, inputs: ExampleInputs, names: set[str]) -> bool:
    """Return whether a run or a capture in train mode reads one of some parameters and buffers; True if both fail."""
    given = inputs.without_values(second_batch(inputs)) if inputs.batch_size() else inputs.copy()
    try:
        with in_mode(model, "train"), drop_opaque_outputs(model), without_stack_traces():
            clear_caches(model, find_caches(model, inputs))
            read = read_state_names(model, given)
            if read is None:
                read = _names_read(export(model, given, inputs, "train", None))
    except Exception:  # as where branches are taken at random
        return True
    return bool(names & read)


def capture_in_mode(model: nn.Module, inputs: ExampleInputs, mode: Mode, other: Graph | None = None) -> Graph:
    """Capture a model in the given mode; `trace` is the public form for eval mode.

    Args:
        model: the model.
        inputs: its example inputs.
        mode: the mode.
        other: the same model captured in the other mode, which makes this one cheap where both call the same operators.

    Raises:
        ArgumentError: `model` is not an nn.Module.
        CaptureError: torch.export cannot capture the model.
    """
    check_model(model)
    caches = find_caches(model, inputs)
    with in_mode(model, mode), drop_opaque_outputs(model) as dropped:
        clear_caches(model, caches)
        graph = _capture_with_free_batch(model, inputs, mode, other)
        if graph is None:
            try:  # with a copy, since torch.export would take one tensor that is given twice for one input
                graph = export(model, inputs.copy(), inputs, mode, None)
            except Exception as error:
                raise capture_error(model, error) from error
        if graph.functions:
            graph = compare_backwards(graph)
    if dropped and not any(node.all_input_nodes for node in graph if node.op == "output"):
        raise CaptureError(
            f"{type(model).__name__} returns no tensor that torch can see: {', '.join(dropped)}. Expected tensors, or "
            f"tuples, lists, dicts or dataclasses of them; register other containers with torch.utils._pytree."
        )
    return replace(graph, omitted_outputs=tuple(dropped))


def _capture_with_free_batch(
    model: nn.Module, inputs: ExampleInputs, mode: Mode, in_other_mode: Graph | None
) -> Graph | None:
    """Return a graph that takes any batch and computes what the model does, or None if there is no such graph."""
    prime = probe_prime(model, inputs)
    if prime is None:
        return None
    try:
        # The first capture is a replay of the one in the other mode, unless batch norms count their batches, which
        # they do in train mode alone.
        norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        first: Graph | None = None
        if in_other_mode is not None and not any(norm.track_running_stats and norm.training for norm in norms):
            first = replay(in_other_mode, model, inputs.without_values(prime))
        if first is not None:
            first = replace(first, mode=mode, batch_hint=prime, dynamic_shapes=None, training=None)
        else:
            first = export(model, inputs.without_values(prime), inputs, mode, prime)
        # The second is a replay of the first, at another batch.
        given = inputs.without_values(second_batch(inputs))
        second = replay(first, model, given)
        if second is None:
            with without_stack_traces():
                second = export(model, given, inputs, mode, None)
        dynamic = free_batch(first, second)
        graph = None if dynamic is None else replace(first, dynamic_shapes=dynamic)
        # Sizes inside the graph may be multiples of the prime, too: it is captured once more at another one.
        prime = probe_prime(model, inputs, second)
        if graph is not None and hides_batch(graph) and prime is not None:
            first = export(model, inputs.without_values(prime), inputs, mode, prime)
            dynamic = free_batch(first, second)
            graph = None if dynamic is None else replace(first, dynamic_shapes=dynamic)
    except Exception:  # any failure here only means that another batch does not suit the model
        return None
    return graph if graph is not None and agrees_with_model(graph, model) else None


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
            leaves, spec = pytree.tree_flatten(without_opaque(run_model(model, inputs)))
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
