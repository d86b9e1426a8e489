"""Batches of pictures with labels, what is collected over them, and their gradients one by one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from torchshear.calibration import Statistics
from torchshear.dependency import ChannelGroups


def batches(count: int = 3, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 6, 6, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(count)
    ]


def analysed(model: nn.Module) -> ChannelGroups:
    return torchshear.analyze(torchshear.trace(model, (torch.zeros(2, 3, 6, 6),)))


def collected(model: nn.Module, **options: Any) -> tuple[ChannelGroups, Statistics]:
    groups = analysed(model)
    loss = options.pop("loss_fn", functional.cross_entropy)
    return groups, torchshear.collect(groups, batches(), loss, batches=3, **options)


def gradients(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    for x, target in batches():
        loss = functional.cross_entropy(net(x), target)
        found = torch.autograd.grad(loss, list(net.parameters()))
        yield dict(zip((name for name, _ in net.named_parameters()), found, strict=True))
