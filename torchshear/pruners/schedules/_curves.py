"""The curves of schedules. With t the share of events that have passed, s0 the initial and s the final ratio."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torchshear._arguments import MOST, check_count
from torchshear.errors import ArgumentError
from torchshear.pruners.schedules._schedule import By, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Schedule):
    """Ratio that grows by equal parts: s0 + (s - s0) t."""

    def curve(self, share: float, initial: float, final: float) -> float:
        """Return s0 + (s - s0) t."""
        return initial + (final - initial) * share


@dataclass(frozen=True, slots=True, kw_only=True)
class AGP(Schedule):
    """Automated gradual pruning: s + (s0 - s) (1 - t)^3, most of it early.

    Reference: Zhu and Gupta, 2017, arXiv:1710.01878. NNI's AGP pruners.
    """

    def curve(self, share: float, initial: float, final: float) -> float:
        """Return s + (s0 - s) (1 - t)^3."""
        return final + (initial - final) * (1 - share) ** 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Poly(Schedule):
    """Polynomial decay of what is left to go: s + (s0 - s) (1 - t)^power; `AGP` has the power 3.

    Attributes:
        power: the exponent, above 0.

    Raises:
        ArgumentError: `power` is no positive number.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        """Refuse a power that is no positive number."""
        Schedule.__post_init__(self)
        is_number = isinstance(self.power, int | float) and not isinstance(self.power, bool)
        if not is_number or not 0 < self.power < math.inf:
            raise ArgumentError(f"power={self.power!r}; expected a positive number.")

    def curve(self, share: float, initial: float, final: float) -> float:
        """Return s + (s0 - s) (1 - t)^power."""
        return float(final + (initial - final) * (1 - share) ** self.power)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exp(Schedule):
    """Equal shares of what is left: 1 - (1 - s0) ((1 - s) / (1 - s0))^t; Neural Compressor's "exp", its default."""

    def curve(self, share: float, initial: float, final: float) -> float:
        """Return 1 - (1 - s0) ((1 - s) / (1 - s0))^t."""
        return float(1 - (1 - initial) * ((1 - final) / (1 - initial)) ** share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cos(Schedule):
    """Slow start along a cosine: s0 + (s - s0) (1 - cos(pi t / 2)); Neural Compressor's "cos"."""

    def curve(self, share: float, initial: float, final: float) -> float:
        """Return s0 + (s - s0) (1 - cos(pi t / 2))."""
        return initial + (final - initial) * (1 - math.cos(math.pi * share / 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cube(Schedule):
    """Slow start: s0 + (s - s0) t^3; Neural Compressor's "cube", which is not `AGP`."""

    def curve(self, share: float, initial: float, final: float) -> float:
        """Return s0 + (s - s0) t^3."""
        return initial + (final - initial) * share**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Lottery(Schedule):
    """Rounds of the lottery ticket: 1 - (1 - s)^(i / n) at round i of n, dense at round 0; `initial` has no part in it.

    Reference: Frankle and Carbin, ICLR 2019, arXiv:1803.03635. NNI's lottery ticket pruner.
    """

    by: By = "event"

    def curve(self, share: float, initial: float, final: float) -> float:
        """Return 1 - (1 - s)^t."""
        return float(1 - (1 - final) ** share)


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class OneShot(Schedule):
    """The whole ratio at once.

    Args:
        at: position of the only event.
        by: what it counts, see `Schedule`.

    Raises:
        ArgumentError: `at` is no whole number, or `by` another word.
    """

    def __init__(self, at: int = 0, by: By = "step") -> None:
        check_count("at", at, 0)
        for name, value in {"start": at, "end": at, "frequency": 1, "initial": 0.0, "by": by}.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def curve(self, share: float, initial: float, final: float) -> float:
        """Return s; there is no way between the first event and the last."""
        return final


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Repeated(Schedule):
    """The whole ratio at every event, at each of which what goes is chosen anew; UniPruning's.

    Args:
        frequency: positions from one event to the next.
        start: position of the first event.
        end: last position that an event may have; as good as none by default.
        by: what positions count, see `Schedule`.

    Raises:
        ArgumentError: a position is no whole number, `end` lies before `start`, or `by` is another word.
    """

    is_at_once: ClassVar[bool] = True

    def __init__(self, frequency: int, start: int = 0, end: int = MOST, by: By = "epoch") -> None:
        given = {"start": start, "end": end, "frequency": frequency, "initial": 0.0, "by": by}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def curve(self, share: float, initial: float, final: float) -> float:
        """Return s."""
        return final
