"""What blocks of random networks are made of, and the registry of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.blocks._choices import Picker

Shape = tuple[int, ...]

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
FUNCTIONAL_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "cos": torch.cos,
    "identity": lambda x: x,
}


@dataclass(frozen=True, slots=True)
class Block:
    """One kind of block: the layout it takes, when it fits, and whether it mixes channels by a statistic."""

    kind: str
    layout: str
    build: Callable[[Picker, Shape], nn.Module]
    fits: Callable[[Shape], bool]
    is_mixing: bool


BLOCKS: dict[str, Block] = {}


def block(layout: str, fits: Callable[[Shape], bool] = lambda s: True, is_mixing: bool = False) -> Callable:
    """Register a block that takes values of a layout: "map" (B, C, *space), "tokens" (B, N, C) or "vector" (B, C)."""

    def register(build: Callable[[Picker, Shape], nn.Module]) -> Callable[[Picker, Shape], nn.Module]:
        assert build.__name__ not in BLOCKS
        BLOCKS[build.__name__] = Block(build.__name__, layout, build, fits, is_mixing)
        return build

    return register


def divisors(number: int, low: int = 2) -> list[int]:
    """The divisors of a number from `low` to the number itself."""
    return [d for d in range(low, number + 1) if number % d == 0]


def is_small(s: Shape) -> bool:
    return s[1] <= 16


def is_even(s: Shape) -> bool:
    return s[1] % 2 == 0


def is_composite(s: Shape) -> bool:
    return len(divisors(s[1])) > 1


def rank_of(s: Shape) -> int:
    return len(s) - 2


def conv_of(s: Shape, c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Module:
    return CONV[rank_of(s)](c_in, c_out, kernel, padding=options.pop("padding", kernel // 2), **options)


def per_channel(s: Shape, channels: int | None = None) -> Tensor:
    """A zero tensor that broadcasts over batch and space of a map."""
    return torch.zeros(1, channels or s[1], *(1,) * rank_of(s))
