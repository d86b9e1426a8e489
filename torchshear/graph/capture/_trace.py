"""torch.export as the one front end: capture a model in eval or train mode and leave it exactly as it was."""

import os
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization.observer import ObserverBase
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from torchshear.errors import CaptureError, first_line
from torchshear.graph._contract import drop_opaque_outputs
from torchshear.graph._graph import Graph, StateTensor
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._parts import PartRun, is_in_parts, model_parts, whole_model
from torchshear.graph.capture._backwards import with_own_backwards
from torchshear.graph.capture._branches import MaskedAssignments, RefusedBranches
from torchshear.graph.capture._check import agrees, differs_in_training
from torchshear.graph.capture._clean_copy import clean_copy
from torchshear.graph.capture._dynamic_batch import free_batch, hides_batch, probe_prime, second_batch
from torchshear.graph.capture._functions import SeenCall, function_calls, watched_functions
from torchshear.graph.capture._mask_sizes import resolve_mask_sizes
from torchshear.graph.capture._part_advice import advise_parts
from torchshear.graph.capture._recording import record_parts
from torchshear.graph.capture._replay import names_read, second_capture
from torchshear.graph.model._caches import clear_caches, find_caches
from torchshear.graph.model._checks import check_model
from torchshear.graph.model._meta import buffers_on_meta, is_on_meta
from torchshear.graph.model._process import run_exclusively
from torchshear.graph.model._state import Mode, in_mode, preserve_state

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"  # with the separator, or torchvision would be taken for torch
_HERE = f"{Path(__file__).parents[1]}{os.sep}"


@run_exclusively()
def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
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
        args: example positional arguments. If all tensors share the size of dimension 0, that size stays free
            wherever the model allows.
        kwargs: example keyword arguments.
        submodules: qualified names of modules, none inside another, as `["backbone", "head"]`; None for the whole
            model.

    Returns:
        The captured graph; that of parts holds the operators of all of their calls.

    Raises:
        ArgumentError: `model` is not a module, the arguments are not a tuple and a mapping, or a name in `submodules`
            is unknown, is the whole model, lies in another one named, or is never called.
        CaptureError: torch.export cannot capture the model or a part; names the part, the module and the line, and
            modules that can be pruned as parts.
    """
    inputs = ExampleInputs.of(args, kwargs)
    if submodules is not None:
        return _trace_parts(model, inputs, submodules)
    try:
        return trace_inputs(model, inputs)
    except CaptureError as error:
        _, module, _ = _origin_of(model, error.__cause__ or error)
        parts = partial(_trace_parts, model, inputs)
        advice = advise_parts(model, inputs, module, _can_export, parts)
        raise CaptureError(f"{error} {advice}".rstrip()) from error.__cause__


def _trace_parts(model: nn.Module, inputs: ExampleInputs, submodules: Sequence[str]) -> Graph:
    return trace_inputs(*record_parts(model, submodules, inputs))


def _can_export(module: nn.Module, inputs: ExampleInputs) -> bool:
    try:
        with in_mode(module, "eval"):
            _export(module, inputs)
    except Exception:  # whatever it is that forbids capture
        return False
    return True


def trace_inputs(model: nn.Module, inputs: ExampleInputs) -> Graph:
    """As `trace`, with arguments that are wrapped already.

    Raises:
        ArgumentError: `model` is not an nn.Module.
        CaptureError: torch.export cannot capture the model.
    """
    graph = capture_in_mode(model, inputs, "eval")
    own = {name for name, entry in graph.state.items() if entry.tensor.ndim and is_in_parts(name, graph.parts)}
    other_outputs = differs_in_training(graph, model)
    unread = own - _reads(graph)
    if not other_outputs and not (unread and _may_read_in_training(model, inputs, unread)):
        return graph
    training = _training_graph(model, inputs, graph)
    if training is None:  # what only training reads then stays whole, which the report lists as unread
        return graph
    if not other_outputs and not unread & _reads(training):
        return graph
    state = types.MappingProxyType({**training.state, **graph.state})  # the graphs have constants of their own
    return replace(graph, training=training, state=state)


def _may_read_in_training(model: nn.Module, inputs: ExampleInputs, names: set[str]) -> bool:
    """Whether any of some parameters and buffers is read in train mode, as one run or capture tells."""
    given = inputs.without_values(second_batch(inputs)) if inputs.batch_size() else inputs.copy()
    try:
        with in_mode(model, "train"), drop_opaque_outputs(model), _without_traces():
            clear_caches(model, find_caches(model, inputs))
            read = names_read(model, given)
            if read is None:
                read = _reads(_to_graph(*_export(model, given), model, inputs, "train", None))
    except Exception:  # it cannot be captured without more ado, as where branches are drawn at random
        return True
    return bool(names & read)


def _training_graph(model: nn.Module, inputs: ExampleInputs, graph: Graph) -> Graph | None:
    """The model captured in train mode; with branches drawn at random left out where it cannot be otherwise."""
    try:
        return capture_in_mode(model, inputs, "train", graph)
    except CaptureError:
        try:
            with RefusedBranches():
                return replace(capture_in_mode(model, inputs, "train"), has_assumed_branches=True)
        except CaptureError:
            return None


def _reads(graph: Graph) -> set[str]:
    """Names of the parameters, buffers and constants that a graph reads."""
    return {str(node.target) for node in graph if node.op == "get_attr"}


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
        graph = _free_batch_graph(model, inputs, mode, other) or _static_graph(model, inputs, mode)
        graph = with_own_backwards(graph)
    if dropped and not any(node.all_input_nodes for node in graph if node.op == "output"):
        raise CaptureError(
            f"{type(model).__name__} returns no tensor that torch can see: {', '.join(dropped)}. Expected tensors, or "
            f"tuples, lists, dicts or dataclasses of them; register other containers with torch.utils._pytree."
        )
    return replace(graph, omitted_outputs=tuple(dropped))


def _free_batch_graph(model: nn.Module, inputs: ExampleInputs, mode: Mode, in_other_mode: Graph | None) -> Graph | None:
    """A graph that takes any batch and is the model, or None if there is no such graph."""
    prime = probe_prime(model, inputs)
    if prime is None:
        return None
    try:
        first = _at_first_batch(model, inputs, mode, prime, in_other_mode)
        other = _at_second_batch(first, model, inputs)
        graph = _freed(first, other)
        prime = probe_prime(model, inputs, other)
        if graph is not None and hides_batch(graph) and prime is not None:
            first = _to_graph(*_export(model, inputs.without_values(prime)), model, inputs, mode, prime)
            graph = _freed(first, other)
    except Exception:  # any failure here only means that another batch does not suit the model
        return None
    return graph if graph is not None and agrees(graph, model) else None


def _at_first_batch(model: nn.Module, inputs: ExampleInputs, mode: Mode, prime: int, other: Graph | None) -> Graph:
    """The capture at the first batch, from torch.export, or from a run that is held against that in the other mode."""
    given = inputs.without_values(prime)
    found = second_capture(other, model, given) if other is not None and not _counts_batches(model) else None
    if found is None:
        return _to_graph(*_export(model, given), model, inputs, mode, prime)
    return replace(found, mode=mode, batch_hint=prime, second=None, training=None)


def _counts_batches(model: nn.Module) -> bool:
    """Whether batch norms count their batches, which they do in train mode alone."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return any(norm.track_running_stats and norm.training for norm in norms)


def _at_second_batch(first: Graph, model: nn.Module, inputs: ExampleInputs) -> Graph:
    """The capture at another batch, from a run that is held against the first or from torch.export."""
    given = inputs.without_values(second_batch(inputs))
    found = second_capture(first, model, given)
    if found is not None:
        return found
    with _without_traces():
        return _to_graph(*_export(model, given), model, inputs, first.mode, None)


def _freed(graph: Graph, other: Graph) -> Graph | None:
    """A graph with a free batch, from captures at two batches; None if they are not of one network."""
    second = free_batch(graph, other)
    return None if second is None else replace(graph, second=second)


@contextmanager
def _without_traces() -> Iterator[None]:
    """Have torch.export not note the source line of each node, which takes time."""
    before = fx.config.do_not_emit_stack_traces
    fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx.config.do_not_emit_stack_traces = before


def _static_graph(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> Graph:
    """A graph of the sizes as given."""
    own = inputs.copy()  # torch.export would take one tensor that is given twice for one input
    try:
        program, seen = _export(model, own)
    except Exception as error:
        raise _capture_error(model, error) from error
    return _to_graph(program, seen, model, inputs, mode, None)


def _export(model: nn.Module, inputs: ExampleInputs) -> tuple[ExportedProgram, list[SeenCall]]:
    """Run torch.export; gives the program, and the functions with a backward of their own that the model called.

    The Python code of the graphs that it makes on its way is not needed, and not compiled. What the model keeps of the
    run is put back, since its tensors have no values: another capture would take them for constants.
    """
    with preserve_state(model), _use_lazy_graph_module(True), MaskedAssignments(), watched_functions() as seen:
        if not is_on_meta(model):
            return torch.export.export(model, inputs.args, inputs.kwargs, strict=False), seen
        inputs = inputs.map(lambda tensor: tensor.to("meta"))
        with buffers_on_meta(model):
            return torch.export.export(model, inputs.args, inputs.kwargs, strict=False), seen


def _to_graph(
    program: ExportedProgram,
    seen: list[SeenCall],
    model: nn.Module,
    inputs: ExampleInputs,
    mode: Mode,
    batch_hint: int | None,
) -> Graph:
    aliases, state = _model_state(model)
    fx_graph = clean_copy(program, aliases)
    for node in fx_graph.nodes:
        if node.op == "get_attr" and node.target not in state:
            constant = program.constants[node.target].detach()
            node.target = _constant_name(model, str(node.target), mode)
            state[node.target] = StateTensor(node.target, "constant", constant, False)
    resolve_mask_sizes(fx_graph, state)
    return Graph(
        fx_graph=fx_graph,
        state=types.MappingProxyType(state),
        aliases=types.MappingProxyType(aliases),
        inputs=inputs,
        in_spec=pytree.tree_structure((inputs.args, inputs.kwargs)),
        out_spec=program.call_spec.out_spec,
        model_type=f"{type(whole_model(model)).__module__}.{type(whole_model(model)).__qualname__}",
        mode=mode,
        batch_hint=batch_hint,
        parts=model_parts(model),
        functions=function_calls(fx_graph, seen),
    )


def _constant_name(model: nn.Module, name: str, mode: Mode) -> str:
    """Name of a constant: the path of a tensor attribute, else torch.export's name, made another in each mode."""
    owner: Any = whole_model(model)
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return name if mode == "eval" or isinstance(owner, torch.Tensor) else f"{name}_in_training"


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
    """Name the part, the module and the user's line in which capture failed, and torch's first words on it."""
    part, module, line = _origin_of(model, error)
    what = type(whole_model(model)).__name__
    where = f"module {module!r}" if module else what
    if isinstance(dict(model.named_modules()).get(module), ObserverBase):
        return CaptureError(
            f"torch.export cannot capture {what}: {where} is an observer of torch.ao.quantization, which takes ranges "
            f"from the values that it sees. Prune the model before it is prepared for quantisation, and prepare the "
            f"result."
        )
    scripted = [name for name, one in model.named_modules() if isinstance(one, torch.jit.ScriptModule)]
    if scripted:
        return CaptureError(
            f"torch.export cannot capture {what}: its module {scripted[0]!r} is a ScriptModule. Put the module that it "
            f"was made from in its place, or prune only modules beside it: submodules=[...] names them."
        )
    return CaptureError(
        f"torch.export cannot capture {f'part {part!r} of {what}' if part else what}: {type(error).__name__}: "
        f"{first_line(error)} Where: {where}{', ' + line if line else ''}. Expected a forward that runs on the example "
        f"inputs without data-dependent Python; check args and kwargs first, then rewrite that line or prune only "
        f"modules {'inside that part' if part else 'of the model'}: submodules=[...] names them."
    )


def _origin_of(model: nn.Module, error: BaseException) -> tuple[str, str, str]:
    """Part, module and source line of the user's that an exception came from; "" for what is not known."""
    names = {id(module): name for name, module in model.named_modules()}
    part, module, line = "", "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner, path = frame.f_locals.get("self"), frame.f_code.co_filename
        if frame.f_code is PartRun.forward.__code__:
            part = frame.f_locals["name"]
        elif id(owner) in names:
            module = names[id(owner)] or type(model).__name__
        if not path.startswith((_TORCH, _HERE)) and "<" not in path:
            line = f"{path}:{number} in {frame.f_code.co_name}"
    return part, module, line
