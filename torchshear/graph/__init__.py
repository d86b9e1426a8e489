"""Capture: a model becomes a torch.fx graph of ATen operators, with shapes, parameter names and source lines."""

from torchshear.graph._capture import capture, trace, trace_inputs
from torchshear.graph._check import failure_of
from torchshear.graph._cost import Cost, node_macs
from torchshear.graph._graph import Graph, Mode, StateTensor
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._location import Location, locate

__all__ = [
    "Cost",
    "ExampleInputs",
    "Graph",
    "Location",
    "Mode",
    "StateTensor",
    "capture",
    "failure_of",
    "locate",
    "node_macs",
    "trace",
    "trace_inputs",
]
