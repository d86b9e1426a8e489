"""Small models that break pruners, one function each, numbered as in the head-to-head list (0: the parity bar).

A case says what pruning it must end in: "exact" (equal to the zero-masked original), "mixed" (a norm, softmax or mean
runs over a pruned axis, so zeroing is not cutting), or "refused" (nothing can be cut, and the reason is given).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.blocks import randomise

Built = tuple[nn.Module, tuple, dict]
Expectation = Literal["exact", "mixed", "refused"]


@dataclass(frozen=True, slots=True)
class Case:
    """A model with its example inputs, and what pruning it must end in."""

    number: int
    name: str
    build: Callable[[], Built]
    expect: Expectation
    note: str

    @property
    def id(self) -> str:
        return f"{self.number:02d}-{self.name}"


REGISTERED: list[Case] = []


def case(number: int, note: str, expect: Expectation = "exact") -> Callable:
    """Register a function that builds a model and its arguments; weights are made random and float64 here."""

    def register(build: Callable[[], tuple]) -> Callable[[], tuple]:
        def built() -> Built:
            with torch.random.fork_rng(devices=[]):
                model, args, *rest = build()
            model = randomise(model.double().eval(), seed=100 + number)
            return model, args, rest[0] if rest else {}

        REGISTERED.append(Case(number, build.__name__, built, expect, note))
        return build

    return register


def noise(*shape: int, seed: int = 0) -> Tensor:
    """A random float64 input."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(channels: int = 3, size: int = 16) -> Tensor:
    return noise(2, channels, size, size)


def conv(c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def conv_bn(c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(c_in, c_out, kernel, bias=False, **options), nn.BatchNorm2d(c_out), nn.ReLU())


def head(channels: int, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
