"""Which sizes of a captured graph follow the batch: those that differ between captures at two batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Place = int | tuple[int, int]  # a dimension of a tensor, or the number of one of several tensors and its dimension


@dataclass(frozen=True, slots=True)
class Follows:
    """A number that is `times * batch + more`."""

    times: int
    more: int

    def __str__(self) -> str:
        """The number as people read it."""
        product = "batch" if self.times == 1 else f"{self.times}*batch"
        return f"{product}{self.more:+d}" if self.more else product

    def at(self, batch: int) -> int:
        """The number at a batch."""
        return self.times * batch + self.more


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches of two captures.

    Attributes:
        first: that of the capture of which the graph is kept.
        second: the other.
    """

    first: int
    second: int

    def follow(self, first: int, second: int) -> Follows | None:
        """How a number follows the batch that is `first` in one capture and `second` in the other; None if unknown.

        Two numbers always lie on a line, so only lines are taken that are whole numbers and cross no zero from a
        batch of 1 on: the batch, windows, heads or tokens of it, some rows more or one less. A square is no such line.
        """
        times, rest = divmod(first - second, self.first - self.second)
        more = first - times * self.first
        crosses = (times + more) * times < 0
        return None if rest or not times or crosses else Follows(times, more)


@dataclass(frozen=True, slots=True)
class SecondShapes:
    """What a second capture of the same network, at another batch, says of the sizes in the first.

    Attributes:
        batches: of the two captures.
        shapes: name of a node -> its shape in the second capture, or shapes, of nodes that have another there.
    """

    batches: Batches
    shapes: Mapping[str, Any]

    def size(self, name: str, place: Place) -> int | None:
        """A size in the second capture; None if the node has the same shape in both."""
        shape = self.shapes.get(name)
        if shape is None:
            return None
        return int(shape[place] if isinstance(place, int) else shape[place[0]][place[1]])
