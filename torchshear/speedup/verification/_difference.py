"""Naming the first value that differs between the reference and a rewritten graph."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchshear.errors import VerificationError
from torchshear.graph import ExampleInputs, locate
from torchshear.graph._run import graph_values
from torchshear.speedup.comparing._compare import relative_error, tolerance
from torchshear.speedup.rewriting._cut_positions import gather, map_axes
from torchshear.speedup.rewriting._rewrite import rewrite_graph
from torchshear.speedup.verification._reference import MaskedNetwork
from torchshear.speedup.verification._runs import conditions, leaves_of
from torchshear.speedup.verification._weights import State, Values


def first_difference(values: Values, state: State, inputs: ExampleInputs, dtype: torch.dtype, error: float) -> str:
    """Run the masked and the rewritten graph side by side and say which value is not the same first.

    Args:
        values: what the cut makes of tensors.
        state: canonical name -> tensor of the original in `dtype`.
        inputs: inputs on which the models differ, in `dtype`.
        dtype: dtype to compute in.
        error: by how much the outputs differ.
    """
    cut, facts, graph = values.cut, values.groups.facts, values.groups.graph
    network = MaskedNetwork(graph.fx_graph, facts, cut, values.masked(state))
    rewritten = rewrite_graph(graph.fx_graph, facts, cut)
    with conditions(dtype):
        small = graph_values(rewritten, values.sliced(state), leaves_of(inputs.copy()))
        right = {node.name: (node, value) for node, value in _until_failure(small)}
        for node, (value,) in _until_failure(network.values([leaves_of(inputs.copy())])):
            if node.name not in right:
                return f"the rewritten graph fails at {node.name!r}, {locate(node)}: its operator rule is wrong."
            try:
                kept = map_axes(lambda tensor, own: gather(tensor, own, cut), value, facts.axes.get(node.name))
            except (IndexError, RuntimeError):
                return f"{node.name!r}, {locate(node)}, has other axes than its operator rule says."
            if node.op == "call_function" and isinstance(kept, Tensor) and kept.is_floating_point():
                difference = relative_error([kept], [right[node.name][1]])
                if difference > tolerance([kept]):
                    return (
                        f"the shrunk model differs from the masked model by {error:.2g} relative. The first value that "
                        f"differs is {node.name!r}, {locate(node)}, by {difference:.2g}. Expected at most "
                        f"{tolerance([kept]):.0e}: the rule of that operator does not describe this call."
                    )
    return (
        f"the shrunk model differs from the masked model by {error:.2g} relative, though its graph does not: the model "
        f"given is not what the plan makes of the original. Shrink the original with this plan again."
    )


def _until_failure(values: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    try:
        yield from values
    except (RuntimeError, TypeError, ValueError, IndexError, VerificationError):
        return  # the node after the last one given is the one that fails
