"""Files of a member of a family."""

from pathlib import Path

from safetensors.torch import save_model

from torchshear._making import PruneResult
from torchshear.speedup.onnx._export import export_onnx
from torchshear.storage._writing import atomic_path


def write_member(member: PruneResult, folder: Path, name: str) -> None:
    """Write the plan, the weights and the ONNX file of a member.

    Args:
        member: the member.
        folder: where they go.
        name: name of the member, which ends up in the names of the files.

    Raises:
        OutputError: a file cannot be written.
        ExportError: the model cannot be exported.
    """
    assert member.plan.analysis is not None, "the plan was made in this process"
    inputs = member.plan.analysis.graph.inputs
    member.plan.save(folder / f"plan-{name}.json")
    with atomic_path(folder / f"model-{name}.safetensors") as temporary:
        save_model(member.model, str(temporary))  # tied tensors once, their other names in the metadata
    export_onnx(member.model, folder / f"pruned-{name}.onnx", inputs.args, inputs.kwargs)
