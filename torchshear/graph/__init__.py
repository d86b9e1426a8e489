"""Capture: a model becomes a torch.fx graph of ATen operators, with shapes, parameter names and source lines."""

from torchshear.graph._graph import Cost, Graph
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph.masked import _operators as _masked_operators  # registers the masked forms of the ATen operators
from torchshear.graph.model._meta import parameters_on_meta

assert _masked_operators

__all__ = [
    "Cost",
    "ExampleInputs",
    "Graph",
    "parameters_on_meta",
]
