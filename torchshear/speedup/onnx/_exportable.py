"""What is refused before a model is converted to ONNX."""

import sys
from collections.abc import Sequence

import torch
from torch import nn

from torchshear._arguments import MOST, check_count, check_kind, is_whole, quote
from torchshear.errors import ArgumentError, ExportError, WeightError
from torchshear.speedup.onnx._example_call import ExampleCall


def check_limits(check_batches: Sequence[int], rtol: float, atol: float, opset: int | None) -> None:
    """Refuse batch sizes and opsets below 1 and tolerances that are negative or no number.

    Raises:
        ArgumentError: one of them is.
    """
    if opset is not None:
        check_count("opset", opset)
    check_kind("check_batches", check_batches, Sequence, "sizes of batches, as (1, 3)")
    for batch in check_batches:
        if not is_whole(batch) or not 1 <= batch <= MOST:
            raise ArgumentError(f"check_batches must hold whole numbers of at least 1, but got {quote(batch)}.")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise ArgumentError(f"{name} must be a finite number of at least 0, but got {name}={quote(value)}.")


def check_tensors(model: nn.Module, call: ExampleCall) -> None:
    """Refuse weights without values, and bfloat16: onnxruntime has no CPU kernel for its Conv, Gemm or MatMul.

    Raises:
        WeightError: a weight is on the meta device.
        ArgumentError: an input is.
        ExportError: a weight or an input is in bfloat16, or the model holds a ScriptModule.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise WeightError(f"{name!r} is on the meta device and has no values. Load the weights before the export.")
    if any(tensor.is_meta for tensor in call.tensors().values()):
        raise ArgumentError("an example input is on the meta device and has no values; expected numbers.")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ExportError("the model holds a ScriptModule, which torch.export refuses; give what it was made from.")
    tensors = (*model.parameters(), *model.buffers(), *call.tensors().values())
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise ExportError(
            f"{type(model).__name__} or an input of it is in bfloat16, for which onnxruntime has no CPU kernels. "
            f"Export copy.deepcopy(model).float(), with float32 inputs."
        )
