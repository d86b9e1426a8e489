"""A clean copy of an exported graph: regions inlined, assertions dropped, state under canonical names, sizes known."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.amp import autocast_mode
from torch.export import ExportedProgram

from torchshear.graph._graph import StateTensor
from torchshear.graph._nodes import has_data_dependent_shape, is_data_dependent, unwrap_copies
from torchshear.graph.capture._functions import carry_marks

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


class _Copier:
    """Copies nodes of a graph and its sub-graphs into one new graph.

    Attributes:
        graph: the new graph.
        state: `get_attr` nodes by canonical name.
    """

    def __init__(self, aliases: Mapping[str, str], lifted: Mapping[str, str]) -> None:
        self.graph = fx.Graph()
        self.state: dict[str, fx.Node] = {}
        self._aliases = aliases
        self._lifted = lifted

    def copy_nodes(self, module: Any, inputs: tuple[Any, ...] | None = None) -> Any:
        """Copy all nodes of `module.graph` and return its output; `inputs` are the operands of a sub-graph."""
        copies: dict[fx.Node, Any] = {}
        operands = iter(inputs or ())
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], copies.__getitem__)
            if node.op == "placeholder":
                copies[node] = next(operands) if inputs is not None else self._copy_input(node)
            elif node.op == "get_attr":
                copies[node] = module.get_submodule(str(node.target))
            elif str(node.target) not in _CHECKS:
                copies[node] = self._copy_call(node, copies)
        raise AssertionError("a graph ends in an output node")

    def _copy_input(self, node: fx.Node) -> fx.Node:
        """Copy an input of the whole program: one of the user's, or a tensor that the model owns."""
        lifted = self._lifted.get(node.name)
        if lifted is None:
            return self.graph.node_copy(node)
        name = self._aliases.get(lifted, lifted)
        if name not in self.state:
            self.state[name] = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
            self.state[name].meta = dict(node.meta)
        else:
            carry_marks(node, self.state[name])
        return self.state[name]

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
