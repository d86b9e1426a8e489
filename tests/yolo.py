"""A detector in the manner of YOLOv8, after the public description of its architecture.

Blocks with a split trunk whose every stage is concatenated (C2f), pooling at several scales (SPPF), a neck that goes
up and down again, and a head with separate branches for boxes and classes; box sides are expectations over bins (DFL,
Li et al., NeurIPS 2020, arXiv:2006.04388).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Unit(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 units, with a shortcut in the backbone."""

    def __init__(self, width: int, has_shortcut: bool) -> None:
        super().__init__()
        self.first, self.second = Unit(width, width, 3), Unit(width, width, 3)
        self.has_shortcut = has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return x + y if self.has_shortcut else y


class C2f(nn.Module):
    """Half of the channels go through bottlenecks one after another; all that comes up on the way is concatenated."""

    def __init__(self, inside: int, outside: int, depth: int, has_shortcut: bool) -> None:
        super().__init__()
        self.hidden = outside // 2
        self.enter, self.leave = Unit(inside, 2 * self.hidden), Unit((2 + depth) * self.hidden, outside)
        self.stages = nn.ModuleList(Bottleneck(self.hidden, has_shortcut) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        seen = list(self.enter(x).split((self.hidden, self.hidden), 1))
        for stage in self.stages:
            seen.append(stage(seen[-1]))
        return self.leave(torch.cat(seen, 1))


class SPPF(nn.Module):
    """One map beside itself pooled once, twice and three times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = Unit(width, width // 2), Unit(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.enter(x)]
        maps += [self.pool(maps[-1])]
        maps += [self.pool(maps[-1])]
        return self.leave(torch.cat([*maps, self.pool(maps[-1])], 1))


class Neck(nn.Module):
    """Top-down, then bottom-up, each step beside the map of its size."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        small, middle, large = widths
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.down_middle, self.down_small = C2f(large + middle, middle, 1, False), C2f(middle + small, small, 1, False)
        self.stride_small, self.stride_middle = Unit(small, small, 3, 2), Unit(middle, middle, 3, 2)
        self.up_middle, self.up_large = C2f(small + middle, middle, 1, False), C2f(middle + large, large, 1, False)

    def forward(self, maps: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        small, middle, large = maps
        inner = self.down_middle(torch.cat([self.up(large), middle], 1))
        first = self.down_small(torch.cat([self.up(inner), small], 1))
        second = self.up_middle(torch.cat([self.stride_small(first), inner], 1))
        return [first, second, self.up_large(torch.cat([self.stride_middle(second), large], 1))]


class Head(nn.Module):
    """Boxes and class scores of every position; in training the raw maps."""

    def __init__(self, widths: tuple[int, int, int], n_classes: int, n_bins: int) -> None:
        super().__init__()
        self.n_classes, self.n_bins, self.strides = n_classes, n_bins, (8, 16, 32)
        box, score = max(16, widths[0] // 4), max(widths[0], n_classes)
        self.boxes = nn.ModuleList(
            nn.Sequential(Unit(w, box, 3), Unit(box, box, 3), nn.Conv2d(box, 4 * n_bins, 1)) for w in widths
        )
        self.scores = nn.ModuleList(
            nn.Sequential(Unit(w, score, 3), Unit(score, score, 3), nn.Conv2d(score, n_classes, 1)) for w in widths
        )
        self.register_buffer("bins", torch.arange(n_bins, dtype=torch.float32))

    def forward(self, maps: list[Tensor]) -> list[Tensor] | Tensor:
        raw = [torch.cat([b(x), s(x)], 1) for b, s, x in zip(self.boxes, self.scores, maps, strict=True)]
        if self.training:
            return raw
        flat = torch.cat([x.flatten(2) for x in raw], 2)
        sides, scores = flat.split((4 * self.n_bins, self.n_classes), 1)
        centres, strides = self._grid(raw)
        batch, _, positions = sides.shape
        shares = sides.view(batch, 4, self.n_bins, positions).softmax(2)
        low, high = (shares * self.bins[:, None]).sum(2).chunk(2, 1)
        corners = torch.cat([centres - low, centres + high], 1) * strides
        return torch.cat([corners, scores.sigmoid()], 1)

    def _grid(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        centres, strides = [], []
        for x, stride in zip(maps, self.strides, strict=True):
            rows = torch.arange(x.shape[2], device=x.device, dtype=x.dtype) + 0.5
            columns = torch.arange(x.shape[3], device=x.device, dtype=x.dtype) + 0.5
            y, z = torch.meshgrid(rows, columns, indexing="ij")
            centres.append(torch.stack([z.flatten(), y.flatten()]))
            strides.append(torch.full((1, y.numel()), float(stride), device=x.device, dtype=x.dtype))
        return torch.cat(centres, 1), torch.cat(strides, 1)


class Yolo(nn.Module):
    """Backbone, neck and head; width and depth as in the smallest of the family, narrower still."""

    def __init__(self, width: int = 16, n_classes: int = 7, n_bins: int = 16) -> None:
        super().__init__()
        w = [width * 2**level for level in range(5)]
        self.stem = nn.Sequential(Unit(3, w[0], 3, 2), Unit(w[0], w[1], 3, 2), C2f(w[1], w[1], 1, True))
        self.small = nn.Sequential(Unit(w[1], w[2], 3, 2), C2f(w[2], w[2], 2, True))
        self.middle = nn.Sequential(Unit(w[2], w[3], 3, 2), C2f(w[3], w[3], 2, True))
        self.large = nn.Sequential(Unit(w[3], w[4], 3, 2), C2f(w[4], w[4], 1, True), SPPF(w[4]))
        self.neck, self.head = Neck((w[2], w[3], w[4])), Head((w[2], w[3], w[4]), n_classes, n_bins)

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        small = self.small(self.stem(x))
        middle = self.middle(small)
        return self.head(self.neck((small, middle, self.large(middle))))
