"""Comparison of a function's own backward with the gradients of its operators, on the same numbers."""

from collections import Counter, defaultdict
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

# Largest difference between two gradients that count as equal, relative to the largest number in them.
_TOLERANCES = {torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}
_TOLERANCE = 1e-3


def compare_backwards(graph: Graph) -> Graph:
    """Find the functions whose backward gives other gradients than their operators, and note it in their calls.

    Only gradients that reach a parameter count. They are compared in float64 where the function runs in it, both near
    the example and on random numbers, since the two may agree on the example by accident. Where they cannot be
    compared, as on the meta device, the backward is taken for another one.

    Args:
        graph: the captured model, in whose mode the model is.

    Returns:
        The graph with `has_own_backward` set in the calls of functions.
    """
    differs: Mapping[int, bool] = {}
    if not any(tensor.is_meta for tensor in [*graph.inputs.tensors(), *(e.tensor for e in graph.state.values())]):
        with _preserve_tensors(graph):
            try:
                differs = _compare_calls(graph)
            except Exception:  # the graph does not run on the example: code in it may need other values
                differs = {}
    calls = (replace(call, has_own_backward=differs.get(n, True)) for n, call in enumerate(graph.functions))
    return replace(graph, functions=tuple(calls))


@contextmanager
def _preserve_tensors(graph: Graph) -> Iterator[None]:
    """Restore buffers, gradients and the random number generator after a block that runs functions."""
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


def _compare_calls(graph: Graph) -> dict[int, bool]:
    """Run a graph, and compare each function with its operators once its last result is known.

    Returns:
        Number of a call -> whether its gradients differ.
    """
    order = {node.name: number for number, node in enumerate(graph)}
    comparisons: dict[int, _Comparison] = {}
    due: dict[str, list[int]] = defaultdict(list)  # calls by the node of their last result
    for number, call in enumerate(graph.functions):
        results = [name for name in call.outputs if name]
        if results and call.is_replayable:
            comparisons[number] = _Comparison.of(call, graph)
            due[max(results, key=order.__getitem__)].append(number)
    n_readers = Counter(name for comparison in comparisons.values() for name in comparison.read)
    state = {name: entry.tensor for name, entry in graph.state.items()}
    # Two samples where the batch is free, as batch norms need in train mode.
    inputs = graph.inputs.with_batch(2) if graph.batch_hint is not None else graph.inputs.copy()
    differs = {number: not call.is_replayable for number, call in enumerate(graph.functions)}
    held: Values = {}
    trained: set[str] = set()  # names of nodes whose values depend on parameters
    for node, value in graph_values(graph.fx_graph, state, pytree.tree_leaves((inputs.args, inputs.kwargs))):
        if _depends_on_parameters(node, trained, graph):
            trained.add(node.name)
        if node.name in n_readers:
            held[node.name] = value.detach().clone() if isinstance(value, Tensor) else value
        for number in due[node.name]:
            read = comparisons[number].read
            by = sorted(trained.intersection(read)) if torch.is_grad_enabled() else []
            differs[number] = bool(by) and comparisons[number].differs({name: held[name] for name in read}, by)
            n_readers.subtract(read)
            held = {name: value for name, value in held.items() if n_readers[name]}
    return differs


def _depends_on_parameters(node: fx.Node, trained: set[str], graph: Graph) -> bool:
    """Return whether gradients flow from a node's value to parameters, given the earlier nodes of which this holds."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        return False
    if node.target in (torch.ops.aten.detach.default, torch.ops.aten.detach_.default):
        return False
    if node.op == "get_attr":
        return graph.state[str(node.target)].kind == "parameter"
    return torch.is_grad_enabled() and any(operand.name in trained for operand in node.all_input_nodes)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A call of a function and its operators.

    Attributes:
        call: the call of the function.
        operators: its operators, in execution order.
        read: names of the nodes that are inputs of the function or that its operators read.
        parameters: tensors of the model that its operators read and that are no inputs, by the name of the node.
    """

    call: FunctionCall
    operators: tuple[fx.Node, ...]
    read: tuple[str, ...]
    parameters: Mapping[str, Tensor]

    @classmethod
    def of(cls, call: FunctionCall, graph: Graph) -> "_Comparison":
        names = set(call.operators)
        operators = tuple(node for node in graph if node.name in names)
        others = [n for node in operators for n in node.all_input_nodes if n.name not in names]
        read = dict.fromkeys([*call.inputs, *(node.name for node in others)])
        unseen = [node for node in others if node.op == "get_attr" and node.name not in call.inputs]
        parameters = {node.name: graph.state[str(node.target)].tensor for node in unseen}
        return cls(call, operators, tuple(read), parameters)

    def differs(self, values: Values, by: list[str]) -> bool:
        """Return whether gradients differ near the given values or on random ones.

        Args:
            values: the values that are read, by name.
            by: names of the values whose gradients count.
        """
        for dtype in (torch.float64, None):
            given = {n: v.to(dtype) if dtype is not None and _is_real(v) else v for n, v in values.items()}
            try:
                if self._differs_near(given, by):
                    return True
            except Exception:  # the function takes no float64, or cannot be called again at all
                continue
            for scale in (1.0, 10.0):
                drawn = {
                    n: scale * torch.randn_like(v) if n in self.call.inputs and _is_real(v) else v
                    for n, v in given.items()
                }
                try:
                    if self._differs_near(drawn, by):
                        return True
                except Exception:  # the function may not take random numbers
                    continue
            return False
        return True

    def _differs_near(self, values: Values, by: list[str]) -> bool:
        """Return whether gradients differ beside some values; examples are often full of zeros, where slopes change."""
        near = {
            n: v + 1e-3 * torch.randn_like(v) if n in self.call.inputs and _is_real(v) else v for n, v in values.items()
        }
        torch.manual_seed(0)
        leaves = {name: near[name].detach().clone().requires_grad_() for name in by}
        found = {name: _own_copy(value) for name, value in (near | leaves).items()}
        for node in self.operators:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: found[operand.name])
            found[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
        positions = [n for n, name in enumerate(self.call.outputs) if name and _is_differentiable(found[name])]
        slopes = [torch.randn_like(found[self.call.outputs[n]]) for n in positions]
        of_operators = _gradients([found[self.call.outputs[n]] for n in positions], leaves, slopes)

        torch.manual_seed(0)
        for tensor in self.parameters.values():
            tensor.grad = None
        leaves = {name: near[name].detach().clone().requires_grad_() for name in by}
        results = self.call.run({name: _own_copy((near | leaves)[name]) for name in self.call.inputs})
        of_function = _gradients([results[n] for n in positions], leaves, slopes)
        of_function |= {n: t.grad for n, t in self.parameters.items() if n in by and t.grad is not None}
        return any(_are_different(of_operators[name], of_function[name]) for name in by)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _own_copy(value: Any) -> Any:
    """Return a tensor that may be written to; other values as they are."""
    return value.clone() if isinstance(value, Tensor) else value


def _gradients(outputs: list[Tensor], leaves: Mapping[str, Tensor], slopes: list[Tensor]) -> dict[str, Tensor]:
    """Return the gradients of outputs by the leaves, zero where no output depends on a leaf.

    Args:
        outputs: tensors.
        leaves: name -> tensor that requires gradients.
        slopes: gradient by each output.
    """
    pairs = [(out, slope) for out, slope in zip(outputs, slopes, strict=True) if out.requires_grad]
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if pairs:
        outs, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(outs, list(leaves.values()), weights, allow_unused=True)
    return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), found, strict=True)}


def _are_different(one: Tensor, other: Tensor) -> bool:
    """Return whether two gradients differ by more than rounding.

    They do where only one is finite, as that of a square root that the function keeps away from zero.
    """
    tolerance = _TOLERANCES.get(one.dtype, _TOLERANCE)
    if bool((one.isfinite() != other.isfinite()).any()):
        return True
    known = one.isfinite()
    one, other = (gradient[known].to(torch.complex128) for gradient in (one, other))
    if not one.numel():
        return False
    return bool((one - other).abs().max() > tolerance * torch.maximum(one.abs().max(), other.abs().max()))
