"""A second capture of a network, at another batch or in train mode, at a fraction of the cost of the first.

The forward is run once more on tensors without values, and the operators that it calls are held against the graph of
the first capture, one by one: the same calls in the same order make a graph with the arguments and shapes of the second
run. Anything else is left to torch.export, which takes several times as long.
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer
from torch.utils import _pytree as pytree

from torchshear.graph._graph import Graph
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._operator import operator_named
from torchshear.graph.capture._branches import MaskedAssignments
from torchshear.graph.model._process import set_exporting_flag
from torchshear.graph.model._state import preserve_state

_LIFTED = frozenset({"aten.lift_fresh.default", "aten.lift_fresh_copy.default"})  # a number in the code as a tensor


class _OtherCallsError(Exception):
    """The second run is not made of the calls of the first."""


def second_capture(first: Graph, model: nn.Module, inputs: ExampleInputs) -> Graph | None:
    """Run a captured model once more, and give its graph with the numbers of that run.

    Args:
        first: the capture; only read. Its batch may have been made free.
        model: the model, in the mode to capture, with outputs as `drop_opaque_outputs` makes them.
        inputs: inputs of any batch. Their values are not read.

    Returns:
        A graph with one node for each of the first; None if the run is not made of the same calls, or cannot be made
        without values.
    """
    try:
        run = _recorded(model, inputs)
        if pytree.tree_structure(run.output) != first.out_spec:
            return None
        return replace(first, fx_graph=_Twin(first, run).graph)
    except Exception:  # code of the model may not run on such tensors, and torch may raise anything then
        return None


def names_read(model: nn.Module, inputs: ExampleInputs) -> set[str] | None:
    """Names of the parameters and buffers that a run of a model reads; None if it cannot be run without values.

    Args:
        model: the model, in the mode to run it in.
        inputs: what to run it on. Their values are not read.
    """
    try:
        run = _recorded(model, inputs)
    except Exception:  # see above
        return None
    read = {id(leaf) for call in run.calls for leaf in pytree.tree_leaves((call.args, call.kwargs))}
    return {name for name, tensor in run.state.items() if id(tensor) in read}


def can_run_without_values(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether a model can be run on tensors of the shapes of some inputs, without values."""
    try:
        _recorded(model, inputs)
    except Exception:  # see above
        return False
    return True


# -- the second run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of an operator."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A run: tensors of the model by name, flat inputs, calls in order, and what came out."""

    state: dict[str, Tensor]
    leaves: list[Any]
    calls: list[_Call]
    output: Any


class _Recorder(ProxyTorchDispatchMode):
    """Notes every operator as torch.export sees it, before it is taken apart, and computes shapes only.

    torch hands calls at that level to modes of a few classes, of which this is one.
    """

    def __init__(self) -> None:
        super().__init__(PythonKeyTracer(), "fake", pre_dispatch=True)  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Norms give a tensor like their operand, and take long to find that out.
        is_norm = func.namespace == "aten" and operator_named(str(func)).norm is not None
        result = torch.empty_like(args[0]) if is_norm else func(*args, **(kwargs or {}))
        self.calls.append(_Call(func, args, kwargs or {}, result))
        return result


def _recorded(model: nn.Module, inputs: ExampleInputs) -> _Recorded:
    """Run a model on tensors without values that say that they are where the model's are."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = (*model.named_parameters(), *model.named_buffers())
    state: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in named}
    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (inputs.args, inputs.kwargs))
    leaves = pytree.tree_leaves((args, kwargs))
    recorder = _Recorder()
    with preserve_state(model), mode, set_exporting_flag(), _plain_kernels(), recorder, MaskedAssignments():
        output = torch.func.functional_call(model, dict(state), args, kwargs)  # which writes to the dict
    return _Recorded(state, leaves, recorder.calls, output)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Have calls be taken apart, and flags for fast kernels be passed to operators, as torch.export does."""
    mkldnn = torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]  # gives those of before, this one first
    try:
        with torch.backends.cudnn.flags(enabled=False), enable_python_dispatcher():
            yield
    finally:
        torch.backends.mkldnn.set_flags(mkldnn[0])  # type: ignore[no-untyped-call]


# -- the graph of the second run ---------------------------------------------------------------------------------------


class _Twin:
    """Makes the graph of a second run: a node for each node of the first.

    Attributes:
        graph: the finished graph.
    """

    def __init__(self, first: Graph, run: _Recorded) -> None:
        self.graph = fx.Graph()
        self._first = first
        self._run = run
        self._twins: dict[fx.Node, fx.Node] = {}
        self._nodes: dict[int, fx.Node] = {}  # of the latest value of each tensor, by its identity
        self._new: dict[int, fx.Node] = {}  # of what calls without operands give, by the identity of its memory
        leaves, calls = iter(run.leaves), iter(run.calls)
        for node in first:
            if node.op == "placeholder":
                self._add(node, (), {}, next(leaves))
            elif node.op == "get_attr":
                self._add(node, (), {}, self._own(str(node.target)))
            elif isinstance(node.meta.get("val"), int):
                continue  # a size that is computed from the batch
            elif node.op == "output":
                self.graph.output(self._outputs(node))
            elif node.target is operator.getitem:
                source, place = self._twins[node.args[0]], node.args[1]  # type: ignore[index]
                self._add(node, (source, place), {}, source.meta["val"][place])
            elif isinstance(node.target, torch._ops.OpOverload):
                call = next(calls, None)
                if call is None or not _is_same_operator(node.target, call.target):
                    raise _OtherCallsError
                args = self._operands(node.args, call.args)
                self._add(node, args, self._operands(node.kwargs, call.kwargs), call.result)
            else:  # switches of gradients and autocast, of which no argument is a size
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: self._twins[operand])
                self._add(node, args, kwargs, node.meta.get("val"))
        if next(calls, None) is not None:
            raise _OtherCallsError

    def _add(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        twin = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        twin.meta = {**node.meta, "val": value}
        self._twins[node] = twin
        if isinstance(value, Tensor):
            self._nodes[id(value)] = twin
            if node.op == "call_function" and not twin.all_input_nodes:
                self._new[_memory(value)] = twin

    def _own(self, name: str) -> Tensor:
        """The tensor that the second run had for one of the model; a constant is itself."""
        return self._run.state.get(name, self._first.state[name].tensor)

    def _operands(self, one: Any, two: Any) -> Any:
        """Arguments of a call in the second run, with nodes in place of tensors.

        Raises:
            _OtherCallsError: a tensor is none that a node is known for.
        """
        if isinstance(two, Tensor):
            return self._node_of(two, one)
        if isinstance(two, list | tuple):
            beside = one if isinstance(one, list | tuple) and len(one) == len(two) else [None] * len(two)
            return type(two)([self._operands(a, b) for a, b in zip(beside, two, strict=True)])
        if isinstance(two, dict):
            return {name: self._operands(one.get(name), value) for name, value in two.items()}
        return two

    def _node_of(self, tensor: Tensor, beside: Any) -> fx.Node:
        """The node of a tensor; of a constant, that of the equal one in the first capture.

        What `torch.arange` and the like return is another object than what the operator gave, in the same memory.
        """
        node = self._nodes.get(id(tensor)) or self._new.get(_memory(tensor))
        if node is not None:
            return node
        entry = self._first.state.get(str(beside.target)) if isinstance(beside, fx.Node) else None
        if entry is None or beside.op != "get_attr" or not _is_equal(entry.tensor, tensor):
            raise _OtherCallsError
        return self._twins[beside]

    def _outputs(self, node: fx.Node) -> tuple[Any, ...]:
        leaves = pytree.tree_leaves(self._run.output)
        return tuple(self._operands(one, two) for one, two in zip(node.args[0], leaves, strict=True))  # type: ignore[arg-type]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_same_operator(one: Any, two: Any) -> bool:
    return one is two or {str(one), str(two)} <= _LIFTED


def _is_equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and bool(torch.equal(one, two))
