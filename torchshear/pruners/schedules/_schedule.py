"""The form of all schedules: events at regular positions of a training, and the ratio that each of them asks for."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torchshear._arguments import check_count, check_one_of, check_share, quote
from torchshear.errors import ArgumentError
from torchshear.pruners.schedules._drawing import Line, draw_lines

By = Literal["step", "epoch", "event"]
_LEAST_START = -1  # the first share may have gone before the first step
_MOST_SHOWN = 1000  # events in a picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule(ABC):
    """Schedule of a training: position -> ratio.

    With K = floor((end - start) / frequency) there are K + 1 events, at the positions start + i * frequency for
    i = 0..K. Event i asks for the ratio f(i / K), which holds up to the next event: the initial ratio at event 0, and
    the final one at event K, which may come before `end`. Without room for a second event (K = 0) the only one asks for
    the final ratio at once.

    These are the events of Neural Compressor 2.x. NNI's 2.0 prunes before `end`: its `end_epoch` is `end + 1` here.

    Attributes:
        start: position of the first event; -1 for one that has passed when training begins.
        end: last position that an event may have, at least `start`.
        frequency: positions from one event to the next.
        initial: ratio at the first event, at most the final one.
        by: what positions count. "step": steps of the optimizer that were made. "epoch": the number of the epoch that
            begins. "event": calls of `PruningSession.on_event`, the first of which is position 0.

    Raises:
        ArgumentError: a position is no whole number, `end` lies before `start`, or a ratio is outside [0, 1).
    """

    is_at_once: ClassVar[bool] = False  # whether every event asks for the final ratio

    start: int = 0
    end: int
    frequency: int = 1
    initial: float = 0.0
    by: By = "step"

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        check_count("start", self.start, _LEAST_START)
        check_count("end", self.end, _LEAST_START)
        check_count("frequency", self.frequency)
        check_share("initial", self.initial)
        check_one_of("by", self.by, ("step", "epoch", "event"))
        if self.end < self.start:
            raise ArgumentError(
                f"end={self.end} lies before start={self.start}; expected a schedule that ends after it starts."
            )

    @abstractmethod
    def curve(self, share: float, initial: float, final: float) -> float:
        """Return the ratio at a share of the way from the first event to the last, of 0 < share < 1."""

    @property
    def n_steps(self) -> int:
        """K, the number of events behind the first."""
        return (self.end - self.start) // self.frequency

    @property
    def n_to_final(self) -> int:
        """Number of events after which the final ratio holds."""
        return 1 if self.is_at_once else self.n_steps + 1

    @property
    def events(self) -> Sequence[int]:
        """Positions of all events."""
        return range(self.start, self.start + self.n_steps * self.frequency + 1, self.frequency)

    def passed(self, position: int) -> int:
        """Count the events at a position and before it."""
        if position < self.start:
            return 0
        return min((position - self.start) // self.frequency, self.n_steps) + 1

    def ratio(self, position: int, final: float) -> float:
        """Return the ratio that holds at a position.

        Args:
            position: of the training, see `by`.
            final: ratio that is asked for in the end, in [0, 1).

        Raises:
            ArgumentError: `final` is outside [0, 1), or below the initial ratio; the position is no whole number.
        """
        check_count("position", position, _LEAST_START)
        check_share("final", final)
        if self.initial > final:
            raise ArgumentError(
                f"initial={self.initial} is above the final ratio {final}; expected a schedule that rises to it."
            )
        number = self.passed(position) - 1
        if number < 0:
            return 0.0
        if number + 1 >= self.n_to_final:
            return float(final)
        if number == 0:
            return float(self.initial)
        return min(float(final), self.curve(number / self.n_steps, self.initial, final))

    def draw(self, path: str | os.PathLike[str], final: float = 0.5) -> None:
        """Draw the ratio over positions.

        Args:
            path: the file to write, .png, .svg or .pdf.
            final: ratio that is asked for in the end.

        Raises:
            ArgumentError: matplotlib is not installed, `path` is no path or ends otherwise, or `final` is no ratio.
            OutputError: the file cannot be written.
        """
        check_share("final", final)
        last = self.events[-1] + max(1, (self.end - self.start) // 10)
        shown = self.events[:: max(1, len(self.events) // _MOST_SHOWN)]
        positions = sorted({max(0, self.start - self.frequency), *shown, self.events[-1], last})
        line = Line("ratio", tuple(positions), tuple(self.ratio(place, final) for place in positions), is_step=True)
        draw_lines(repr(self), self.by, {f"of {quote(final)}": [line]}, path)
