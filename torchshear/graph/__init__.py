"""Capture: a model becomes a torch.fx graph of ATen operators, with shapes, parameter names and source lines."""

from torchshear.graph._capture import capture, trace, trace_inputs
from torchshear.graph._check import failure_of
from torchshear.graph._cost import Cost, node_macs
from torchshear.graph._graph import Graph, StateTensor
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._location import Location, locate
from torchshear.graph._names import as_names, close_to, matches
from torchshear.graph._outputs import check_outputs, output_names, output_nodes, shape_with_batch

__all__ = [
    "Cost",
    "ExampleInputs",
    "Graph",
    "Location",
    "StateTensor",
    "as_names",
    "capture",
    "check_outputs",
    "close_to",
    "failure_of",
    "locate",
    "matches",
    "node_macs",
    "output_names",
    "output_nodes",
    "shape_with_batch",
    "trace",
    "trace_inputs",
]
