"""Calls of `torch.autograd.Function`, recorded during a capture."""

import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils import _pytree as pytree

from torchshear.graph._function_call import FunctionCall, Operand
from torchshear.graph._location import locate

_MARKS = "torchshear_functions"  # key in the meta of a node: its marks


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A call during the capture. Names of nodes are not final yet, so nodes are marked with the number of the call."""

    function: type[Function]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    n_outputs: int
    is_replayable: bool


@dataclass(frozen=True, slots=True)
class _Mark:
    """The place of a node in a call: one of its operators (position 0), or the input or output at this position."""

    call: int
    kind: Literal["operator", "input", "output"]
    position: int


_APPLY: types.FunctionType = Function.apply.__func__  # type: ignore[attr-defined]
_PLAIN_APPLY = types.FunctionType(_APPLY.__code__, _APPLY.__globals__, _APPLY.__name__, None, _APPLY.__closure__)
_LOCK = threading.Lock()


class _ThreadRecord(threading.local):
    """The calls that this thread records; None while it records none."""

    calls: list[RecordedCall] | None = None


_RECORD = _ThreadRecord()
_N_RECORDING = [0]  # blocks of `watch_functions` in all threads


class _Exchanged:
    """Holds the code that `apply` runs while calls are recorded."""

    def apply(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call `_apply_and_record`; `__class__` is `torch.autograd.Function` where this code runs."""
        return __class__._torchshear_apply(cls, args, kwargs)  # type: ignore[name-defined]


@contextmanager
def watch_functions() -> Iterator[list[RecordedCall]]:
    """Record every call of a function that defines its own backward, and mark the nodes that the capture makes of it.

    Code often keeps the `apply` of a class under another name, so replacing it in the class would not do. All of them
    are one Python function, whose code is exchanged for the block. In other threads it does what it always does.

    Yields:
        The calls of this thread.
    """
    calls: list[RecordedCall] = []
    before, _RECORD.calls = _RECORD.calls, calls
    with _LOCK:
        _N_RECORDING[0] += 1
        Function._torchshear_apply = staticmethod(_apply_and_record)  # type: ignore[attr-defined]
        _APPLY.__code__ = _Exchanged.apply.__code__
    try:
        yield calls
    finally:
        with _LOCK:
            _N_RECORDING[0] -= 1
            if not _N_RECORDING[0]:
                _APPLY.__code__ = _PLAIN_APPLY.__code__
                del Function._torchshear_apply  # type: ignore[attr-defined]
        _RECORD.calls = before


def _apply_and_record(cls: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do what `apply` does, and record it; not of calls inside another function, whose backward nothing runs."""
    calls, mode = _RECORD.calls, get_proxy_mode()
    if calls is None or mode is None:
        return _PLAIN_APPLY(cls, *args, **kwargs)
    number, graph = len(calls), mode.tracer.graph
    last = next(iter(reversed(graph.nodes)))
    is_torchs = cls.__module__.partition(".")[0] == "torch"  # as of checkpoints
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not is_torchs:  # before the call, which may write to its operands
        leaves = _mark_values(leaves, mode.tracer, number, "input")
    _RECORD.calls = calls if is_torchs else None
    try:
        results = _PLAIN_APPLY(cls, *args, **kwargs)
    finally:
        _RECORD.calls = calls
    operators = _erase_gradient_switches(graph, last)
    if not is_torchs:
        for node in operators:
            _add_marks(node, _Mark(number, "operator", 0))
        operands, named = pytree.tree_unflatten(leaves, spec)
        outputs = _mark_values(results if isinstance(results, tuple) else [results], mode.tracer, number, "output")
        # Other tensors of the capture, or transformed ones, would not be the same in another run.
        is_replayable = not any(
            isinstance(value, FakeTensor)
            or (isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value))
            for value in (*leaves, *outputs)
        )
        calls.append(RecordedCall(cls, operands, named, len(outputs), is_replayable))
    return results


def _erase_gradient_switches(graph: fx.Graph, last: fx.Node) -> list[fx.Node]:
    """Erase switches of the gradient mode behind a node, and return the other nodes there.

    A forward runs without gradients, so its switches do nothing, and the last one would leave them off.
    """
    others: list[fx.Node] = []
    node = last.next
    while node.op != "root":
        following = node.next
        if node.target is torch._C._set_grad_enabled:
            graph.erase_node(node)
        else:
            others.append(node)
        node = following
    return others


def _mark_values(values: Sequence[Any], tracer: Any, call: int, kind: Literal["input", "output"]) -> list[Any]:
    """Mark the nodes of values, and return the values with an `Operand` in place of each that has a node."""
    marked: list[Any] = []
    for position, value in enumerate(values):
        proxy = get_proxy_slot(value, tracer, None, lambda held: held.proxy) if isinstance(value, Tensor) else None
        if proxy is not None:
            _add_marks(proxy.node, _Mark(call, kind, position))
        marked.append(value if proxy is None else Operand(""))
    return marked


def _add_marks(node: fx.Node, *marks: _Mark) -> None:
    node.meta[_MARKS] = (*node.meta.get(_MARKS, ()), *marks)


def carry_marks(source: fx.Node, target: fx.Node) -> None:
    """Give a node the marks of another one that it stands for."""
    _add_marks(target, *source.meta.get(_MARKS, ()))


def function_calls(graph: fx.Graph, calls: Sequence[RecordedCall]) -> tuple[FunctionCall, ...]:
    """Return recorded calls in terms of the nodes of the finished graph.

    Args:
        graph: the graph, whose nodes are marked.
        calls: the calls that `watch_functions` recorded.
    """
    marked: dict[_Mark, list[fx.Node]] = {}
    for node in graph.nodes:
        for mark in dict.fromkeys(node.meta.get(_MARKS, ())):
            marked.setdefault(mark, []).append(node)

    def name(mark: _Mark) -> str:
        nodes = marked.get(mark, ())
        return nodes[-1].name if nodes else ""

    found: list[FunctionCall] = []
    for number, call in enumerate(calls):
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        named = [
            Operand(name(_Mark(number, "input", position))) if isinstance(leaf, Operand) else leaf
            for position, leaf in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(named, spec)
        outputs = tuple(name(_Mark(number, "output", position)) for position in range(call.n_outputs))
        operators = [node for node in marked.get(_Mark(number, "operator", 0), ()) if node.op == "call_function"]
        module = locate(operators[0]).module if operators else ""
        names = tuple(node.name for node in operators)
        found.append(FunctionCall(call.function, args, kwargs, outputs, names, module, call.is_replayable))
    return tuple(found)
