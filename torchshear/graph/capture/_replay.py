"""A second capture of a network, at another batch or in train mode, at a fraction of the cost of the first.

The forward is run again on tensors without values, and the operators that it calls are compared with the graph of the
first capture one by one. The same calls in the same order make a graph with the arguments and shapes of the second run.
Anything else is left to torch.export, which takes several times as long.
"""

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.utils import _pytree as pytree

from torchshear.graph._graph import Graph
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._operator_record import operator_named
from torchshear.graph.capture._export import MaskedAssignments
from torchshear.graph.model._process import set_exporting_flag
from torchshear.graph.model._state import preserve_state

_LIFTED = frozenset({"aten.lift_fresh.default", "aten.lift_fresh_copy.default"})  # a number in the code as a tensor


class _OtherCallsError(Exception):
    """The second run does not make the calls of the first."""


def replay(first: Graph, model: nn.Module, inputs: ExampleInputs) -> Graph | None:
    """Run a captured model again and return its graph with the arguments and shapes of that run.

    Args:
        first: the capture; only read. Its batch may have been freed.
        model: the model, in the mode to capture, with outputs as `drop_opaque_outputs` makes them.
        inputs: inputs of any batch. Their values are not read.

    Returns:
        A graph with one node for each node of the first; None if the run makes other calls, or needs values.
    """
    try:
        run = _record_run(model, inputs)
        if pytree.tree_structure(run.output) != first.out_spec:
            return None
        return replace(first, fx_graph=_GraphBuilder(first, run).build())
    except Exception:  # code of the model may not run on such tensors, and torch may raise anything then
        return None


def read_state_names(model: nn.Module, inputs: ExampleInputs) -> set[str] | None:
    """Return the names of the parameters and buffers that a run of a model reads; None if the run needs values.

    Args:
        model: the model, in the mode to run it in.
        inputs: its inputs. Their values are not read.
    """
    try:
        run = _record_run(model, inputs)
    except Exception:  # as in `replay`
        return None
    read = {id(leaf) for call in run.calls for leaf in pytree.tree_leaves((call.args, call.kwargs))}
    return {name for name, tensor in run.state.items() if id(tensor) in read}


def can_run_without_values(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Return whether a model runs on tensors that have the shapes of some inputs and no values."""
    try:
        _record_run(model, inputs)
    except Exception:  # as in `replay`
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of an operator."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass(frozen=True, slots=True)
class _Run:
    """A recorded run: tensors of the model by name, flat inputs, calls in order, and the output."""

    state: dict[str, Tensor]
    leaves: list[Any]
    calls: list[_Call]
    output: Any


class _Recorder(ProxyTorchDispatchMode):
    """Records every operator as torch.export sees it, before it is taken apart, and computes shapes only.

    torch hands calls at that level to modes of a few classes, of which this is one.
    """

    def __init__(self) -> None:
        super().__init__(PythonKeyTracer(), "fake", pre_dispatch=True)  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Norms return a tensor like their operand, and take long to find that out.
        is_norm = func.namespace == "aten" and operator_named(str(func)).norm is not None
        result = torch.empty_like(args[0]) if is_norm else func(*args, **(kwargs or {}))
        self.calls.append(_Call(func, args, kwargs or {}, result))
        return result


def _record_run(model: nn.Module, inputs: ExampleInputs) -> _Run:
    """Run a model on tensors without values, which name the devices of the model's tensors as theirs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = (*model.named_parameters(), *model.named_buffers())
    state: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in named}
    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (inputs.args, inputs.kwargs))
    leaves = pytree.tree_leaves((args, kwargs))
    recorder = _Recorder()
    # As in torch.export, calls are taken apart, and operators get flags that say no to fast kernels.
    mkldnn = torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]  # returns the old flags, this one first
    try:
        with (
            preserve_state(model),
            mode,
            set_exporting_flag(),
            torch.backends.cudnn.flags(enabled=False),
            enable_python_dispatcher(),
            recorder,
            MaskedAssignments(),
        ):
            output = torch.func.functional_call(model, dict(state), args, kwargs)  # which writes to the dict
    finally:
        torch.backends.mkldnn.set_flags(mkldnn[0])  # type: ignore[no-untyped-call]
    return _Run(state, leaves, recorder.calls, output)


@dataclass(frozen=True, slots=True)
class _GraphBuilder:
    """Makes the graph of a second run: a node for each node of the first.

    Attributes:
        first: the first capture.
        run: the second run.
        graph: the graph of the second run.
        twins: node of the first graph -> its node in this one.
        by_tensor: by the identity of a tensor: the node of its latest value.
        by_memory: by the identity of their memory: results of calls without operands.
    """

    first: Graph
    run: _Run
    graph: fx.Graph = field(default_factory=fx.Graph)
    twins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    by_tensor: dict[int, fx.Node] = field(default_factory=dict)
    by_memory: dict[int, fx.Node] = field(default_factory=dict)

    def build(self) -> fx.Graph:
        """Return the graph.

        Raises:
            _OtherCallsError: the second run does not make the calls of the first.
        """
        leaves, calls = iter(self.run.leaves), iter(self.run.calls)
        for node in self.first:
            if node.op == "placeholder":
                self._add(node, (), {}, next(leaves))
            elif node.op == "get_attr":
                name = str(node.target)  # a constant is the same tensor in both runs
                self._add(node, (), {}, self.run.state.get(name, self.first.state[name].tensor))
            elif isinstance(node.meta.get("val"), int):
                continue  # a size that is computed from the batch
            elif node.op == "output":
                pairs = zip(node.args[0], pytree.tree_leaves(self.run.output), strict=True)  # type: ignore[arg-type]
                self.graph.output(tuple(self._operands(one, two) for one, two in pairs))
            elif node.target is operator.getitem:
                source, position = self.twins[node.args[0]], node.args[1]  # type: ignore[index]
                self._add(node, (source, position), {}, source.meta["val"][position])
            elif isinstance(node.target, torch._ops.OpOverload):
                call = next(calls, None)
                is_same = call is not None and (
                    node.target is call.target or {str(node.target), str(call.target)} <= _LIFTED
                )
                if call is None or not is_same:
                    raise _OtherCallsError
                args = self._operands(node.args, call.args)
                self._add(node, args, self._operands(node.kwargs, call.kwargs), call.result)
            else:  # switches of gradients and autocast, of which no argument is a size
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.twins.__getitem__)
                self._add(node, args, kwargs, node.meta.get("val"))
        if next(calls, None) is not None:
            raise _OtherCallsError
        return self.graph

    def _add(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        twin = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        twin.meta = {**node.meta, "val": value}
        self.twins[node] = twin
        if isinstance(value, Tensor):
            self.by_tensor[id(value)] = twin
            if node.op == "call_function" and not twin.all_input_nodes:
                self.by_memory[_memory_of(value)] = twin

    def _operands(self, one: Any, two: Any) -> Any:
        """Return arguments of a call with nodes in place of tensors.

        `torch.arange` and the like return another object than the operator inside did, in the same memory. A constant
        has the node of the equal constant in the first capture.

        Args:
            one: the arguments in the graph of the first run.
            two: the arguments in the second run.

        Raises:
            _OtherCallsError: no node is known for a tensor.
        """
        if isinstance(two, Tensor):
            node = self.by_tensor.get(id(two)) or self.by_memory.get(_memory_of(two))
            if node is not None:
                return node
            entry = self.first.state.get(str(one.target)) if isinstance(one, fx.Node) else None
            known = entry.tensor if entry is not None and one.op == "get_attr" else None
            is_alike = known is not None and known.shape == two.shape and known.dtype == two.dtype
            if known is None or not is_alike or not torch.equal(known, two):
                raise _OtherCallsError
            return self.twins[one]
        if isinstance(two, list | tuple):
            beside = one if isinstance(one, list | tuple) and len(one) == len(two) else [None] * len(two)
            return type(two)([self._operands(a, b) for a, b in zip(beside, two, strict=True)])
        if isinstance(two, dict):
            return {name: self._operands(one.get(name), value) for name, value in two.items()}
        return two


def _memory_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
