"""A clean copy of an exported graph: regions inlined, assertions dropped, state under canonical names."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.amp import autocast_mode
from torch.export import ExportedProgram

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
        program: what torch.export gave; only read.
        aliases: qualified name -> canonical name of parameters and buffers.

    Returns:
        A new graph.
    """
    lifted = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    copier = _Copier(aliases, lifted)
    result = copier.run(program.graph_module)
    copier.graph.output(result)
    copier.drop_new_buffers()
    copier.drop_unused_state()
    return copier.graph


class _Copier:
    """Copies nodes of a graph and its sub-graphs into one new graph."""

    def __init__(self, aliases: Mapping[str, str], lifted: Mapping[str, str]) -> None:
        self.graph = fx.Graph()
        self._aliases = aliases
        self._lifted = lifted
        self._state: dict[str, fx.Node] = {}

    def run(self, module: Any, inputs: tuple[Any, ...] | None = None) -> Any:
        """Copy all nodes of `module.graph`; `inputs` stand for its placeholders when it is a sub-graph."""
        env: dict[fx.Node, Any] = {}
        operands = iter(inputs or ())
        for node in module.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda n: env[n])
            if node.op == "placeholder":
                env[node] = next(operands) if inputs is not None else self._input(node)
            elif str(node.target) in _CHECKS:
                continue
            elif node.op == "get_attr":
                env[node] = module.get_submodule(str(node.target))
            else:
                env[node] = self._call(node, env)
        raise AssertionError("a graph ends in an output node")

    def _input(self, node: fx.Node) -> fx.Node:
        """An input of the whole program: one of the user's, or a tensor that the model owns."""
        lifted = self._lifted.get(node.name)
        if lifted is None:
            return self.graph.node_copy(node)
        name = self._aliases.get(lifted, lifted)
        if name not in self._state:
            self._state[name] = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
            self._state[name].meta = dict(node.meta)
        else:
            carry_marks(node, self._state[name])
        return self._state[name]

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        target = str(node.target)
        if target == "wrap_with_set_grad_enabled":
            enabled, body, *operands = self._values(node.args, env)
            before = self.graph.call_function(torch.is_grad_enabled)
            self.graph.call_function(torch._C._set_grad_enabled, (enabled,))
            result = self.run(body, tuple(operands))
            self.graph.call_function(torch._C._set_grad_enabled, (before,))
            return result
        if target == "wrap_with_autocast":
            *settings, body = self._values(node.args[:5], env)
            entered = self.graph.call_function(autocast_mode._enter_autocast, tuple(settings))
            result = self.run(body, self._values(node.args[5:], env))
            self.graph.call_function(autocast_mode._exit_autocast, (entered,))
            return result
        if node.target is operator.getitem and isinstance(env[node.args[0]], list | tuple):  # type: ignore[index]
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        return self.graph.node_copy(node, lambda n: env[n])

    def _values(self, arguments: tuple[Any, ...], env: dict[fx.Node, Any]) -> tuple[Any, ...]:
        return tuple(env[a] if isinstance(a, fx.Node) else a for a in arguments)

    def drop_new_buffers(self) -> None:
        """Remove copies into buffers that do not take them.

        Where a forward assigns a buffer, torch.export writes into the one that was there in the end. One that is built
        by the first run has another shape by then; the graph builds it in each run and needs it nowhere else.
        """
        for node in self._state.values():
            for user in list(node.users):
                is_copy = str(user.target) == "aten.copy_.default" and user.args[0] is node and not user.users
                if is_copy and not _takes(node, user.args[1]):
                    self.graph.erase_node(user)

    def drop_unused_state(self) -> None:
        """Remove sizes that only dropped assertions looked at, and `get_attr` nodes that nothing reads."""
        for node in reversed(self.graph.nodes):
            if not node.users and isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool):
                self.graph.erase_node(node)
        for node in self._state.values():
            if not node.users:
                self.graph.erase_node(node)


def _takes(buffer: fx.Node, source: Any) -> bool:
    """Whether a buffer has a shape into which a value can be copied."""
    own, other = buffer.meta["val"].shape, source.meta["val"].shape
    return len(other) <= len(own) and all(b in (a, 1) for a, b in zip(reversed(own), reversed(other), strict=False))
