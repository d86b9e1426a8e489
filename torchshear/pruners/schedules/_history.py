"""History of a training: what a schedule asked for, what was reached, and how the loss went."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from torchshear.pruners.schedules._drawing import Line, draw_lines


@dataclass(frozen=True, slots=True)
class Renewal:
    """A renewal of masks.

    Attributes:
        step: steps of the optimizer that had been made.
        epoch: number of the epoch; -1 before the first.
        asked: share that the schedule asked for, in the unit of `History.unit`.
        reached: share that is gone by now, likewise.
        widths: what is left of each group that may shrink, in units; for masks of single weights of each layer.
    """

    step: int
    epoch: int
    asked: float
    reached: float
    widths: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Residuals:
    """Residuals of `ADMM` at a projection: how far weights are from what they are pulled to.

    Attributes:
        step: steps of the optimizer that had been made.
        primal: ||W - Z|| over ||W||.
        dual: rho ||Z - Z_before||.
        by_name: the first for each channel group, or for each parameter with masks of single weights.
    """

    step: int
    primal: float
    dual: float
    by_name: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class History:
    """History of the pruning of a model that trains.

    Attributes:
        target: share that is asked for in the end.
        unit: what shares are of: "channels", "MACs", "parameters" or "weights".
        renewals: the renewals of masks, in order.
        steps: steps of the optimizer that had been made where a loss or penalty was told.
        losses: the loss there; NaN where none was told.
        penalties: the penalty there; NaN where there was none.
        note: what is missing at the end, or "".
        residuals: those of `ADMM`, in order.
    """

    target: float
    unit: str
    renewals: tuple[Renewal, ...] = ()
    steps: tuple[int, ...] = ()
    losses: tuple[float, ...] = field(default=(), repr=False)
    penalties: tuple[float, ...] = field(default=(), repr=False)
    note: str = ""
    residuals: tuple[Residuals, ...] = ()

    @property
    def asked(self) -> float:
        """Share that the last renewal asked for; 0 before the first."""
        return self.renewals[-1].asked if self.renewals else 0.0

    @property
    def reached(self) -> float:
        """Share that is gone after the last renewal; 0 before the first."""
        return self.renewals[-1].reached if self.renewals else 0.0

    def __str__(self) -> str:
        """A line for people: how far it has come."""
        now = f"{self.reached:.1%} of the {self.unit} gone, {self.asked:.1%} asked by now, {self.target:.1%} in the end"
        return f"{now}; {self.note}" if self.note else now

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw ratio, loss, penalty, residuals and widths over the steps of the optimizer.

        Args:
            path: the file to write, .png, .svg or .pdf.

        Raises:
            ArgumentError: matplotlib is not installed, or `path` is no path or ends otherwise.
            OutputError: the file cannot be written; what was there before is unchanged.
        """
        steps = [one.step for one in self.renewals]
        end = max([*steps, *self.steps, *(one.step for one in self.residuals), 1])
        held = (*steps, end)
        panels = {
            f"{self.unit} gone": [
                _held("asked", held, [one.asked for one in self.renewals]),
                _held("reached", held, [one.reached for one in self.renewals]),
            ]
        }
        for label, values in (("loss", self.losses), ("penalty", self.penalties)):
            told = [(step, value) for step, value in zip(self.steps, values, strict=True) if value == value]
            if told:
                panels[label] = [Line(label, [step for step, _ in told], [value for _, value in told])]
        if self.residuals:
            at = [one.step for one in self.residuals]
            primal, dual = [one.primal for one in self.residuals], [one.dual for one in self.residuals]
            panels["residuals"] = [Line("primal", at, primal), Line("dual", at, dual)]
        names = list(self.renewals[0].widths) if self.renewals else []
        if names:
            panels["left"] = [_held(name, held, [one.widths[name] for one in self.renewals]) for name in names]
        draw_lines(str(self), "step", panels, path)


def _held(name: str, steps: tuple[int, ...], values: list[float] | list[int]) -> Line:
    """A value that holds from one renewal to the next, and from the last to the end."""
    last = values[-1:] if values else []
    return Line(name, steps if values else (), (*values, *last), is_step=True)
