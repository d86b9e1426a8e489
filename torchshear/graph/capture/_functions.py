"""Calls of `torch.autograd.Function`, noted during a capture."""

import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils import _pytree as pytree

from torchshear.graph._function_call import FunctionCall, Operand
from torchshear.graph._location import locate

_MARKS = "torchshear_functions"  # in the meta of a node: what it is to which calls


@dataclass(frozen=True, slots=True)
class SeenCall:
    """A call while the capture goes on: nodes are marked with its number, since their names are not final."""

    function: type[Function]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    n_outputs: int
    is_known: bool


@dataclass(frozen=True, slots=True)
class _Mark:
    """What a node is to a call: one of its operators (number 0), or the input or output of this number."""

    call: int
    role: str
    number: int


# -- watching a capture ------------------------------------------------------------------------------------------------

_APPLY: types.FunctionType = Function.apply.__func__  # type: ignore[attr-defined]
_PLAIN_APPLY = types.FunctionType(_APPLY.__code__, _APPLY.__globals__, _APPLY.__name__, None, _APPLY.__closure__)
_LOCK = threading.Lock()


class _Watching(threading.local):
    """What is watched in this thread."""

    seen: list[SeenCall] | None = None


_WATCHING = _Watching()
_N_WATCHING = [0]  # in all threads


class _Exchanged:
    """Holds the code that `apply` runs while functions are watched."""

    def apply(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Hand on to `_apply_watched`; `__class__` is `torch.autograd.Function` where this code runs."""
        return __class__._torchshear_apply(cls, args, kwargs)  # type: ignore[name-defined]


@contextmanager
def watched_functions() -> Iterator[list[SeenCall]]:
    """Note every call of a function that defines its own backward, and mark the nodes that the capture makes of it.

    Code often keeps the `apply` of a class under a name of its own, so that to replace it in the class would not do.
    All of them are one Python function: its code is exchanged for a while. Other threads get what they always got.
    """
    seen: list[SeenCall] = []
    before, _WATCHING.seen = _WATCHING.seen, seen
    _count(1)
    try:
        yield seen
    finally:
        _count(-1)
        _WATCHING.seen = before


def _count(change: int) -> None:
    """Put the watching code into `apply` for the first who watches, and take it out after the last."""
    with _LOCK:
        _N_WATCHING[0] += change
        if _N_WATCHING[0]:
            Function._torchshear_apply = staticmethod(_apply_watched)  # type: ignore[attr-defined]
            _APPLY.__code__ = _Exchanged.apply.__code__
        else:
            _APPLY.__code__ = _PLAIN_APPLY.__code__
            del Function._torchshear_apply  # type: ignore[attr-defined]


def _apply_watched(cls: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `apply` does, and a note of it. Calls inside a function are not noted: nothing runs their backward."""
    seen, mode = _WATCHING.seen, get_proxy_mode()
    if seen is None or mode is None:
        return _PLAIN_APPLY(cls, *args, **kwargs)
    graph = mode.tracer.graph
    last = next(iter(reversed(graph.nodes)))
    is_torchs = cls.__module__.partition(".")[0] == "torch"  # as of checkpoints: with the backward of what they run
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not is_torchs:  # before the call, which may write to what it is given
        leaves = _marked(leaves, mode.tracer, len(seen), "input")
    _WATCHING.seen = seen if is_torchs else None
    try:
        results = _PLAIN_APPLY(cls, *args, **kwargs)
    finally:
        _WATCHING.seen = seen
    made = _without_switches(graph, last)
    if not is_torchs:
        for node in made:
            _mark(node, _Mark(len(seen), "inside", 0))
        given, named = pytree.tree_unflatten(leaves, spec)
        outputs = _marked(results if isinstance(results, tuple) else [results], mode.tracer, len(seen), "output")
        is_known = all(_is_known(value) for value in (*leaves, *outputs))
        seen.append(SeenCall(cls, given, named, len(outputs), is_known))
    return results


def _without_switches(graph: fx.Graph, last: fx.Node) -> list[fx.Node]:
    """The nodes behind one; switches of the gradient mode among them are erased.

    A forward runs without gradients, so that its switches do nothing, and the last one would leave them off.
    """
    made: list[fx.Node] = []
    node = last.next
    while node.op != "root":
        following = node.next
        if node.target is torch._C._set_grad_enabled:
            graph.erase_node(node)
        else:
            made.append(node)
        node = following
    return made


def _marked(values: Sequence[Any], tracer: Any, call: int, role: str) -> list[Any]:
    """Mark the nodes that give values, which become operands."""
    found: list[Any] = []
    for number, value in enumerate(values):
        node = _node_of(value, tracer) if isinstance(value, Tensor) else None
        if node is not None:
            _mark(node, _Mark(call, role, number))
        found.append(value if node is None else Operand(""))
    return found


def _is_known(value: Any) -> bool:
    """Whether a value is that of a node, or is the same in every run: no tensor of the capture, no transformed one."""
    return not isinstance(value, FakeTensor) and not (
        isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def _node_of(tensor: Tensor, tracer: Any) -> fx.Node | None:
    proxy = get_proxy_slot(tensor, tracer, None, lambda held: held.proxy)
    return None if proxy is None else proxy.node


def _mark(node: fx.Node, *marks: _Mark) -> None:
    node.meta[_MARKS] = (*node.meta.get(_MARKS, ()), *marks)


def carry_marks(source: fx.Node, target: fx.Node) -> None:
    """Have a node stand for another one in the calls that this one belongs to."""
    _mark(target, *source.meta.get(_MARKS, ()))


# -- calls in a finished graph -----------------------------------------------------------------------------------------


def function_calls(graph: fx.Graph, seen: Sequence[SeenCall]) -> tuple[FunctionCall, ...]:
    """The calls that a capture has seen, in terms of the nodes of its finished graph.

    Args:
        graph: the graph, whose nodes are marked.
        seen: what `watched_functions` gave.
    """
    marked: dict[_Mark, list[fx.Node]] = {}
    for node in graph.nodes:
        for mark in dict.fromkeys(node.meta.get(_MARKS, ())):
            marked.setdefault(mark, []).append(node)
    return tuple(_call(number, call, marked) for number, call in enumerate(seen))


def _call(number: int, seen: SeenCall, marked: Mapping[_Mark, list[fx.Node]]) -> FunctionCall:
    def name(role: str, place: int) -> str:
        nodes = marked.get(_Mark(number, role, place), ())
        return nodes[-1].name if nodes else ""

    leaves, spec = pytree.tree_flatten((seen.args, seen.kwargs))
    named = [Operand(name("input", n)) if isinstance(leaf, Operand) else leaf for n, leaf in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(named, spec)
    inside = [node for node in marked.get(_Mark(number, "inside", 0), ()) if node.op == "call_function"]
    outputs = tuple(name("output", place) for place in range(seen.n_outputs))
    module = locate(inside[0]).module if inside else ""
    names = tuple(node.name for node in inside)
    return FunctionCall(seen.function, args, kwargs, outputs, names, module, seen.is_known)
