"""Where the choices of a random network come from: Hypothesis, random numbers, or a description."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hypothesis import strategies as st

Description = dict[str, Any]


class Source(Protocol):
    """Draws one value; Hypothesis and `random.Random` both can."""

    def integer(self, low: int, high: int) -> int: ...

    def choice(self, options: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class RandomSource:
    """Plain random numbers."""

    rng: random.Random

    def integer(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def choice(self, options: Sequence[Any]) -> Any:
        return self.rng.choice(options)


@dataclass(frozen=True)
class HypothesisSource:
    """The `draw` function of a Hypothesis composite."""

    draw: Callable[..., Any]

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def choice(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))


class Picker(Protocol):
    """Answers the named choices of one block."""

    def integer(self, name: str, low: int, high: int) -> int: ...

    def choice(self, name: str, options: Sequence[Any]) -> Any: ...


class Recorder:
    """Draws every choice and notes it in `values`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.values: Description = {}

    def integer(self, name: str, low: int, high: int) -> int:
        self.values[name] = self.source.integer(low, high)
        return self.values[name]

    def choice(self, name: str, options: Sequence[Any]) -> Any:
        self.values[name] = self.source.choice(list(options))
        return self.values[name]


class Replay:
    """Reads every choice from a description."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, name: str, low: int, high: int) -> int:
        return self.values[name]

    def choice(self, name: str, options: Sequence[Any]) -> Any:
        return self.values[name]
