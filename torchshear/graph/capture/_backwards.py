"""Whether the operators of a function give its backward, found by running both on the same numbers."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.graph._function_call import FunctionCall
from torchshear.graph._graph import Graph
from torchshear.graph._run import graph_values

Values = dict[str, Any]

# Largest difference between two gradients that are the same, as a part of the largest number in them.
_TOLERANCES = {torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}
_TOLERANCE = 1e-3


def with_own_backwards(graph: Graph) -> Graph:
    """Say of each function that a model calls whether its backward is its own: its operators do not give it.

    Only gradients that reach a parameter count. They are compared in float64 where the function runs in it, near the
    example and on random numbers, since an example may lie where both are the same. What cannot be compared, as on the
    meta device, is taken for its own.

    Args:
        graph: the captured model, in whose mode the model is.
    """
    if not graph.functions:
        return graph
    own: Mapping[int, bool] = {}
    if not any(tensor.is_meta for tensor in [*graph.inputs.tensors(), *(e.tensor for e in graph.state.values())]):
        with _left_alone(graph):
            try:
                own = _Comparison(graph).run()
            except Exception:  # the graph does not run on the example: its values may not be those that it asks for
                own = {}
    calls = tuple(replace(call, has_own_backward=own.get(number, True)) for number, call in enumerate(graph.functions))
    return replace(graph, functions=calls)


@contextmanager
def _left_alone(graph: Graph) -> Iterator[None]:
    """Leave buffers, gradients and random numbers as they are, whatever a function does to them."""
    buffers = [(entry.tensor, entry.tensor.clone()) for entry in graph.state.values() if entry.kind == "buffer"]
    gradients = [(entry.tensor, entry.tensor.grad) for entry in graph.state.values() if entry.kind == "parameter"]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


class _Comparison:
    """One run of a graph, in which each function is compared with its operators where its last result is made."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        order = {node.name: number for number, node in enumerate(graph)}
        self._calls: dict[str, list[int]] = {}
        self._pieces: dict[int, _Piece] = {}
        self._n_readers: Counter[str] = Counter()
        for number, call in enumerate(graph.functions):
            made = [name for name in call.outputs if name]
            if made and call.is_replayable:
                self._pieces[number] = _Piece.of(call, graph)
                self._calls.setdefault(max(made, key=order.__getitem__), []).append(number)
                self._n_readers.update(self._pieces[number].read)

    def run(self) -> dict[int, bool]:
        """Number of a call -> whether its backward is its own."""
        found = {number: not call.is_replayable for number, call in enumerate(self._graph.functions)}
        held: Values = {}
        learning: set[str] = set()  # names of nodes whose values follow parameters
        for node, value in graph_values(self._graph.fx_graph, self._state(), self._leaves()):
            if self._follows_parameters(node, learning):
                learning.add(node.name)
            if node.name in self._n_readers:
                held[node.name] = value.detach().clone() if isinstance(value, Tensor) else value
            for number in self._calls.get(node.name, ()):
                piece = self._pieces[number]
                by = learning.intersection(piece.read) if torch.is_grad_enabled() else set()
                found[number] = bool(by) and piece.differs({name: held[name] for name in piece.read}, sorted(by))
                self._n_readers.subtract(piece.read)
                held = {name: value for name, value in held.items() if self._n_readers[name]}
        return found

    def _state(self) -> dict[str, Tensor]:
        return {name: entry.tensor for name, entry in self._graph.state.items()}

    def _leaves(self) -> list[Any]:
        """The example; two samples of it where the batch is free, as batch norms need in train mode."""
        inputs = self._graph.inputs
        own = inputs.with_batch(2) if self._graph.batch_hint is not None else inputs.copy()
        return pytree.tree_leaves((own.args, own.kwargs))

    def _follows_parameters(self, node: fx.Node, learning: set[str]) -> bool:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
            return False
        if node.target in (torch.ops.aten.detach.default, torch.ops.aten.detach_.default):
            return False
        if node.op == "get_attr":
            return self._graph.state[str(node.target)].kind == "parameter"
        return torch.is_grad_enabled() and any(operand.name in learning for operand in node.all_input_nodes)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A function and its operators.

    Attributes:
        call: the call of the function.
        inside: its operators, in execution order.
        read: names of the nodes that it is given, and of others that its operators read.
        parameters: tensor of the model by the name of its node, for those that are only read.
    """

    call: FunctionCall
    inside: tuple[fx.Node, ...]
    read: tuple[str, ...]
    parameters: Mapping[str, Tensor]

    @classmethod
    def of(cls, call: FunctionCall, graph: Graph) -> "_Piece":
        names = set(call.operators)
        inside = tuple(node for node in graph if node.name in names)
        others = [n for node in inside for n in node.all_input_nodes if n.name not in names]
        read = dict.fromkeys([*call.inputs, *(node.name for node in others)])
        unseen = [node for node in others if node.op == "get_attr" and node.name not in call.inputs]
        return cls(call, inside, tuple(read), {node.name: graph.state[str(node.target)].tensor for node in unseen})

    def differs(self, values: Values, by: list[str]) -> bool:
        """Whether gradients by some of the values differ, on any of several changes of the values.

        Args:
            values: what is read, by name.
            by: names of those whose gradients count.
        """
        for dtype in (torch.float64, None):
            given = {name: _as(value, dtype) for name, value in values.items()}
            try:
                is_other = self._differs(given, by)
            except Exception:  # the function takes no float64, or cannot be called again at all
                continue
            return is_other or any(self._differs_if_it_runs(self._drawn(given, scale), by) for scale in (1.0, 10.0))
        return True

    def _differs_if_it_runs(self, values: Values, by: list[str]) -> bool:
        try:
            return self._differs(values, by)
        except Exception:  # numbers drawn at random may be none that the function takes
            return False

    def _drawn(self, values: Values, scale: float) -> Values:
        """The same with random numbers in place of the floating tensors that the function is given."""
        drawn = {n: scale * torch.randn_like(v) for n, v in values.items() if n in self.call.inputs and _is_real(v)}
        return {**values, **drawn}

    def _differs(self, values: Values, by: list[str]) -> bool:
        """Compare gradients beside the values: an example is often full of zeros, where slopes have corners."""
        near = {
            n: v + 1e-3 * torch.randn_like(v) if n in self.call.inputs and _is_real(v) else v for n, v in values.items()
        }
        torch.manual_seed(0)
        leaves = self._leaves(near, by)
        made = self._results(near | leaves)
        places = [n for n, name in enumerate(self.call.outputs) if name and _is_differentiable(made[name])]
        slopes = [torch.randn_like(made[self.call.outputs[n]]) for n in places]
        by_graph = _gradients([made[self.call.outputs[n]] for n in places], leaves, slopes)

        torch.manual_seed(0)
        for tensor in self.parameters.values():
            tensor.grad = None
        leaves = self._leaves(near, by)
        results = self.call.run({name: _copied((near | leaves)[name]) for name in self.call.inputs})
        by_function = _gradients([results[n] for n in places], leaves, slopes)
        by_function |= {n: t.grad for n, t in self.parameters.items() if n in by and t.grad is not None}
        return any(_are_different(by_graph[name], by_function[name]) for name in by)

    @staticmethod
    def _leaves(values: Values, by: list[str]) -> dict[str, Tensor]:
        return {name: values[name].detach().clone().requires_grad_() for name in by}

    def _results(self, values: Values) -> Values:
        """Values of all operators inside, and of what they read."""
        found = {name: _copied(value) for name, value in values.items()}
        for node in self.inside:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: found[operand.name])
            found[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
        return found


def _as(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if dtype is not None and _is_real(value) else value


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _copied(value: Any) -> Any:
    """A tensor that may be written to."""
    return value.clone() if isinstance(value, Tensor) else value


def _gradients(outputs: list[Tensor], leaves: Mapping[str, Tensor], slopes: list[Tensor]) -> dict[str, Tensor]:
    """Gradients by the leaves, zero where an output does not depend on them."""
    pairs = [(out, slope) for out, slope in zip(outputs, slopes, strict=True) if out.requires_grad]
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if pairs:
        outs, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(outs, list(leaves.values()), weights, allow_unused=True)
    return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), found, strict=True)}


def _are_different(one: Tensor, other: Tensor) -> bool:
    """Whether two gradients differ by more than rounding, or only one is finite, as that of a root kept from zero."""
    tolerance = _TOLERANCES.get(one.dtype, _TOLERANCE)
    known = one.isfinite() & other.isfinite()
    if bool((one.isfinite() != other.isfinite()).any()):
        return True
    one, other = (gradient[known].to(torch.complex128) for gradient in (one, other))
    if not one.numel():
        return False
    return bool((one - other).abs().max() > tolerance * torch.maximum(one.abs().max(), other.abs().max()))
