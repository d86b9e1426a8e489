"""Capture: a model becomes a torch.fx graph of ATen operators, with shapes, parameter names and source lines."""

from torchshear.graph._cost import Cost, node_macs
from torchshear.graph._function_call import FunctionCall
from torchshear.graph._graph import Graph, StateTensor, check_outputs, output_nodes, shape_with_batch
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._location import Location, canonical_module_names, enclosing_modules, locate, module_outputs
from torchshear.graph._names import close_names, matches, parse_names
from torchshear.graph._operator import (
    Activation,
    Norm,
    Operator,
    Product,
    Recurrence,
    describe_operator,
    operator_name,
    operator_named,
    operator_of,
)
from torchshear.graph._outputs import drop_opaque_outputs, output_leaves, output_names
from torchshear.graph._parts import PartRun, Parts, whole_model
from torchshear.graph.capture._check import run_failure
from torchshear.graph.capture._dynamic_sizes import dynamic_dimensions
from torchshear.graph.capture._recording import record_parts
from torchshear.graph.capture._trace import capture_in_mode, trace, trace_inputs
from torchshear.graph.masked import _operators as _masked_operators  # registers the masked forms of the ATen operators
from torchshear.graph.masked._call import MaskedCall, masked_form, masked_operator, scatter_into_zeros, zeros_are_exact
from torchshear.graph.model._caches import Cache, clear_caches, find_caches
from torchshear.graph.model._checks import check_has_shape, check_module, signature_of
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._meta import is_on_meta, parameters_on_meta
from torchshear.graph.model._process import outside_inference_mode, run_exclusively, set_exporting_flag
from torchshear.graph.model._state import Mode, preserve_state

assert _masked_operators

__all__ = [
    "Activation",
    "Cache",
    "Cost",
    "ExampleInputs",
    "FunctionCall",
    "Graph",
    "Location",
    "MaskedCall",
    "Mode",
    "Norm",
    "Operator",
    "PartRun",
    "Parts",
    "Product",
    "Recurrence",
    "StateTensor",
    "canonical_module_names",
    "capture_in_mode",
    "check_has_shape",
    "check_module",
    "check_outputs",
    "clear_caches",
    "close_names",
    "copy_model",
    "describe_operator",
    "drop_opaque_outputs",
    "dynamic_dimensions",
    "enclosing_modules",
    "find_caches",
    "is_on_meta",
    "locate",
    "masked_form",
    "masked_operator",
    "matches",
    "module_outputs",
    "node_macs",
    "operator_name",
    "operator_named",
    "operator_of",
    "output_leaves",
    "output_names",
    "output_nodes",
    "outside_inference_mode",
    "parameters_on_meta",
    "parse_names",
    "preserve_state",
    "record_parts",
    "run_exclusively",
    "run_failure",
    "scatter_into_zeros",
    "set_exporting_flag",
    "shape_with_batch",
    "signature_of",
    "trace",
    "trace_inputs",
    "whole_model",
    "zeros_are_exact",
]
