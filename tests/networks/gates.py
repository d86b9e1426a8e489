"""Gates: of one channel, of all, by halves of a layer."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.networks._base import Net, conv, conv_bn, head, network, noise, picture


@network("squeeze-and-excitation by 1x1 convolutions and by Linear", "gate", widths=(8, 8, 32))
def squeeze_excitation():
    def run(m, x):
        x = m.stem(x)
        x = x * m.b(F.relu(m.a(x.mean((2, 3), keepdim=True)))).sigmoid()
        gate = F.hardsigmoid(m.d(F.relu(m.c(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
        return m.head(x * gate[:, :, None, None])

    parts = {"a": conv(32, 8, 1), "b": conv(8, 32, 1), "c": nn.Linear(32, 8), "d": nn.Linear(8, 32)}
    return Net(run, stem=conv_bn(3, 32), head=head(32), **parts), picture()


@network("a gate of one channel broadcasts over all", "gate", widths=(24,))
def gate_one_channel():
    def run(m, x):
        x = m.stem(x)
        return m.head(x * torch.sigmoid(m.gate(x)))

    return Net(run, stem=conv_bn(3, 24), gate=conv(24, 1, 1), head=head(24)), picture()


class CBAM(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, 8), nn.ReLU(), nn.Linear(8, channels))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        channel = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        x = x * channel.sigmoid()[:, :, None, None]
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.spatial(pooled).sigmoid()


@network("CBAM: channel and spatial gates", "gate cross_channel", widths=(8, 16, 24))
def cbam():
    return nn.Sequential(conv_bn(3, 24), CBAM(24), conv_bn(24, 16), head(16)), picture()


@network("mean and maximum over channels feed a convolution", "concatenation cross_channel", widths=(8, 24))
def channel_pool():
    def run(m, x):
        x = F.relu(m.stem(x))
        pooled = torch.cat([x.mean(1, True), x.amax(1, True)], 1)
        return m.last(x) + m.out(F.relu(m.a(pooled)))

    return Net(run, stem=conv(3, 24), a=conv(2, 8), out=conv(8, 5), last=conv(24, 5)), picture()


@network("gated linear unit by chunk: half of the units asked, half cut", "gate split", widths=(24,))
def glu_chunk():
    def run(m, x):
        a, b = m.a(x).chunk(2, 1)
        return m.head(a * torch.sigmoid(b))

    return Net(run, a=conv(3, 48), head=head(24)), picture()


@network("SwiGLU of fused halves", "gate split", widths=(32,))
def swiglu():
    def run(m, x):
        gate, up = m.gate_up(x).split(m.width, dim=-1)
        return m.down(F.silu(gate) * up)

    return Net(run, gate_up=nn.Linear(10, 64), down=nn.Linear(32, 5), width=32), noise(2, 6, 10)
