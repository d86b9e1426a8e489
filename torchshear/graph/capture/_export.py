"""Running torch.export on a model, and errors that say which module and line it cannot capture."""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.observer import ObserverBase
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchshear.errors import CaptureError, first_line
from torchshear.graph._graph import Graph, StateTensor
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._parts import PartRun, model_parts, whole_model
from torchshear.graph.capture._clean_copy import clean_copy, resolve_mask_sizes
from torchshear.graph.capture._functions import function_calls, watch_functions
from torchshear.graph.model._checks import signature_of
from torchshear.graph.model._meta import buffers_on_meta, is_on_meta
from torchshear.graph.model._state import Mode, preserve_state

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"  # with the separator, or torchvision would be taken for torch
_GRAPH = f"{Path(__file__).parents[1]}{os.sep}"


def export(model: nn.Module, inputs: ExampleInputs, original: ExampleInputs, mode: Mode, batch: int | None) -> Graph:
    """Capture a model with torch.export.

    Args:
        model: the model, in the mode to capture, with outputs as `drop_opaque_outputs` makes them.
        inputs: the inputs to capture it with.
        original: the inputs that the user gave, which the graph keeps.
        mode: the mode.
        batch: the batch of `inputs`, if it is to be freed.

    Raises:
        Exception: torch.export and code of the model may raise anything.
    """
    on_meta = is_on_meta(model)
    # The Python code of graphs that torch.export makes on its way is not needed, and not compiled. What the model keeps
    # of the run is put back: its tensors have no values, and another capture would take them for constants.
    with preserve_state(model), _use_lazy_graph_module(True), MaskedAssignments(), watch_functions() as seen:
        if on_meta:
            inputs = inputs.map(lambda tensor: tensor.to("meta"))
            with buffers_on_meta(model):
                program = torch.export.export(model, inputs.args, inputs.kwargs, strict=False)
        else:
            program = torch.export.export(model, inputs.args, inputs.kwargs, strict=False)
    whole = whole_model(model)
    aliases, state = _model_state(model)
    fx_graph = clean_copy(program, aliases)
    for node in fx_graph.nodes:
        if node.op == "get_attr" and node.target not in state:
            constant = program.constants[node.target].detach()
            attribute: Any = whole
            for part in node.target.split("."):
                attribute = getattr(attribute, part, None)
            if mode == "train" and not isinstance(attribute, Tensor):  # a name by torch.export, other than in eval mode
                node.target = f"{node.target}_in_training"
            state[node.target] = StateTensor(node.target, "constant", constant, False)
    resolve_mask_sizes(fx_graph, state)
    return Graph(
        fx_graph=fx_graph,
        state=MappingProxyType(state),
        aliases=MappingProxyType(aliases),
        inputs=original,
        in_spec=pytree.tree_structure((original.args, original.kwargs)),
        out_spec=program.call_spec.out_spec,
        model_type=f"{type(whole).__module__}.{type(whole).__qualname__}",
        mode=mode,
        batch_hint=batch,
        parts=model_parts(model),
        functions=function_calls(fx_graph, seen),
        signature=signature_of(model),
    )


def _model_state(model: nn.Module) -> tuple[dict[str, str], dict[str, StateTensor]]:
    """Return the canonical name of every name of a parameter or buffer, and the tensors by canonical name."""
    modules = model.named_modules(remove_duplicate=False)
    unsaved = {
        f"{path}.{name}" if path else name for path, module in modules for name in module._non_persistent_buffers_set
    }
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    state: dict[str, StateTensor] = {}
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


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """Have torch.export not note the source line of each node for a block, which takes time."""
    before = fx.config.do_not_emit_stack_traces
    fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx.config.do_not_emit_stack_traces = before


class MaskedAssignments(TorchFunctionMode):
    """Computes `x[mask] = value` as a choice between both, which needs no count of the mask.

    torch.export refuses the assignment where the value is spread over an unknown number of places.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__setitem__:
            target, mask, value = args
            is_mask = isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.ndim > 0
            if is_mask and (not isinstance(value, Tensor) or value.ndim <= target.ndim - mask.ndim):
                wide = mask.reshape(*mask.shape, *[1] * (target.ndim - mask.ndim))
                target.copy_(torch.where(wide, value, target))
                return None
        return func(*args, **(kwargs or {}))


class RefusedBranches(TorchFunctionMode):
    """Answers every `if` on a value of a tensor with no.

    In train mode that is how layers are dropped at random: the graph is then that of a run in which none is. It holds
    how tensors depend on one another, and is not a graph to train with.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__:
            return False
        return func(*args, **(kwargs or {}))


def capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """Return an error that names the part, the module and the line of the user's in which capture failed."""
    part, module, line = find_origin(model, error)
    name = type(whole_model(model)).__name__
    where = f"module {module!r}" if module else name
    if isinstance(dict(model.named_modules()).get(module), ObserverBase):
        return CaptureError(
            f"torch.export cannot capture {name}: {where} is an observer of torch.ao.quantization, which takes ranges "
            f"from the values that it sees. Prune the model before it is prepared for quantisation, and prepare the "
            f"result."
        )
    scripted = [name for name, one in model.named_modules() if isinstance(one, torch.jit.ScriptModule)]
    if scripted:
        return CaptureError(
            f"torch.export cannot capture {name}: its module {scripted[0]!r} is a ScriptModule. Put the module that it "
            f"was made from in its place, or prune only modules beside it: submodules=[...] names them."
        )
    return CaptureError(
        f"torch.export cannot capture {f'part {part!r} of {name}' if part else name}: {type(error).__name__}: "
        f"{first_line(error)} Where: {where}{', ' + line if line else ''}. Expected a forward that runs on the example "
        f"inputs without data-dependent Python; check args and kwargs first, then rewrite that line or prune only "
        f"modules {'inside that part' if part else 'of the model'}: submodules=[...] names them."
    )


def find_origin(model: nn.Module, error: BaseException) -> tuple[str, str, str]:
    """Return the part, the module and the user's source line that an exception came from; "" for what is not known."""
    names = {id(module): name for name, module in model.named_modules()}
    part, module, line = "", "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner, path = frame.f_locals.get("self"), frame.f_code.co_filename
        if frame.f_code is PartRun.forward.__code__:
            part = frame.f_locals["name"]
        elif id(owner) in names:
            module = names[id(owner)] or type(model).__name__
        if not path.startswith((_TORCH, _GRAPH)) and "<" not in path:
            line = f"{path}:{number} in {frame.f_code.co_name}"
    return part, module, line
