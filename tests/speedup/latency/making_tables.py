"""A small network, and probes of it as a device would give them whose kernels follow a law that is known."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import torchshear
from torchshear.dependency import Alignment, ChannelGroups
from torchshear.dependency.groups._width_form import axis_forms
from torchshear.speedup.latency._device import Device
from torchshear.speedup.latency._kernels import KernelTime, Profile
from torchshear.speedup.latency._probes import WidthProbe, choose_probes
from torchshear.speedup.latency._table import LatencyTable, make_table

ALIGNMENT = Alignment(4, 4, "small")


class Joined(nn.Module):
    """Two branches that are joined, and two layers behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.left, self.right = nn.Conv2d(24, 32, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.mix, self.head = nn.Conv2d(48, 40, 1), nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x).relu()
        h = self.mix(torch.cat([self.left(h).relu(), self.right(h).relu()], 1)).relu()
        return self.head(h.mean((2, 3)))


def joined() -> tuple[nn.Module, tuple[torch.Tensor], ChannelGroups]:
    torch.manual_seed(0)
    model, args = Joined().eval(), (torch.randn(1, 3, 8, 8),)
    return model, args, torchshear.analyze(torchshear.trace(model, args))


def kernels_at(widths: Mapping[str, int]) -> tuple[KernelTime, ...]:
    """Kernels of the network whose times are a constant, and so much a value and a product."""
    stem, left, right, mix = (widths[f"{name}.weight[0]"] for name in ("stem", "left", "right", "mix"))
    convolutions = [("stem", 3, stem, 3), ("left", stem, left, 3), ("right", stem, right, 1)]
    convolutions += [("mix", left + right, mix, 1)]
    found = []
    for name, read, written, size in convolutions:
        ms = 0.01 + 1e-5 * 64 * (read + 2 * written) + 1e-6 * 64 * read * written * size**2
        shapes = ((1, read, 8, 8), (written, read, size, size), (written,))
        inputs = tuple(("float", shape) for shape in shapes)
        found.append(KernelTime(f"{name}_nchwc", "Conv", inputs, (("float", (1, written, 8, 8)),), ms))
    inputs = (("float", (1, left, 8, 8)), ("float", (1, right, 8, 8)))
    joined = (("float", (1, left + right, 8, 8)),)
    found.append(KernelTime("cat", "Concat", inputs, joined, 2e-5 * 64 * (left + right)))
    found.append(KernelTime("head", "Gemm", (("float", (1, mix)),), (("float", (1, 5)),), 0.002 + 1e-4 * mix))
    return tuple(found)


def total_ms(widths: Mapping[str, int]) -> float:
    return sum(kernel.ms for kernel in kernels_at(widths))


def probes_of(groups: ChannelGroups, count: int = 8) -> list[WidthProbe]:
    """Probes of a quiet device, with a tenth of a millisecond beside the kernels."""
    wanted = choose_probes(groups, ALIGNMENT, axis_forms(groups), count)
    dense = total_ms(wanted[0]) + 0.1
    return [
        WidthProbe(widths, (total_ms(widths) + 0.1) / dense, dense, Profile(kernels_at(widths), 0.1), dense)
        for widths in wanted
    ]


def table_of_probes(
    groups: ChannelGroups, probes: Sequence[WidthProbe], identity: Mapping[str, Any] | None = None
) -> LatencyTable:
    here = dict(Device().identity()) if identity is None else dict(identity)
    return make_table(groups, probes, Device(), here, (ALIGNMENT.name, ALIGNMENT.block))


def fresh_widths(groups: ChannelGroups, seed: int) -> dict[str, int]:
    rng = np.random.default_rng(seed)
    return {group.name: int(rng.integers(1, group.width // 4 + 1) * 4) for group in groups.prunable}
