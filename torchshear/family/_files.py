"""Files of a member of a family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from torchshear._making import PruneResult
from torchshear.errors import ExportError
from torchshear.speedup.latency import Device
from torchshear.speedup.latency._device import ONNXRUNTIME
from torchshear.speedup.onnx._export import OnnxFile, export_onnx
from torchshear.storage._writing import atomic_path


def write_member(member: PruneResult, folder: Path, name: str, device: Device) -> None:
    """Write the plan, the weights and the ONNX file of a member.

    Args:
        member: the member.
        folder: where they go.
        name: name of the member, which ends up in the names of the files.
        device: what it was measured on.

    Raises:
        OutputError: a file cannot be written.
        ExportError: the model cannot be exported, and the runtime of the device is onnxruntime.
    """
    assert member.plan.analysis is not None, "the plan was made in this process"
    inputs = member.plan.analysis.graph.inputs
    member.plan.save(folder / f"plan-{name}.json")
    with atomic_path(folder / f"model-{name}.safetensors") as temporary:
        save_model(member.model, str(temporary))  # tied tensors once, their other names in the metadata
    write_onnx(member.model, folder / f"pruned-{name}.onnx", inputs.args, inputs.kwargs, device)


def write_onnx(
    model: nn.Module, path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: Device
) -> OnnxFile | str:
    """Write an ONNX file; where the device is not one of onnxruntime, a model that cannot be exported has none.

    Returns:
        What was written, or why nothing was.

    Raises:
        OutputError: the file cannot be written.
        ExportError: the model cannot be exported, and the runtime of the device is onnxruntime.
    """
    try:
        return export_onnx(model, path, args, kwargs)
    except ExportError as error:
        if device.runtime == ONNXRUNTIME:
            raise
        return str(error)
