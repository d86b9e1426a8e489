"""Loading a checkpoint into a model, one tensor at a time, with ties kept."""

from collections import defaultdict
from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn

from torchshear.errors import ArgumentError, CheckpointError
from torchshear.graph.model._checks import check_has_shape, check_module
from torchshear.graph.model._process import outside_inference_mode
from torchshear.storage._checkpoint import Checkpoint, match_names, open_checkpoint

_Slot = tuple[dict[str, Tensor | None], str]  # where a module keeps a tensor


@outside_inference_mode()
def load_checkpoint(model: nn.Module, source: str | PathLike[str]) -> None:
    """Give a model the tensors of a checkpoint, which may be on the meta device before.

    It does what `load_state_dict(assign=True)` does, reads one tensor at a time and leaves tied parameters tied.
    Tensors have the types of the checkpoint. Nothing is changed if the checkpoint does not fit.

    Args:
        model: the model; changed in place.
        source: folder of a checkpoint in safetensors, with one file or with shards and an index.

    Raises:
        ArgumentError: `model` is not a module; buffers that no checkpoint holds are on the meta device.
        CheckpointError: the checkpoint is damaged, lacks a tensor, has one too many, or has one of another shape.

    Example:
        >>> import tempfile, torch, torchshear
        >>> from safetensors.torch import save_model
        >>> model = torch.nn.Linear(4, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(model, f"{folder}/model.safetensors")
        ...     _ = torchshear.load_checkpoint(torch.nn.Linear(4, 8, device="meta"), folder)
    """
    check_module(model)
    for name, parameter in model.named_parameters():
        check_has_shape(name, parameter)
    checkpoint = open_checkpoint(source)
    tensors, slots, unsaved = _find_slots(model)
    lost = sorted(name for name in unsaved if tensors[name].is_meta and tensors[name].numel())
    if lost:
        raise ArgumentError(
            f"buffer {lost[0]!r} is on the meta device, and a state_dict does not hold it. Make the model under "
            f"torchshear.graph.parameters_on_meta(), which gives buffers their values."
        )
    names = match_names(checkpoint, tensors.keys() - unsaved).names
    _check_match(model, checkpoint, {given: tensors[name] for given, name in names.items()}, tensors, unsaved)
    for name in unsaved:
        if tensors[name].is_meta:  # an empty one, which has no values to lose
            _replace(slots, tensors[name], torch.empty_like(tensors[name], device="cpu"))
    for given, name in names.items():
        old, new = tensors[name], checkpoint[given].clone()  # a copy, since the file may be replaced
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        _replace(slots, old, new)


def _replace(slots: dict[int, list[_Slot]], old: Tensor, new: Tensor) -> None:
    """Put a tensor into all slots of another; nothing is left to do for a tie that a checkpoint holds twice."""
    for holder, key in slots.pop(id(old), ()):
        holder[key] = new


def _find_slots(model: nn.Module) -> tuple[dict[str, Tensor], dict[int, list[_Slot]], set[str]]:
    """Return all tensors by every name, the slots of each, and the names that a state_dict leaves out."""
    tensors: dict[str, Tensor] = {}
    slots: dict[int, list[_Slot]] = defaultdict(list)
    unsaved: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    name = f"{path}.{key}" if path else key
                    tensors[name] = tensor
                    slots[id(tensor)].append((holder, key))
                    if holder is module._buffers and key in module._non_persistent_buffers_set:
                        unsaved.add(name)
    return tensors, slots, unsaved


def _check_match(
    model: nn.Module,
    checkpoint: Checkpoint,
    matched: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    unsaved: set[str],
) -> None:
    """Raise unless the checkpoint holds exactly what the model saves, in its shapes."""
    what, kind = f"the checkpoint in {str(checkpoint.folder)!r}", type(model).__name__
    for given, tensor in matched.items():
        if checkpoint.entries[given].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{given!r} has shape {checkpoint.entries[given].shape} in {what}; in {kind} it has "
                f"{tuple(tensor.shape)}. Expected the checkpoint of this very model, shrunk by the same plan."
            )
    strange = sorted(set(checkpoint) - set(matched))
    if strange:
        raise CheckpointError(
            f"{what} holds {strange[0]!r}, which {kind} has not. Expected the checkpoint of this model."
        )
    present = {id(tensor) for tensor in matched.values()}
    missing = sorted(name for name, tensor in tensors.items() if name not in unsaved and id(tensor) not in present)
    if missing:
        raise CheckpointError(f"{what} lacks {missing[0]!r}, which {kind} has. Expected the checkpoint of this model.")
