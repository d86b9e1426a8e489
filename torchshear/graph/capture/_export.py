"""Running torch.export on a model, a clean copy of its graph, and errors that say where it cannot capture a model.

In the copy regions are inlined, assertions dropped, and tensors of the model under their canonical names.
"""

import operator
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.amp import autocast_mode
from torch.ao.quantization.observer import ObserverBase
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchshear.errors import CaptureError, first_line
from torchshear.graph._graph import Graph, PartRun, StateTensor, whole_model
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._location import locate
from torchshear.graph._nodes import has_data_dependent_shape, is_data_dependent, unwrap_copies
from torchshear.graph.capture._functions import carry_marks, function_calls, watch_functions
from torchshear.graph.model._checks import signature_of
from torchshear.graph.model._meta import buffers_on_meta, is_on_meta
from torchshear.graph.model._state import Mode, preserve_state

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"  # with the separator, or torchvision would be taken for torch
_GRAPH = f"{Path(__file__).parents[1]}{os.sep}"
# Nodes that check or describe, and compute nothing that anything uses.
_CHECKS = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_async.msg",
        "aten._assert_scalar.default",
        "aten.sym_constrain_range.default",
        "aten.sym_constrain_range_for_size.default",
    }
)


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
        parts=model.parts if isinstance(model, PartRun) else None,
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


def clean_copy(program: ExportedProgram, aliases: Mapping[str, str]) -> fx.Graph:
    """Copy the graph of an exported program.

    Parameters, buffers and constants, which torch.export passes as inputs, become `get_attr` nodes with canonical
    names, one a tensor. Regions under `torch.no_grad` or autocast, which it keeps as sub-graphs, are inlined between
    calls that switch the mode and back.

    Args:
        program: the result of torch.export; only read.
        aliases: qualified name -> canonical name of parameters and buffers.

    Returns:
        A new graph.
    """
    lifted = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    copier = _Copier(aliases, lifted)
    graph = copier.graph
    graph.output(copier.copy_nodes(program.graph_module))
    # Where a forward assigns a buffer, torch.export writes into the old one in the end. A buffer that the first run
    # builds has another shape by then; the graph builds it in each run and needs the copy nowhere else.
    for node in copier.state.values():
        for user in list(node.users):
            is_copy = str(user.target) == "aten.copy_.default" and user.args[0] is node and not user.users
            if is_copy and not _can_broadcast(user.args[1].meta["val"].shape, node.meta["val"].shape):  # type: ignore[union-attr]
                graph.erase_node(user)
    # Sizes that only dropped assertions read, and tensors that nothing reads, are removed.
    for node in reversed(graph.nodes):
        if not node.users and isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool):
            graph.erase_node(node)
    for node in copier.state.values():
        if not node.users:
            graph.erase_node(node)
    return graph


@dataclass(frozen=True, slots=True)
class _Copier:
    """Copies nodes of a graph and its sub-graphs into one new graph.

    Attributes:
        aliases: qualified name -> canonical name of parameters and buffers.
        lifted: name of an input of the program -> name of the tensor that it stands for.
        graph: the new graph.
        state: `get_attr` nodes by canonical name.
    """

    aliases: Mapping[str, str]
    lifted: Mapping[str, str]
    graph: fx.Graph = field(default_factory=fx.Graph)
    state: dict[str, fx.Node] = field(default_factory=dict)

    def copy_nodes(self, module: Any, inputs: tuple[Any, ...] | None = None) -> Any:
        """Copy all nodes of `module.graph` and return its output; `inputs` are the operands of a sub-graph."""
        copies: dict[fx.Node, Any] = {}
        operands = iter(inputs or ())
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], copies.__getitem__)
            if node.op == "placeholder" and inputs is not None:
                copies[node] = next(operands)
            elif node.op == "placeholder" and node.name not in self.lifted:  # an input of the user's
                copies[node] = self.graph.node_copy(node)
            elif node.op == "placeholder":  # a tensor that the model owns
                name = self.aliases.get(self.lifted[node.name], self.lifted[node.name])
                if name not in self.state:
                    self.state[name] = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
                    self.state[name].meta = dict(node.meta)
                else:
                    carry_marks(node, self.state[name])
                copies[node] = self.state[name]
            elif node.op == "get_attr":
                copies[node] = module.get_submodule(str(node.target))
            elif str(node.target) not in _CHECKS:
                copies[node] = self._copy_call(node, copies)
        raise AssertionError("a graph ends in an output node")

    def _copy_call(self, node: fx.Node, copies: Mapping[fx.Node, Any]) -> Any:
        arguments = tuple(copies[a] if isinstance(a, fx.Node) else a for a in node.args)
        if str(node.target) == "wrap_with_set_grad_enabled":
            enabled, body, *operands = arguments
            before = self.graph.call_function(torch.is_grad_enabled)
            self.graph.call_function(torch._C._set_grad_enabled, (enabled,))
            result = self.copy_nodes(body, tuple(operands))
            self.graph.call_function(torch._C._set_grad_enabled, (before,))
            return result
        if str(node.target) == "wrap_with_autocast":
            *settings, body = arguments[:5]
            entered = self.graph.call_function(autocast_mode._enter_autocast, tuple(settings))
            result = self.copy_nodes(body, arguments[5:])
            self.graph.call_function(autocast_mode._exit_autocast, (entered,))
            return result
        if node.target is operator.getitem and isinstance(arguments[0], list | tuple):  # a result of an inlined region
            return arguments[0][arguments[1]]  # type: ignore[index]
        if any(isinstance(value, nn.Module) for value in arguments):
            raise NotImplementedError(
                f"{locate(node)} calls graphs of its own, as branches or loops, which are not cut."
            )
        return self.graph.node_copy(node, copies.__getitem__)


def _can_broadcast(source: torch.Size, target: torch.Size) -> bool:
    """Return whether a tensor of one shape can be copied into one of another."""
    pairs = zip(reversed(target), reversed(source), strict=False)
    return len(source) <= len(target) and all(b in (a, 1) for a, b in pairs)


def resolve_mask_sizes(graph: fx.Graph, state: Mapping[str, StateTensor]) -> None:
    """Replace sizes that depend on a mask which the model holds by numbers; torch.export knows no values.

    Args:
        graph: a captured graph; the descriptions of its values are changed in place.
        state: canonical name -> tensor of the model, or constant.
    """
    known: dict[Any, int] = {}
    for node in graph.nodes:
        if str(node.target) == "aten.index.Tensor":
            last = unwrap_copies([index for index in node.args[1] if index is not None][-1])
            entry = state.get(str(last.target)) if last.op == "get_attr" else None
            if entry is not None and entry.tensor.dtype is torch.bool and not entry.tensor.is_meta:
                for size in filter(is_data_dependent, node.meta["val"].shape):
                    known.setdefault(size.node.expr, int(entry.tensor.sum()))

    def resolve(size: Any) -> Any:
        expression = size.node.expr.subs(known) if is_data_dependent(size) else None
        return int(expression) if expression is not None and expression.is_number else size

    for node in graph.nodes if known else ():
        if has_data_dependent_shape(node):
            value = node.meta["val"]
            with value.fake_mode:
                sizes = [resolve(size) for size in value.shape]
                node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)
