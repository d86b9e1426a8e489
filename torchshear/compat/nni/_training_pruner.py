"""Base of the pruners that train, or that work while the user trains."""

import os
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count
from torchshear._making import PruneResult
from torchshear._other_tools import missing_method
from torchshear.compat.nni._exporting import write_files
from torchshear.compat.nni._in_place import InPlace
from torchshear.compat.nni._iterations import Iterations
from torchshear.configs import ResolvedConfig
from torchshear.errors import ArgumentError
from torchshear.pruners.masks import Masks
from torchshear.pruners.schedules import History


class TrainingPruner:
    """Common part of pruners that train, or that work while the user trains.

    Args:
        way: how the pruner works: on the model that is given, or in iterations of its own on a copy.
    """

    def __init__(self, way: InPlace | Iterations) -> None:
        self._way = way

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Say of methods of other tools what to use instead."""
            raise missing_method(type(self).__name__, name)

    def _in_place(self, method: str) -> InPlace:
        """The way of a pruner that works on the model that is given."""
        if isinstance(self._way, InPlace):
            return self._way
        raise ArgumentError(
            f"{method} goes with a model that you train; with total_iteration= compress() does it all. Leave it away."
        )

    @property
    def bound_model(self) -> nn.Module:
        """The model that was given."""
        return self._way.model

    @property
    def resolved(self) -> ResolvedConfig:
        """The config as it applies to each layer and channel group; `str()` of it is a table.

        Raises:
            ArgumentError: nothing is known yet of the model.
        """
        return self._way.resolved

    @property
    def table(self) -> str:
        """The resolved config as a table."""
        return str(self.resolved)

    @property
    def masks(self) -> Masks:
        """The masks as they are now, of all parameters of the model that was given."""
        return self._way.masks()

    @property
    def history(self) -> History | None:
        """Shares that were asked for and reached so far; None where iterations have none."""
        return self._way.session.history if isinstance(self._way, InPlace) else self._way.shrink().history

    def shrink(self) -> PruneResult:
        """Make the small model for real, and prove that it computes what the masked one does.

        The model that was given is left as it is, and may be trained on.

        Returns:
            As `torchshear.prune`, with the `history` of the training.

        Raises:
            ArgumentError: there is nothing to shrink yet.
            VerificationError: the small model is not equal to the masked one; nothing is returned then.
        """
        return self._way.shrink()

    def export_model(
        self,
        model_path: str | os.PathLike[str],
        mask_path: str | os.PathLike[str] | None = None,
        onnx_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write weights, masks and the small model.

        Args:
            model_path: for the `state_dict` of the whole model with zeros where it is masked, of iterations that of the
                small one: of safetensors if the name ends so, else as `torch.save` writes plain tensors, for
                `torch.load(..., weights_only=True)`.
            mask_path: for the masks, in safetensors; `torchshear.pruners.masks.Masks.load` reads them.
            onnx_path: for the small model as ONNX, run in onnxruntime and compared.

        Raises:
            ArgumentError: there is nothing to write yet.
            ExportError: the model cannot be written as ONNX, or the file computes something else.
            OutputError: a file cannot be written; what was there before is unchanged.
        """
        way = self._way
        write_files(
            (model_path, mask_path, onnx_path),
            lambda: way.dense_copy().state_dict() if isinstance(way, InPlace) else way.shrink().model.state_dict(),
            way.masks,
            lambda: way.shrink().model,
            way.inputs,
        )

    def load_model_state_dict(self, state: dict[str, Tensor]) -> None:
        """Give the model the weights that it had without masks, which stay.

        Args:
            state: the `state_dict` of the model from before `compress`.

        Raises:
            ArgumentError: the state is of another model; nothing has changed then.
        """
        self._in_place("load_model_state_dict()").load_weights(state)

    def get_pruned_weights(self, dim: int = 0) -> dict[str, float]:
        """Return the share of each masked parameter's lines that is masked as a whole.

        Args:
            dim: the dimension whose lines are counted; 0: outputs.
        """
        check_count("dim", dim, 0)
        found: dict[str, float] = {}
        for name, mask in self.masks.tensors.items():
            if dim < mask.ndim:
                lines = mask.movedim(dim, 0).flatten(1) if mask.ndim > 1 else mask[:, None]
                found[name] = 1 - float(lines.any(1).to(torch.float64).mean())
        return found
