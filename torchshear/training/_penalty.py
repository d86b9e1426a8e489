"""The penalty of a session's regularizer: as a part of the loss, or as gradients beside it."""

import math

import torch
from torch import Tensor

from torchshear._arguments import quote
from torchshear.errors import ArgumentError, DataError
from torchshear.pruners.regularizers import Penalty
from torchshear.pruners.schedules import Residuals
from torchshear.training._masked_model import MaskedModel


class TrainingPenalty:
    """Adds a penalty once a step: by the loss, if its gradient came that way, else to the gradients.

    Args:
        penalty: the penalty.
        model: the model in training.
    """

    def __init__(self, penalty: Penalty, model: MaskedModel) -> None:
        self.penalty, self._model = penalty, model
        self._is_in_loss = False
        self._last = math.nan

    def begin_step(self) -> None:
        """Forget the step before."""
        self._is_in_loss, self._last = False, math.nan

    @property
    def last(self) -> float:
        """The penalty of this step; NaN if none was computed."""
        return self._last

    def value(self, step: int) -> Tensor:
        """Compute the penalty, for the loss."""
        value = self._compute(step)

        def noticed(gradient: Tensor) -> None:
            self._is_in_loss = True

        if value.requires_grad:
            value.register_hook(noticed)  # type: ignore[no-untyped-call]
        return value

    def add_gradients(self, step: int, scale: float) -> None:
        """Add the penalty's gradients, times a scale, to those of the parameters, unless the loss held it."""
        if self._is_in_loss:
            return
        parameters = [one for one in self._model.parameters.values() if one.requires_grad]
        with torch.enable_grad():
            value = self._compute(step)
            if not value.requires_grad:
                return
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is None:
                    continue
                gradient = gradient if scale == 1.0 else gradient * scale
                if parameter.grad is None:
                    parameter.grad = gradient.to(parameter.dtype)
                else:
                    parameter.grad.add_(gradient)

    def after_step(self, step: int) -> Residuals | None:
        """Let the penalty act behind a step of the optimizer; `step` were made before it."""
        self.penalty.after_step(self._model.weights(is_masked=False), step)
        return self.penalty.update(self._model.weights(), step + 1, "step")

    def after_epoch(self, step: int) -> Residuals | None:
        """Let the penalty act at the end of an epoch."""
        return self.penalty.update(self._model.weights(), step, "epoch")

    def _compute(self, step: int) -> Tensor:
        value = self.penalty.value(self._model.weights(), step)
        self._last = float(value.detach())
        if not math.isfinite(self._last):
            raise DataError(f"the penalty of step {step} is {self._last}; the weights are not finite any more.")
        return value


def as_scale(grad_scale: object) -> float:
    """Return what gradients were multiplied by, 1 for None.

    Raises:
        ArgumentError: it is no positive number.
    """
    if grad_scale is None:
        return 1.0
    is_number = isinstance(grad_scale, int | float) and not isinstance(grad_scale, bool)
    if not is_number or not 0 < grad_scale < math.inf:  # type: ignore[operator]
        raise ArgumentError(f"grad_scale={quote(grad_scale)}; expected a positive number, or None.")
    return float(grad_scale)  # type: ignore[arg-type]
