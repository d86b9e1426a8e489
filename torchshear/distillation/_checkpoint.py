"""File of a distillation, from which it goes on."""

import json
import os
from collections.abc import Mapping
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchshear.errors import ArgumentError, CheckpointError, first_line
from torchshear.storage._reading import as_path
from torchshear.storage._writing import atomic_path

_MOMENTS: Final = ("exp_avg", "exp_avg_sq", "step")


class RunCheckpoint:
    """Weights and moments of a run in a file, or nowhere.

    Args:
        path: the file; None for none.
        weights: weights by name.
        optimizer: holds their moments.
        settings: numbers that a run must have in common with the one that wrote the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        settings: Mapping[str, float],
    ) -> None:
        self.path = None if path is None else as_path(path, "the path of a checkpoint")
        self.weights, self.optimizer, self.settings = weights, optimizer, settings

    def save(self, step: int) -> None:
        """Write the file; what was there before stays until it is whole."""
        if self.path is None:
            return
        tensors = {f"weight {name}": weight.detach().contiguous() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            for key, value in self.optimizer.state.get(weight, {}).items():
                tensors[f"{key} {name}"] = value.contiguous()
        with atomic_path(self.path) as temporary:
            save_file(tensors, temporary, {"torchshear": json.dumps({"step": step, **self.settings})})

    def load(self) -> int:
        """Read the file, if there is one, and return the steps that were made.

        Raises:
            ArgumentError: it is of another run.
            CheckpointError: it cannot be read.
        """
        try:
            if self.path is None or not self.path.exists():
                return 0
            with safe_open(self.path, "pt") as file:
                said = json.loads((file.metadata() or {}).get("torchshear", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{str(self.path)!r} cannot be read as a checkpoint: {first_line(error)}. Delete it to begin anew."
            ) from error
        step = said.pop("step", None) if isinstance(said, dict) else None
        is_step = isinstance(step, int) and 0 < step <= self.settings["steps"]
        if step is None or said != self.settings or not is_step or not self._fits(tensors):
            raise ArgumentError(
                f"{str(self.path)!r} is of another run: its settings or shapes are not those of this call "
                f"({', '.join(f'{key}={value}' for key, value in self.settings.items())}). Delete it to begin anew, or "
                f"choose another file."
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weight {name}"])
                held = {key: tensors[f"{key} {name}"] for key in _MOMENTS if f"{key} {name}" in tensors}
                if held:  # none for a weight that no output depends on
                    self.optimizer.state[weight] = {key: value.to(weight.device) for key, value in held.items()}
        return int(step)

    def _fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Check that all weights are there, each with all of its moments or none."""
        for name, weight in self.weights.items():
            moments = [tensors.get(f"{key} {name}") for key in _MOMENTS]
            shapes = [one.shape for one in moments if one is not None]
            if shapes and shapes != [weight.shape, weight.shape, torch.Size()]:
                return False
        names = {name.partition(" ")[2] for name in tensors}
        weights = {name: tensors.get(f"weight {name}") for name in self.weights}
        return names == set(weights) and all(
            tensor is not None and tensor.shape == self.weights[name].shape for name, tensor in weights.items()
        )
