"""torch.export as the one front end: capture a model in eval or train mode and leave it exactly as it was."""

import traceback
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError, CaptureError, first_line
from torchshear.graph._batch import free_batch, probe_batches
from torchshear.graph._check import agrees
from torchshear.graph._contract import plain_outputs
from torchshear.graph._graph import Graph, Mode, StateTensor
from torchshear.graph._inline import clean_copy
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._meta import buffers_on_meta, is_on_meta
from torchshear.graph._mode import in_mode

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


def trace(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Graph:
    """Capture a model in eval mode as a graph of ATen operators.

    The model may live on the meta device, whole or without its buffers (`torchshear.graph.parameters_on_meta`).
    Parameters, buffers, mode, gradients, hooks and the state of the random number generators are left as they were.

    Args:
        model: the model; called as `model(*args, **kwargs)`.
        args: example positional arguments. If all tensors share the size of dimension 0, that size stays free
            wherever the model allows.
        kwargs: example keyword arguments.

    Returns:
        The captured graph.

    Raises:
        ArgumentError: `model` is not a module, or the arguments are not a tuple and a mapping.
        CaptureError: torch.export cannot capture the model; names the module and the line.
    """
    return trace_inputs(model, ExampleInputs.of(args, kwargs))


def trace_inputs(model: nn.Module, inputs: ExampleInputs) -> Graph:
    """As `trace`, with arguments that are wrapped already.

    Raises:
        ArgumentError: `model` is not an nn.Module.
        CaptureError: torch.export cannot capture the model.
    """
    graph = capture(model, inputs, "eval")
    read = {str(node.target) for node in graph if node.op == "get_attr"}
    if all(name in read for name, entry in graph.state.items() if entry.tensor.ndim):
        return graph
    try:
        training = capture(model, inputs, "train")
    except CaptureError:  # what only training reads then stays whole, which the report lists as unread
        return graph
    also = {str(node.target) for node in training if node.op == "get_attr"} - read
    reads_more = any(name in graph.state and graph.state[name].tensor.ndim for name in also)
    return replace(graph, training=training) if reads_more else graph


def capture(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> Graph:
    """Capture a model in the given mode; `trace` is the public form for eval mode.

    Raises:
        ArgumentError: `model` is not an nn.Module.
        CaptureError: torch.export cannot capture the model.
    """
    _check_model(model)
    with in_mode(model, mode), plain_outputs(model) as dropped:
        graph = _free_batch_graph(model, inputs, mode) or _static_graph(model, inputs, mode)
    if dropped and not any(node.all_input_nodes for node in graph if node.op == "output"):
        raise CaptureError(
            f"{type(model).__name__} returns no tensor that torch can see: {', '.join(dropped)}. Expected tensors, or "
            f"tuples, lists, dicts or dataclasses of them; register other containers with torch.utils._pytree."
        )
    return replace(graph, left_out=tuple(dropped))


# Modules that run another one, by where it is inside them.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def _check_model(model: nn.Module) -> None:
    """Refuse what is not a module, or runs another module in a way that a graph does not hold.

    Raises:
        ArgumentError: says what to give instead.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is {type(model).__name__}; expected a torch.nn.Module instance.")
    inner = _WRAPPERS.get(type(model).__name__) if type(model).__module__.startswith("torch.") else None
    if inner is not None:
        raise ArgumentError(
            f"model is a {type(model).__name__} around a {type(getattr(model, inner)).__name__}; expected the module "
            f"itself. Give model.{inner}, and wrap the pruned model again."
        )


def _free_batch_graph(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> Graph | None:
    """A graph that takes any batch and is the model, or None if there is no such graph."""
    for probe in probe_batches(model, inputs):
        try:
            graph = _to_graph(_export(model, inputs.unfilled(probe)), model, inputs, mode, probe)
        except Exception:  # any failure here only means that another batch does not suit the model
            return None
        free_batch(graph.fx_graph, probe)
        if agrees(graph, model):
            return graph
    return None


def _static_graph(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> Graph:
    """A graph of the sizes as given."""
    own = inputs.copy()  # torch.export would take one tensor that is given twice for one input
    try:
        program = _export(model, own)
    except Exception as error:
        raise _capture_error(model, error) from error
    return _to_graph(program, model, inputs, mode, None)


def _export(model: nn.Module, inputs: ExampleInputs) -> ExportedProgram:
    """Run torch.export; the Python code of the graphs that it makes on its way is not needed, and not compiled."""
    with _use_lazy_graph_module(True):
        if not is_on_meta(model):
            return torch.export.export(model, inputs.args, inputs.kwargs, strict=False)
        inputs = inputs.map(lambda tensor: tensor.to("meta"))
        with buffers_on_meta(model):
            return torch.export.export(model, inputs.args, inputs.kwargs, strict=False)


def _to_graph(
    program: ExportedProgram,
    model: nn.Module,
    inputs: ExampleInputs,
    mode: Mode,
    batch_hint: int | None,
) -> Graph:
    aliases, state = _model_state(model)
    fx_graph = clean_copy(program, aliases)
    for node in fx_graph.nodes:
        if node.op == "get_attr" and node.target not in state:
            state[node.target] = StateTensor(node.target, "constant", program.constants[node.target].detach(), False)
    return Graph(
        fx_graph=fx_graph,
        state=types.MappingProxyType(state),
        aliases=types.MappingProxyType(aliases),
        inputs=inputs,
        in_spec=pytree.tree_structure((inputs.args, inputs.kwargs)),
        out_spec=program.call_spec.out_spec,
        model_type=f"{type(model).__module__}.{type(model).__qualname__}",
        mode=mode,
        batch_hint=batch_hint,
    )


def _model_state(model: nn.Module) -> tuple[dict[str, str], dict[str, StateTensor]]:
    """Every name of every parameter and buffer, and the tensors by their first name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    state: dict[str, StateTensor] = {}
    unsaved = _unsaved(model)
    for kind, named in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            canonical = first.setdefault(id(tensor), name)
            aliases[name] = canonical
            is_saved = name not in unsaved or (canonical != name and state[canonical].is_saved)
            state[canonical] = StateTensor(canonical, kind, tensor, is_saved)  # type: ignore[arg-type]
    return aliases, state


def _unsaved(model: nn.Module) -> set[str]:
    """Names of buffers that a `state_dict` leaves out."""
    modules = model.named_modules(remove_duplicate=False)
    return {
        f"{path}.{name}" if path else name for path, module in modules for name in module._non_persistent_buffers_set
    }


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """Name the module and the user's line in which capture failed, and torch's first words on it."""
    names = {id(module): name for name, module in model.named_modules()}
    module, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in names:
            module = names[id(owner)] or type(model).__name__
        path = frame.f_code.co_filename
        if not path.startswith((_TORCH, _HERE)) and "<" not in path:
            line = f"{path}:{number} in {frame.f_code.co_name}"
    where = f"module {module!r}" if module else f"{type(model).__name__}"
    return CaptureError(
        f"torch.export cannot capture {type(model).__name__}: {type(error).__name__}: {first_line(error)} "
        f"Where: {where}{', ' + line if line else ''}. Expected a forward that runs on the example inputs without "
        f"data-dependent Python; check args and kwargs first, then rewrite that line or prune a sub-module."
    )
