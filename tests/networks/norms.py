"""Norms over channels, and convolutions in groups."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.networks._base import Net, conv, conv_bn, head, network, noise, picture


@network("Conv2d(8, 4, groups=4)", "grouped", widths=(8,))
def grouped_narrowing():
    return Net(lambda m, x: m.c(F.relu(m.b(m.a(x)))), a=conv(3, 8), b=conv(8, 4, groups=4), c=conv(4, 5)), picture()


@network("depthwise with a multiplier of two, and its producer", "grouped", widths=(2, 16, 20))
def depthwise_multiplier():
    def run(m, x):
        return m.head(m.point(F.relu(m.norm(m.depth(m.stem(x))))))

    depth = conv(16, 32, groups=16)
    return Net(
        run, stem=conv_bn(3, 16), depth=depth, norm=nn.BatchNorm2d(32), point=conv(32, 20, 1), head=head(20)
    ), picture()


@network("grouped transposed convolution", "grouped transposed", widths=(16, 24))
def grouped_transposed():
    up = nn.ConvTranspose2d(16, 24, 4, 2, 1, groups=4)
    return Net(lambda m, x: m.c(F.relu(m.up(m.a(x)))), a=conv_bn(3, 16), up=up, c=conv(24, 3)), picture(size=8)


@network("InstanceNorm with running statistics", "norm", widths=(16, 24))
def instance_norm():
    norms = [nn.InstanceNorm2d(c, affine=True, track_running_stats=True) for c in (16, 24)]
    return nn.Sequential(conv(3, 16), norms[0], nn.ReLU(), conv(16, 24), norms[1], nn.ReLU(), head(24)), picture()


@network("LayerNorm([C, H, W])", "norm cross_channel", widths=(16,))
def layer_norm_chw():
    return nn.Sequential(conv(3, 16), nn.LayerNorm([16, 8, 8]), nn.ReLU(), head(16)), picture(size=8)


@network("RMSNorm", "norm residual cross_channel", widths=(24, 40))
def rms_norm():
    def run(m, x):
        x = m.a(x)
        return m.out(m.last(x + m.c(F.silu(m.b(m.norm(x))))))

    layers = {"a": nn.Linear(8, 24), "b": nn.Linear(24, 40), "c": nn.Linear(40, 24), "out": nn.Linear(24, 5)}
    return Net(run, norm=nn.RMSNorm(24), last=nn.RMSNorm(24, eps=1e-6), **layers), noise(2, 6, 8)


@network("GroupNorm(3) after a convolution of two groups", "norm grouped cross_channel", widths=(12, 24))
def group_norm_after_grouped():
    body = [conv(3, 12), conv(12, 24, groups=2), nn.GroupNorm(3, 24), nn.ReLU(), conv(24, 10)]
    return nn.Sequential(*body), picture()


@network("GroupNorm in a residual network", "norm residual cross_channel", widths=(32,))
def group_norm_residual():
    def run(m, x):
        x = F.relu(m.n1(m.stem(x)))
        return m.head(x + m.n2(m.a(x)))

    norms = {"n1": nn.GroupNorm(4, 32), "n2": nn.GroupNorm(8, 32)}
    return Net(run, stem=conv(3, 32), a=conv(32, 32), head=head(32), **norms), picture()


class Grouped(nn.Module):
    """A grouped convolution between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 12, 1)
        self.two = nn.Conv2d(12, 12, 3, groups=3)
        self.three = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


@network("a grouped convolution between two plain ones", "grouped", widths=(12, 12))
def grouped_between():
    return Grouped(), picture(size=8)


@network("a pre-norm feed-forward block with a norm inside", "norm residual cross_channel", widths=(12, 20))
def layer_norm_mlp():
    def run(m, x):
        x = m.stem(x)
        x = x + m.down(F.gelu(m.inner(m.up(m.norm(x)))))
        return m.head(m.last(x))

    layers = {"stem": nn.Linear(6, 12), "up": nn.Linear(12, 20), "down": nn.Linear(20, 12), "head": nn.Linear(12, 5)}
    return Net(run, norm=nn.LayerNorm(12), inner=nn.LayerNorm(20), last=nn.LayerNorm(12), **layers), noise(4, 6)


@network("RMSNorm between two layers", "norm cross_channel", widths=(14,))
def rms_norm_mlp():
    parts = {"up": nn.Linear(6, 14), "norm": nn.RMSNorm(14, eps=1e-5), "down": nn.Linear(14, 5)}
    return Net(lambda m, x: m.down(F.silu(m.norm(m.up(x)))), **parts), noise(4, 6)


@network("GroupNorm between two convolutions", "norm cross_channel", widths=(16,))
def group_norm_net():
    parts = {"a": conv(3, 16), "norm": nn.GroupNorm(4, 16), "b": nn.Conv2d(16, 5, 3)}
    return Net(lambda m, x: m.b(F.relu(m.norm(m.a(x)))), **parts), noise(2, 3, 6, 6)


@network("LayerNorm over channels and space", "norm cross_channel", widths=(10,))
def channel_layer_norm():
    parts = {"a": conv(3, 10), "norm": nn.LayerNorm([10, 6, 6]), "b": nn.Conv2d(10, 5, 3)}
    return Net(lambda m, x: m.b(m.norm(m.a(x))), **parts), noise(2, 3, 6, 6)


@network("a gate from the mean and maximum of channels", "gate cross_channel", widths=(12,))
def channel_mean_gate():
    def run(m, x):
        x = m.a(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return m.b(x * m.gate(pooled).sigmoid())

    return Net(run, a=conv(3, 12), gate=conv(2, 1), b=conv(12, 5, 1)), noise(2, 3, 6, 6)


@network("a softmax over channels", "cross_channel", widths=(12,))
def channel_softmax():
    return Net(lambda m, x: m.b(m.a(x).softmax(1)), a=conv(3, 12), b=conv(12, 5, 1)), noise(2, 3, 6, 6)
