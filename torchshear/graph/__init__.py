"""Capture: a model becomes a torch.fx graph of ATen operators, with shapes, parameter names and source lines."""

from torchshear.graph import _masked_operators  # registers the masked forms of the ATen operators
from torchshear.graph._accepted import check_module, check_sized
from torchshear.graph._alone import alone, outside_inference_mode
from torchshear.graph._caches import Cache, caches_of, forget
from torchshear.graph._capture import capture, trace, trace_inputs
from torchshear.graph._check import failure_of
from torchshear.graph._contract import output_leaves, plain_outputs
from torchshear.graph._copy import copy_model
from torchshear.graph._cost import Cost, node_macs
from torchshear.graph._free_sizes import free_dimensions
from torchshear.graph._functions import FunctionCall
from torchshear.graph._graph import Graph, Mode, StateTensor
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._keeping import kept_state
from torchshear.graph._location import Location, enclosing_modules, first_names, locate, module_outputs
from torchshear.graph._masked import MaskedCall, among_zeros, masked_form, masked_operator, zeros_are_exact
from torchshear.graph._meta import is_on_meta, parameters_on_meta
from torchshear.graph._mode import as_if_exporting
from torchshear.graph._names import as_names, close_to, matches
from torchshear.graph._output_names import output_names
from torchshear.graph._outputs import check_outputs, output_nodes, shape_with_batch
from torchshear.graph._parts import PartRun, Parts, whole_of
from torchshear.graph._recording import record_parts

assert _masked_operators

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
    "capture",
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
