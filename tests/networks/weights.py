"""Parameters and buffers that are no layer's: raw, frozen, detached, tied and computed tensors."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.networks._base import Net, conv, conv_bn, head, network, noise, picture
from tests.networks.plain import BasicBlock


@network("F.conv2d, F.linear and @ with raw parameters", "parameters", widths=(16, 24))
def raw_parameters():
    def run(m, x):
        x = F.relu(F.conv2d(x, m.kernel, m.shift, padding=1)).mean((2, 3))
        x = F.relu(F.linear(x, m.weight))
        return x @ m.W + m.b

    shapes = {"kernel": (16, 3, 3, 3), "shift": (16,), "weight": (24, 16), "W": (24, 5), "b": (5,)}
    return Net(run, **{k: nn.Parameter(torch.zeros(v)) for k, v in shapes.items()}), picture()


@network("a parameter of the shape of the map is added", "parameters", widths=(16,))
def position_map():
    position = nn.Parameter(torch.zeros(1, 16, 16, 16))
    return Net(
        lambda m, x: m.head(F.relu(m.a(x) + m.position)), a=conv(3, 16), position=position, head=head(16)
    ), picture()


@network("a buffer with a channel dimension", "buffers", widths=(20,))
def buffer_mean():
    def run(m, x):
        return m.b((m.a((x - m.mean) / 2.0) - m.hidden_mean).abs())

    parts = {"mean": torch.zeros(1, 3, 1, 1), "hidden_mean": torch.zeros(1, 20, 1, 1)}
    return Net(run, a=conv(3, 20), b=conv(20, 5), **parts), picture()


class FrozenBatchNorm(nn.Module):
    """BatchNorm whose statistics and affine parameters are buffers, as in torchvision and DETR."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


@network("FrozenBatchNorm2d", "buffers norm", widths=(24, 32))
def frozen_batch_norm():
    body = [conv(3, 24, bias=False), FrozenBatchNorm(24), nn.ReLU(), conv(24, 32), FrozenBatchNorm(32), head(32)]
    return nn.Sequential(*body), picture()


@network("DnCNN: the last layer is subtracted from the input", "residual", widths=(24, 24))
def dncnn():
    return Net(lambda m, x: x - m.c(m.b(m.a(x))), a=conv_bn(3, 24), b=conv_bn(24, 24), c=conv(24, 3)), picture()


@network("a frozen backbone beside a trained branch", "frozen", widths=(16, 24))
def frozen_branch():
    def run(m, x):
        return m.head(F.relu(m.frozen(x) + m.trained(x)))

    frozen = nn.Sequential(conv_bn(3, 16), conv(16, 24)).requires_grad_(False)
    return Net(run, frozen=frozen, trained=conv_bn(3, 24), head=head(24)), picture()


@network("a backbone frozen whole", "frozen residual", widths=(16, 16, 32))
def frozen_backbone():
    backbone = nn.Sequential(conv_bn(3, 16), BasicBlock(16, 16), conv_bn(16, 32)).requires_grad_(False)
    return nn.Sequential(backbone, head(32)), picture()


@network("a gate is detached from the graph", "gate detached", widths=(24,))
def detached_gate():
    def run(m, x):
        x = F.relu(m.stem(x))
        gate = m.fc(x.mean((2, 3))).sigmoid().detach()
        return m.head(x * gate[:, :, None, None])

    return Net(run, stem=conv(3, 24), fc=nn.Linear(24, 24), head=head(24)), picture()


@network("a part runs under torch.no_grad", "detached", widths=(16, 24))
def no_grad_part():
    def run(m, x):
        with torch.no_grad():
            x = m.b(F.relu(m.a(x)))
        return m.head(F.relu(x))

    return Net(run, a=conv(3, 16), b=conv(16, 24), head=head(24)), picture()


@network("the head is the embedding", "shared_weights", widths=(24, 40))
def tied_embedding():
    def run(m, tokens):
        x = m.emb(tokens)
        x = x + m.b(F.gelu(m.a(x)))
        return m.head(x)

    emb, last = nn.Embedding(30, 24), nn.Linear(24, 30, bias=False)
    last.weight = emb.weight
    return Net(run, emb=emb, a=nn.Linear(24, 40), b=nn.Linear(40, 24), head=last), (torch.arange(14).view(2, 7) * 2,)


@network("an autoencoder whose decoder is the transpose of its encoder", "shared_weights", widths=(30,))
def tied_transpose():
    def run(m, x):
        return F.linear(F.relu(m.encoder(x)), m.encoder.weight.t(), m.bias)

    return Net(run, encoder=nn.Linear(12, 30), bias=nn.Parameter(torch.zeros(12))), noise(3, 12)


@network("two convolutions of one weight", "shared_weights", widths=(16,))
def tied_convolutions():
    left, right = conv(3, 16), conv(3, 16)
    right.weight = left.weight
    return Net(
        lambda m, x, y: m.last(torch.cat([m.left(x), m.right(y)], 1)), left=left, right=right, last=conv(32, 5)
    ), (picture(), noise(2, 3, 16, 16, seed=1))


class StandardizedConv2d(nn.Conv2d):
    """Weights less their mean and over their deviation, both by the statistics of a batch norm, as NF-ResNet does."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


@network(
    "standardised weights: statistics of a kernel run over its input channels",
    "computed_weights cross_channel",
    widths=(16, 24),
)
def standardized_weights():
    layers = [StandardizedConv2d(a, b, 3) for a, b in ((3, 16), (16, 24), (24, 5))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), picture()


@network(
    "weight_norm: the norm of a kernel runs over its input channels", "computed_weights cross_channel", widths=(16, 24)
)
def weight_norm():
    layers = [parametrizations.weight_norm(conv(a, b)) for a, b in ((3, 16), (16, 24), (24, 5))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), picture()


@network("spectral_norm: the norm is a product with two buffers", "computed_weights", widths=(16, 24))
def spectral_norm():
    layers = [parametrizations.spectral_norm(nn.Linear(a, b)) for a, b in ((10, 16), (16, 24), (24, 5))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), noise(4, 10)


@network(
    "an orthogonal weight: a matrix that is decomposed as a whole has no part to cut",
    "computed_weights refused",
    widths=(),
)
def linalg_householder_product():
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(16, 10)), nn.ReLU(), nn.Linear(10, 5)), noise(4, 16)


class Tied(nn.Module):
    """Input embedding and output head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.hidden = nn.Linear(16, 32)
        self.back = nn.Linear(32, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.back(torch.relu(self.hidden(x))))


class Tokens(nn.Module):
    """A class token, positions and a scale for each channel: parameters of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(6, 8), nn.Parameter(torch.zeros(1, 1, 8))
        self.positions, self.scale = nn.Parameter(torch.zeros(1, 5, 8)), nn.Parameter(torch.ones(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.positions
        return self.head(self.norm(x * self.scale)[:, 0])


@network("a class token, positions and a scale of channels", "parameters norm cross_channel layer", widths=(8,))
def parameters_of_no_layer():
    return Tokens(), noise(3, 4, 6)
