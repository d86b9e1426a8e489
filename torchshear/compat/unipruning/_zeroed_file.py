"""The checkpoint that UniPruning writes when it has zeroed channels: all that a training needs to go on."""

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from torchshear.errors import ArgumentError, CheckpointError, first_line
from torchshear.storage._reading import UnreadableError, check_plain
from torchshear.storage._writing import atomic_path
from torchshear.training._session import PruningSession
from torchshear.training._snapshot import zeroed_copy

_FORMAT: Final = "torchshear.unipruning"
_VERSION: Final = 1


def write_zeroed(
    path: Path, epoch: int, model: nn.Module, session: PruningSession, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write a file for `torch.load(path, weights_only=True)`.

    "weights" are those of the model without masks, with zeros where they are; "model" is the state with masks, and what
    is below them.

    Raises:
        OutputError: the file cannot be written; what was there before is unchanged.
    """
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "epoch": epoch,
        "weights": zeroed_copy(session).state_dict(),
        "model": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "session": session.state_dict(),
    }
    with atomic_path(path) as temporary:
        torch.save(document, temporary)


def read_zeroed(path: Path, model: nn.Module, session: PruningSession, optimizer: torch.optim.Optimizer | None) -> int:
    """Read a file into a model, its session and its optimizer, and return the epoch to go on with.

    Raises:
        ArgumentError: it is of another model, another optimizer or other settings; nothing has changed then.
        CheckpointError: it cannot be read.
    """
    document = _read(path)
    state, own = document["model"], model.state_dict()
    misfit = next((name for name in own.keys() | state.keys() if _shape(own, name) != _shape(state, name)), None)
    if misfit is not None:
        raise ArgumentError(
            f"{str(path)!r} is of another model: {misfit!r} has shape {_shape(state, misfit)} in it, and "
            f"{_shape(own, misfit)} here."
        )
    held = document["optimizer"]
    if (held is None) != (optimizer is None):
        has, lacks = ("the file", "apply(optimizer=...)") if optimizer is None else ("apply()", "the file")
        raise ArgumentError(f"{str(path)!r}: {has} has an optimizer, and {lacks} has none; give the one that trained.")
    before = None if optimizer is None else optimizer.state_dict()
    try:
        if optimizer is not None:
            optimizer.load_state_dict(held)
        session.load_state_dict(document["session"])
    except (ValueError, KeyError, TypeError) as error:
        if optimizer is not None:
            optimizer.load_state_dict(before)  # type: ignore[arg-type]
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"{str(path)!r} is of another optimizer: {first_line(error)}.") from error
    model.load_state_dict(state)
    return int(document["epoch"])


def _read(path: Path) -> dict[str, Any]:
    try:
        check_plain(path)
        document: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except UnreadableError as error:
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: it {error}.") from error
    except Exception as error:  # torch.load raises what its parts do
        raise CheckpointError(
            f"{str(path)!r} cannot be read as a checkpoint: {first_line(error)}. Take another."
        ) from error
    is_ours = isinstance(document, dict) and document.get("format") == _FORMAT and document.get("version") == _VERSION
    parts = {"epoch": int, "weights": dict, "model": dict, "session": dict}
    if not is_ours or any(not isinstance(document.get(name), kind) for name, kind in parts.items()):
        raise CheckpointError(f"{str(path)!r} is no checkpoint of a UniPruner of this version; take another.")
    return document


def _shape(state: Any, name: str) -> tuple[int, ...] | None:
    value = state.get(name)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
