"""Capture: a model becomes a torch.fx graph of ATen operators, with shapes, parameter names and source lines."""

from torchshear.graph._contract import output_leaves, plain_outputs
from torchshear.graph._cost import Cost, node_macs
from torchshear.graph._function_call import FunctionCall
from torchshear.graph._graph import Graph, StateTensor
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._location import Location, enclosing_modules, first_names, locate, module_outputs
from torchshear.graph._names import as_names, close_to, matches
from torchshear.graph._output_names import output_names
from torchshear.graph._outputs import check_outputs, output_nodes, shape_with_batch
from torchshear.graph._parts import PartRun, Parts, whole_of
from torchshear.graph.capture._check import failure_of
from torchshear.graph.capture._dynamic_sizes import free_dimensions
from torchshear.graph.capture._recording import record_parts
from torchshear.graph.capture._trace import capture_in_mode, trace, trace_inputs
from torchshear.graph.masked import _operators  # registers the masked forms of the ATen operators
from torchshear.graph.masked._call import MaskedCall, among_zeros, masked_form, masked_operator, zeros_are_exact
from torchshear.graph.model._alone import alone, outside_inference_mode
from torchshear.graph.model._caches import Cache, caches_of, forget
from torchshear.graph.model._checks import check_module, check_sized
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._meta import is_on_meta, parameters_on_meta
from torchshear.graph.model._mode import Mode, as_if_exporting
from torchshear.graph.model._preserve import kept_state

assert _operators

__all__ = [
    "Cache",
    "Cost",
    "ExampleInputs",
    "FunctionCall",
    "Graph",
    "Location",
    "MaskedCall",
    "Mode",
    "PartRun",
    "Parts",
    "StateTensor",
    "alone",
    "among_zeros",
    "as_if_exporting",
    "as_names",
    "caches_of",
    "capture_in_mode",
    "check_module",
    "check_outputs",
    "check_sized",
    "close_to",
    "copy_model",
    "enclosing_modules",
    "failure_of",
    "first_names",
    "forget",
    "free_dimensions",
    "is_on_meta",
    "kept_state",
    "locate",
    "masked_form",
    "masked_operator",
    "matches",
    "module_outputs",
    "node_macs",
    "output_leaves",
    "output_names",
    "output_nodes",
    "outside_inference_mode",
    "parameters_on_meta",
    "plain_outputs",
    "record_parts",
    "shape_with_batch",
    "trace",
    "trace_inputs",
    "whole_of",
    "zeros_are_exact",
]
