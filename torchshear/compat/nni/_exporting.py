"""Files that pruners write: weights, masks, and the small model as ONNX."""

import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from torchshear.pruners.masks import Masks
from torchshear.speedup.onnx._export import export_onnx
from torchshear.storage._writing import atomic_path

Path = str | os.PathLike[str]
Inputs = tuple[tuple[Any, ...] | Tensor, Mapping[str, Any] | None]


def write_files(
    paths: tuple[Path, Path | None, Path | None],
    state: Callable[[], Mapping[str, Tensor]],
    masks: Callable[[], Masks],
    small: Callable[[], nn.Module],
    example: Callable[[], Inputs],
) -> None:
    """Write the files of `export_model`; what they hold is only made where a path is given.

    Args:
        paths: for weights, for masks and for ONNX; None for no file.
        state: gives the weights.
        masks: gives the masks.
        small: gives the small model.
        example: gives its example inputs.

    Raises:
        ExportError: the model cannot be written as ONNX, or the file computes something else.
        OutputError: a file cannot be written; what was there before is unchanged.
    """
    model_path, mask_path, onnx_path = paths
    if onnx_path is not None:
        export_onnx(small(), onnx_path, *example())
    if mask_path is not None:
        masks().save(mask_path)
    tensors = {name: tensor.detach() for name, tensor in state().items()}
    with atomic_path(model_path) as temporary:
        is_safe = temporary.suffix == ".safetensors"
        temporary.write_bytes(_as_safetensors(tensors) if is_safe else _as_torch(tensors))


def _as_safetensors(state: Mapping[str, Tensor]) -> bytes:
    """The content of a file; tied tensors are written under each of their names."""
    return save({name: tensor.contiguous().clone() for name, tensor in state.items()})


def _as_torch(state: Mapping[str, Tensor]) -> bytes:
    content = io.BytesIO()
    torch.save(dict(state), content)
    return content.getvalue()
