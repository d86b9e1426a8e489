"""Convolutions whose filters are computed for each sample, with the batch in the groups: against one sample at a time.

So do generators with styles, networks whose filters are mixed of experts or given by another network, and trackers,
which look for the features of a template.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Net, randomise
from tests.oracle import assert_equals_masked

N_IN, N_OUT = 12, 10


class Filtered(nn.Module):
    """A layer, a convolution with filters of each sample's own, a layer; `grouped` says how it is written."""

    def __init__(self, filters: str, n: int = 2, *, grouped: bool = True, keeps_batch: bool = False) -> None:
        super().__init__()
        layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n]
        self.filters, self.n, self.grouped, self.keeps_batch = filters, n, grouped, keeps_batch
        self.n_out = N_IN if "depthwise" in filters else N_OUT
        self.one, self.two = layer(3, N_IN, 1), layer(self.n_out, 4, 1)
        kernel = (3,) * n
        if filters == "another network":
            self.filter = nn.Linear(3, N_OUT * N_IN * 3**n)
        elif "depthwise" in filters:
            self.filter = nn.Linear(3, N_IN * 3**n)
        elif filters == "experts":
            self.share, self.weight = nn.Linear(3, 4), nn.Parameter(torch.randn(4, N_OUT, N_IN, *kernel))
        else:
            size = (N_IN, N_OUT) if "transposed" in filters else (N_OUT, N_IN)
            self.style, self.weight = nn.Linear(3, N_IN), nn.Parameter(torch.randn(*size, *kernel))

    def forward(self, x: Tensor) -> Tensor:
        h, context = self.one(x).relu(), x.flatten(2).mean(2)
        if self.keeps_batch:
            assert len(x) == 2
        weight = self._weights(context, h.shape[1])
        if self.grouped:
            b, space = h.shape[0], h.shape[2:]
            groups = b * h.shape[1] if "depthwise" in self.filters else b
            y = self._convolve(h.reshape(1, -1, *space), weight.reshape(-1, *weight.shape[2:]), groups)
            y = y.view(b, -1, *y.shape[2:])
        else:
            groups = h.shape[1] if "depthwise" in self.filters else 1
            y = torch.cat([self._convolve(one[None], own, groups) for one, own in zip(h, weight, strict=True)])
        return self.two(y.tanh())

    def _weights(self, context: Tensor, n_in: int) -> Tensor:
        kernel = (3,) * self.n
        if self.filters == "another network":
            return self.filter(context).view(len(context), -1, n_in, *kernel)
        if "depthwise" in self.filters:
            return self.filter(context).view(len(context), n_in, 1, *kernel)
        if self.filters == "experts":
            flat = self.share(context).tanh() @ self.weight.flatten(1)
            return flat.view(len(context), -1, n_in, *kernel)
        style = self.style(context)
        if "transposed" in self.filters:
            return self.weight * style.view(len(context), n_in, 1, *(1,) * self.n)
        weight = self.weight * style.view(len(context), 1, n_in, *(1,) * self.n)
        if "demodulated" not in self.filters:
            return weight
        sums = weight.square().flatten(2).sum(2)
        return weight * torch.rsqrt(sums + 1e-8).view(len(context), -1, 1, *(1,) * self.n)

    def _convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        kind = "conv_transpose" if "transposed" in self.filters else "conv"
        convolve: Callable[..., Tensor] = getattr(functional, f"{kind}{self.n}d")
        return convolve(x, weight, padding=1, groups=groups)


def _example(n: int = 2) -> Tensor:
    return torch.randn(2, 3, *(6,) * n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _pruned(model: nn.Module, *args: Tensor) -> torchshear.PruneResult:
    result = torchshear.prune(randomise(model.double()).eval(), args, ratio=0.5)
    assert result.verification.modes == ("eval", "train")
    assert_equals_masked(model, result.model, result.plan, args)
    return result


@pytest.mark.parametrize(
    ("filters", "n", "keeps_batch"),
    [
        ("style", 2, False),
        ("style", 2, True),
        ("style", 1, False),
        ("style, demodulated", 2, False),
        ("style, transposed", 2, False),
        ("style, transposed", 2, True),
        ("style, transposed", 3, False),
        ("experts", 2, False),
        ("another network", 2, False),
        ("depthwise", 2, False),
    ],
)
def test_filters_of_each_sample_are_cut(filters: str, n: int, keeps_batch: bool) -> None:
    model, x = Filtered(filters, n, keeps_batch=keeps_batch), _example(n)
    small = _pruned(model, x).model
    assert small.one.weight.shape[0] == N_IN // 2
    assert small.two.weight.shape[1] == model.n_out // 2
    alone = Filtered(filters, n, grouped=False).double().eval()
    alone.load_state_dict(model.state_dict())
    assert torch.allclose(model(x), alone(x), rtol=0, atol=1e-10), "the batch in the groups is one sample at a time"
    assert keeps_batch or small(torch.cat([x, x, x])).shape[:2] == (6, 4)


@pytest.mark.parametrize("is_depthwise", [False, True], ids=["one map", "depthwise"])
def test_the_features_of_a_template_are_filters(is_depthwise: bool) -> None:
    def run(m: Net, template: Tensor, x: Tensor) -> Any:
        """Where a template is found in a picture, as Siamese trackers tell it."""
        z, x = (m.two(m.one(one).relu()) for one in (template, x))
        b, c, h, w = x.shape
        if not is_depthwise:
            return functional.conv2d(x.view(1, b * c, h, w), z, groups=b).transpose(0, 1)
        y = functional.conv2d(x.view(1, b * c, h, w), z.view(b * c, 1, *z.shape[2:]), groups=b * c)
        return m.out(y.view(b, c, *y.shape[2:]))

    small = _pruned(
        Net(run, one=nn.Conv2d(3, 12, 3, padding=1), two=nn.Conv2d(12, 8, 1), out=nn.Conv2d(8, 4, 1)),
        _example()[:, :, :3, :3].contiguous(),
        _example(),
    ).model
    assert (small.one.out_channels, small.two.out_channels) == (6, 4)


def test_more_groups_than_samples_keep_the_same_of_each() -> None:
    class Grouped(nn.Module):
        """Two groups of channels in each sample."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.style = nn.Conv2d(3, 12, 1), nn.Conv2d(10, 4, 1), nn.Linear(3, 6)
            self.weight = nn.Parameter(torch.randn(10, 6, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x).relu()
            b, c, height, width = h.shape
            weight = self.weight * self.style(x.mean((2, 3))).view(b, 1, -1, 1, 1)
            y = functional.conv2d(h.view(1, b * c, height, width), weight.flatten(0, 1), padding=1, groups=2 * b)
            return self.two(y.view(b, -1, height, width))

    result = _pruned(Grouped(), _example())
    kept = result.plan.masks()["one.weight"].flatten(1).any(1)
    assert kept.sum() == 6
    assert torch.equal(kept[:6], kept[6:])
