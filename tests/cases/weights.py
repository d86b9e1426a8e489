"""Cases 20 to 34: gates, raw, frozen and tied tensors, groups and norms."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.blocks import Net
from tests.cases._base import case, conv, conv_bn, head, image, noise
from tests.cases.plain import BasicBlock

# --- 20-29: gates, raw tensors, frozen and tied parts -----------------------------------------------------------------


@case(20, "a gate of one channel broadcasts over all")
def gate_one_channel():
    def run(m, x):
        x = m.stem(x)
        return m.head(x * torch.sigmoid(m.gate(x)))

    return Net(run, stem=conv_bn(3, 24), gate=conv(24, 1, 1), head=head(24)), (image(),)


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


@case(20, "CBAM: channel and spatial gates", expect="mixed")
def cbam():
    return nn.Sequential(conv_bn(3, 24), CBAM(24), conv_bn(24, 16), head(16)), (image(),)


@case(21, "mean and maximum over channels feed a convolution", expect="mixed")
def channel_pool():
    def run(m, x):
        x = F.relu(m.stem(x))
        pooled = torch.cat([x.mean(1, True), x.amax(1, True)], 1)
        return m.last(x) + m.out(F.relu(m.a(pooled)))

    return Net(run, stem=conv(3, 24), a=conv(2, 8), out=conv(8, 5), last=conv(24, 5)), (image(),)


@case(22, "F.conv2d, F.linear and @ with raw parameters")
def raw_parameters():
    def run(m, x):
        x = F.relu(F.conv2d(x, m.kernel, m.shift, padding=1)).mean((2, 3))
        x = F.relu(F.linear(x, m.weight))
        return x @ m.W + m.b

    shapes = {"kernel": (16, 3, 3, 3), "shift": (16,), "weight": (24, 16), "W": (24, 5), "b": (5,)}
    return Net(run, **{k: nn.Parameter(torch.zeros(v)) for k, v in shapes.items()}), (image(),)


@case(23, "a parameter of the shape of the map is added")
def position_map():
    position = nn.Parameter(torch.zeros(1, 16, 16, 16))
    return Net(lambda m, x: m.head(F.relu(m.a(x) + m.position)), a=conv(3, 16), position=position, head=head(16)), (
        image(),
    )


@case(24, "a buffer with a channel dimension")
def buffer_mean():
    def run(m, x):
        return m.b((m.a((x - m.mean) / 2.0) - m.hidden_mean).abs())

    parts = {"mean": torch.zeros(1, 3, 1, 1), "hidden_mean": torch.zeros(1, 20, 1, 1)}
    return Net(run, a=conv(3, 20), b=conv(20, 5), **parts), (image(),)


class FrozenBatchNorm(nn.Module):
    """BatchNorm whose statistics and affine parameters are buffers, as in torchvision and DETR."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


@case(24, "FrozenBatchNorm2d")
def frozen_batch_norm():
    body = [conv(3, 24, bias=False), FrozenBatchNorm(24), nn.ReLU(), conv(24, 32), FrozenBatchNorm(32), head(32)]
    return nn.Sequential(*body), (image(),)


@case(25, "DnCNN: the last layer is subtracted from the input")
def dncnn():
    return Net(lambda m, x: x - m.c(m.b(m.a(x))), a=conv_bn(3, 24), b=conv_bn(24, 24), c=conv(24, 3)), (image(),)


@case(26, "a frozen backbone beside a trained branch")
def frozen_branch():
    def run(m, x):
        return m.head(F.relu(m.frozen(x) + m.trained(x)))

    frozen = nn.Sequential(conv_bn(3, 16), conv(16, 24)).requires_grad_(False)
    return Net(run, frozen=frozen, trained=conv_bn(3, 24), head=head(24)), (image(),)


@case(26, "a backbone frozen whole")
def frozen_backbone():
    backbone = nn.Sequential(conv_bn(3, 16), BasicBlock(16, 16), conv_bn(16, 32)).requires_grad_(False)
    return nn.Sequential(backbone, head(32)), (image(),)


@case(27, "a gate is detached from the graph")
def detached_gate():
    def run(m, x):
        x = F.relu(m.stem(x))
        gate = m.fc(x.mean((2, 3))).sigmoid().detach()
        return m.head(x * gate[:, :, None, None])

    return Net(run, stem=conv(3, 24), fc=nn.Linear(24, 24), head=head(24)), (image(),)


@case(27, "a part runs under torch.no_grad")
def no_grad_part():
    def run(m, x):
        with torch.no_grad():
            x = m.b(F.relu(m.a(x)))
        return m.head(F.relu(x))

    return Net(run, a=conv(3, 16), b=conv(16, 24), head=head(24)), (image(),)


@case(28, "the head is the embedding")
def tied_embedding():
    def run(m, tokens):
        x = m.emb(tokens)
        x = x + m.b(F.gelu(m.a(x)))
        return m.head(x)

    emb, last = nn.Embedding(30, 24), nn.Linear(24, 30, bias=False)
    last.weight = emb.weight
    return Net(run, emb=emb, a=nn.Linear(24, 40), b=nn.Linear(40, 24), head=last), (torch.arange(14).view(2, 7) * 2,)


@case(28, "an autoencoder whose decoder is the transpose of its encoder")
def tied_transpose():
    def run(m, x):
        return F.linear(F.relu(m.encoder(x)), m.encoder.weight.t(), m.bias)

    return Net(run, encoder=nn.Linear(12, 30), bias=nn.Parameter(torch.zeros(12))), (noise(3, 12),)


@case(28, "two convolutions of one weight")
def tied_convolutions():
    left, right = conv(3, 16), conv(3, 16)
    right.weight = left.weight
    return Net(
        lambda m, x, y: m.last(torch.cat([m.left(x), m.right(y)], 1)), left=left, right=right, last=conv(32, 5)
    ), (image(), noise(2, 3, 16, 16, seed=1))


class StandardizedConv2d(nn.Conv2d):
    """Weights less their mean and over their deviation, both by the statistics of a batch norm, as NF-ResNet does."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


@case(29, "standardised weights: statistics of a kernel run over its input channels", expect="mixed")
def standardized_weights():
    layers = [StandardizedConv2d(a, b, 3) for a, b in ((3, 16), (16, 24), (24, 5))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), (image(),)


@case(29, "weight_norm: the norm of a kernel runs over its input channels", expect="mixed")
def weight_norm():
    layers = [parametrizations.weight_norm(conv(a, b)) for a, b in ((3, 16), (16, 24), (24, 5))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), (image(),)


@case(29, "spectral_norm: the norm is a product with two buffers")
def spectral_norm():
    layers = [parametrizations.spectral_norm(nn.Linear(a, b)) for a, b in ((10, 16), (16, 24), (24, 5))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), (noise(4, 10),)


@case(29, "an orthogonal weight: a matrix that is decomposed as a whole has no part to cut", expect="refused")
def linalg_householder_product():
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(16, 10)), nn.ReLU(), nn.Linear(10, 5)), (noise(4, 16),)


# --- 30-34: groups and norms ------------------------------------------------------------------------------------------


@case(30, "Conv2d(8, 4, groups=4)")
def grouped_narrowing():
    return Net(lambda m, x: m.c(F.relu(m.b(m.a(x)))), a=conv(3, 8), b=conv(8, 4, groups=4), c=conv(4, 5)), (image(),)


@case(31, "depthwise with a multiplier of two, and its producer")
def depthwise_multiplier():
    def run(m, x):
        return m.head(m.point(F.relu(m.norm(m.depth(m.stem(x))))))

    depth = conv(16, 32, groups=16)
    return Net(run, stem=conv_bn(3, 16), depth=depth, norm=nn.BatchNorm2d(32), point=conv(32, 20, 1), head=head(20)), (
        image(),
    )


@case(32, "grouped transposed convolution")
def grouped_transposed():
    up = nn.ConvTranspose2d(16, 24, 4, 2, 1, groups=4)
    return Net(lambda m, x: m.c(F.relu(m.up(m.a(x)))), a=conv_bn(3, 16), up=up, c=conv(24, 3)), (image(size=8),)


@case(33, "InstanceNorm with running statistics")
def instance_norm():
    norms = [nn.InstanceNorm2d(c, affine=True, track_running_stats=True) for c in (16, 24)]
    return nn.Sequential(conv(3, 16), norms[0], nn.ReLU(), conv(16, 24), norms[1], nn.ReLU(), head(24)), (image(),)


@case(33, "LayerNorm([C, H, W])", expect="mixed")
def layer_norm_chw():
    return nn.Sequential(conv(3, 16), nn.LayerNorm([16, 8, 8]), nn.ReLU(), head(16)), (image(size=8),)


@case(33, "RMSNorm", expect="mixed")
def rms_norm():
    def run(m, x):
        x = m.a(x)
        return m.out(m.last(x + m.c(F.silu(m.b(m.norm(x))))))

    layers = {"a": nn.Linear(8, 24), "b": nn.Linear(24, 40), "c": nn.Linear(40, 24), "out": nn.Linear(24, 5)}
    return Net(run, norm=nn.RMSNorm(24), last=nn.RMSNorm(24, eps=1e-6), **layers), (noise(2, 6, 8),)


@case(34, "GroupNorm(3) after a convolution of two groups", expect="mixed")
def group_norm_after_grouped():
    body = [conv(3, 12), conv(12, 24, groups=2), nn.GroupNorm(3, 24), nn.ReLU(), conv(24, 10)]
    return nn.Sequential(*body), (image(),)


@case(34, "GroupNorm in a residual network", expect="mixed")
def group_norm_residual():
    def run(m, x):
        x = F.relu(m.n1(m.stem(x)))
        return m.head(x + m.n2(m.a(x)))

    norms = {"n1": nn.GroupNorm(4, 32), "n2": nn.GroupNorm(8, 32)}
    return Net(run, stem=conv(3, 32), a=conv(32, 32), head=head(32), **norms), (image(),)
