"""The record of a training: renewals, losses and penalties, told to a writer as they come."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from torchshear.errors import ArgumentError, DataError
from torchshear.pruners.schedules import History, Renewal, Residuals


class Writer(Protocol):
    """Something that takes scalars, as `torch.utils.tensorboard.SummaryWriter` does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Take a scalar."""


def check_writer(writer: object) -> None:
    """Raise ArgumentError for what takes no scalars."""
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise ArgumentError(
            f"writer is {type(writer).__name__}; expected an object with add_scalar(tag, value, step), as a "
            f"SummaryWriter of TensorBoard, or None."
        )


class Recorder:
    """Gathers a `History`.

    Args:
        target: share that is asked for in the end.
        unit: what shares are of.
        writer: what takes scalars, or None.
    """

    def __init__(self, target: float, unit: str, writer: Writer | None) -> None:
        self._target, self._unit, self._writer = target, unit, writer
        self._renewals: list[Renewal] = []
        self._told: list[tuple[int, float, float]] = []
        self._residuals: list[Residuals] = []

    def renewed(self, renewal: Renewal) -> None:
        """Take note of a renewal."""
        self._renewals.append(renewal)
        if self._writer is not None:
            shown = {"asked": renewal.asked, "reached": renewal.reached}
            shown |= {f"left/{name}": float(width) for name, width in renewal.widths.items()}
            for tag, value in shown.items():
                self._writer.add_scalar(f"pruning/{tag}", value, renewal.step)

    def stepped(self, step: int, loss: float, penalty: float) -> None:
        """Take note of a loss and a penalty; NaN stands for none."""
        if math.isnan(loss) and math.isnan(penalty):
            return
        self._told.append((step, loss, penalty))
        if self._writer is not None:
            for tag, value in (("loss", loss), ("penalty", penalty)):
                if not math.isnan(value):
                    self._writer.add_scalar(f"pruning/{tag}", value, step)

    def settled(self, residuals: Residuals | None) -> None:
        """Take note of residuals; None stands for none."""
        if residuals is None:
            return
        self._residuals.append(residuals)
        if self._writer is not None:
            for tag, value in (("primal", residuals.primal), ("dual", residuals.dual)):
                self._writer.add_scalar(f"pruning/{tag}", value, residuals.step)

    def history(self, note: str = "") -> History:
        """Return all that was noted so far."""
        steps, losses, penalties = zip(*self._told, strict=True) if self._told else ((), (), ())
        renewals, residuals = tuple(self._renewals), tuple(self._residuals)
        return History(self._target, self._unit, renewals, steps, losses, penalties, note, residuals)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as lists of numbers and texts."""
        return {
            "renewals": [
                {"step": r.step, "epoch": r.epoch, "asked": r.asked, "reached": r.reached, "widths": dict(r.widths)}
                for r in self._renewals
            ],
            "told": [list(one) for one in self._told],
            "residuals": [[r.step, r.primal, r.dual, dict(r.by_name)] for r in self._residuals],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._renewals = [Renewal(**one) for one in state["renewals"]]
        self._told = [(int(step), float(loss), float(penalty)) for step, loss, penalty in state["told"]]
        self._residuals = [Residuals(*one) for one in state["residuals"]]


def loss_as_number(loss: object, step: int) -> float:
    """Return a loss as a number, NaN for None.

    Raises:
        ArgumentError: it is neither a number nor a scalar tensor.
        DataError: it is NaN or infinite.
    """
    if loss is None:
        return math.nan
    is_scalar = isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex()
    if not is_scalar and (not isinstance(loss, int | float) or isinstance(loss, bool)):
        raise ArgumentError(f"loss is {type(loss).__name__}; expected a number or a scalar tensor.")
    told = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)  # type: ignore[arg-type]
    if not math.isfinite(told):
        raise DataError(
            f"the loss of step {step} is {told}; expected a finite number. Check the data and the learning rate."
        )
    return told
