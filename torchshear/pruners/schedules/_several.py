"""Schedules of several parts of a model as one schedule of the whole."""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torchshear.errors import ArgumentError
from torchshear.pruners.schedules._schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Several(Schedule):
    """Schedules of parts of a model, each of which follows its own: an event wherever one of them has an event.

    Attributes:
        parts: the schedules.
        positions: positions of all their events, ascending.

    Raises:
        ArgumentError: they do not count the same.
    """

    parts: tuple[Schedule, ...]
    positions: tuple[int, ...]

    def __init__(self, parts: Collection[Schedule]) -> None:
        counts = sorted({part.by for part in parts})
        if len(counts) != 1:
            raise ArgumentError(
                f"the schedules of a training count {' and '.join(counts) or 'nothing'}; expected all of them to count "
                f"the same."
            )
        positions = tuple(sorted({position for part in parts for position in part.events}))
        given = {"start": positions[0], "end": positions[-1], "frequency": 1, "initial": 0.0, "by": counts[0]}
        for name, value in (given | {"parts": tuple(parts), "positions": positions}).items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @property
    def n_steps(self) -> int:
        """Number of events behind the first."""
        return len(self.positions) - 1

    @property
    def events(self) -> Sequence[int]:
        """Positions of all events."""
        return self.positions

    def passed(self, position: int) -> int:
        """Count the events at a position and before it."""
        return bisect_right(self.positions, position)

    def ratio(self, position: int, final: float) -> float:
        """Return the largest of the ratios that the parts have at a position.

        A part may begin above the final ratio of the whole, which is that of its own layers and of others.
        """
        return max(min(final, part.ratio(position, max(final, part.initial))) for part in self.parts)

    def curve(self, share: float, initial: float, final: float) -> float:
        """Return the final ratio; the parts have curves of their own."""
        return final
