"""Functions with a backward of their own, called in place of their operators while a graph is interpreted."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from torchshear.errors import DataError, first_line
from torchshear.graph import Graph
from torchshear.graph._function_call import FunctionCall
from torchshear.graph._nodes import is_written

_CLOSE = 1e-2  # of the largest value: results of a function that is called again, beside those of its operators


class Functions:
    """The functions of a graph whose backward it does not hold.

    Results of their operators give way to those of the functions themselves, and so do gradients.

    Args:
        graph: the captured model.
        gated: names of the values that gates stand on.

    Raises:
        DataError: a function cannot be called in place of its operators, or gradients inside it are asked for.
    """

    def __init__(self, graph: Graph, gated: Collection[str]) -> None:
        nodes = {node.name: node for node in graph}
        self._result_of: dict[str, tuple[FunctionCall, int]] = {}
        self._kept: dict[str, bool] = {}
        for call in graph.lost_backwards:
            _check(call, graph, nodes, gated)
            self._result_of |= {name: (call, number) for number, name in enumerate(call.outputs) if name}
            self._kept |= {name: is_written(nodes[name]) for name in call.inputs}
        self._values: dict[str, Tensor] = {}
        self._results: dict[FunctionCall, list[Any]] = {}

    def result(self, node: fx.Node, value: Any) -> Any:
        """Return the result of the function that gives this value, or the value itself where none does."""
        if node.name not in self._result_of:
            return value
        call, number = self._result_of[node.name]
        if call not in self._results:
            self._results[call] = self._run(call)
        result = self._results[call][number]
        if not _are_close(result, value):
            raise DataError(
                f"{_problem(call)} When it is called again, it gives other values than in the captured graph. Take "
                f"randomness and sizes of the batch out of it, or {_ADVICE}."
            )
        return result

    def _run(self, call: FunctionCall) -> list[Any]:
        try:
            return call.run(self._values)
        except Exception as error:  # the user's own code may raise anything
            raise DataError(
                f"{_problem(call)} Called again on the data it raises {type(error).__name__}: {first_line(error)}. "
                f"Expected a function of its arguments alone; else {_ADVICE}."
            ) from error

    def keep(self, node: fx.Node, value: Any) -> None:
        """Keep a value that a function is given; a copy of what its operators write to."""
        if node.name in self._kept:
            self._values[node.name] = value.clone() if self._kept[node.name] else value

    def finish(self) -> None:
        """Forget the values of a batch."""
        self._values.clear()
        self._results.clear()


_ADVICE = "choose a criterion that looks at no gradients, or prune without that module: submodules=[...] names others"


def _check(call: FunctionCall, graph: Graph, nodes: dict[str, fx.Node], gated: Collection[str]) -> None:
    """Raise DataError if gradients through a function cannot be had."""
    read = [operand for name in call.operators for operand in nodes[name].all_input_nodes]
    unseen = [n for n in read if n.name not in {*call.operators, *call.inputs} and _may_learn(n, graph)]
    within = sorted(set(call.operators) & set(gated) - set(call.outputs))
    reason = ""
    if not call.is_replayable:
        reason = "the tensors that it is given are not known, as under torch.vmap"
    elif unseen:
        reason = f"it reads {_name(unseen[0])!r} without being given it as an argument"
    elif within:
        reason = f"a layer that is to be scored is inside it ({within[0]})"
    if reason:
        raise DataError(f"{_problem(call)} Its gradients cannot be taken: {reason}; {_ADVICE}.")


def _may_learn(node: fx.Node, graph: Graph) -> bool:
    if node.op == "get_attr":
        return graph.state[str(node.target)].kind == "parameter"
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "get_attr" else node.name


def _problem(call: FunctionCall) -> str:
    return f"{call} has a backward of its own, which a captured graph does not hold."


def _are_close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    if not one.numel():
        return True
    wide = torch.complex128 if one.is_complex() else torch.float64
    one, other = one.detach().to(wide).nan_to_num(), other.detach().to(wide).nan_to_num()
    return bool((one - other).abs().max() <= _CLOSE * other.abs().max())
