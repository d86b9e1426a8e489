"""Capture: a model becomes a torch.fx graph of ATen operators, with shapes, parameter names and source lines."""

from torchshear.graph._capture import capture, trace, trace_inputs
from torchshear.graph._check import failure_of
from torchshear.graph._copy import copy_model
from torchshear.graph._cost import Cost, node_macs
from torchshear.graph._graph import Graph, Mode, StateTensor
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._location import Location, enclosing_modules, locate
from torchshear.graph._meta import is_on_meta, parameters_on_meta
from torchshear.graph._mode import as_if_exporting
from torchshear.graph._outputs import output_leaves, plain_outputs

__all__ = [
    "Cost",
    "ExampleInputs",
    "Graph",
    "Location",
    "Mode",
    "StateTensor",
    "as_if_exporting",
    "capture",
    "copy_model",
    "enclosing_modules",
    "failure_of",
    "is_on_meta",
    "locate",
    "node_macs",
    "output_leaves",
    "parameters_on_meta",
    "plain_outputs",
    "trace",
    "trace_inputs",
]
