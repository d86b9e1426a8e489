"""What every pruner must do."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.networks._base import Net, conv, conv_bn, head, network, noise, picture


@network("plain VGG-like stack", "plain", widths=(16, 24, 32))
def sequential():
    body = [conv_bn(3, 16), nn.MaxPool2d(2), conv_bn(16, 24), nn.Dropout(0.2), conv_bn(24, 32), head(32)]
    return nn.Sequential(*body), picture()


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c_out, stride=stride, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv(c_out, c_out, bias=False), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x += identity
        return self.relu(x)


@network("ResNet with in-place sums and relu", "residual", widths=(16, 16, 32, 32))
def residual():
    return nn.Sequential(conv_bn(3, 16), BasicBlock(16, 16), BasicBlock(16, 32, 2), head(32)), picture()


@network("DenseNet block and transition", "concatenation", widths=(8, 8, 8, 16, 20, 32, 32, 32))
def dense():
    def run(m, x):
        x = m.stem(x)
        for layer in m.layers:
            x = torch.cat([x, layer(x)], 1)
        return m.head(m.transition(x))

    layers = nn.ModuleList(
        nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), conv(c, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), conv(32, 8))
        for c in (16, 24, 32)
    )
    return Net(run, stem=conv(3, 16), layers=layers, transition=conv(40, 20, 1), head=head(20)), picture()


@network("four branches of different width", "concatenation", widths=(4, 8, 8, 8, 12, 16, 16))
def inception():
    def run(m, x):
        x = m.stem(x)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return m.head(torch.cat([m.a(x), m.b(x), m.c(x), m.d(pooled)], 1))

    parts = {
        "a": conv_bn(16, 8, 1),
        "b": nn.Sequential(conv_bn(16, 12, 1), conv_bn(12, 16)),
        "c": nn.Sequential(conv_bn(16, 4, 1), conv_bn(4, 8, 5)),
        "d": conv_bn(16, 8, 1),
    }
    return Net(run, stem=conv_bn(3, 16), head=head(40), **parts), picture()


@network("MobileNetV2 inverted residual", "grouped residual", widths=(16, 64))
def inverted_residual():
    def run(m, x):
        x = m.stem(x)
        return m.head(x + m.project(m.depthwise(m.expand(x))))

    return Net(
        run,
        stem=conv_bn(3, 16),
        expand=conv_bn(16, 64, 1),
        depthwise=conv_bn(64, 64, groups=64),
        project=nn.Sequential(conv(64, 16, 1, bias=False), nn.BatchNorm2d(16)),
        head=head(16),
    ), picture()


@network("ResNeXt bottleneck", "grouped residual", widths=(16, 32, 32))
def grouped_bottleneck():
    def run(m, x):
        x = m.stem(x)
        return m.head(F.relu(x + m.c(m.b(m.a(x)))))

    parts = {"a": conv_bn(16, 32, 1), "b": conv_bn(32, 32, groups=4), "c": conv(32, 16, 1)}
    return Net(run, stem=conv_bn(3, 16), head=head(16), **parts), picture()


@network("conv, flatten (channels first), Linear", "reshaped", widths=(12, 40))
def flatten_head():
    body = [conv(3, 12), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(12 * 16, 40), nn.ReLU(), nn.Linear(40, 10)]
    return nn.Sequential(*body), picture()


@network("generator: Linear, view as a map, transposed convolutions", "reshaped transposed traced", widths=(16, 32))
def generator():
    def run(m, z):
        x = m.fc(z).view(-1, 32, 4, 4)
        return torch.tanh(m.b(F.relu(m.norm(m.a(x)))))

    a, b = nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ConvTranspose2d(16, 3, 4, 2, 1)
    return Net(run, fc=nn.Linear(20, 512), a=a, norm=nn.BatchNorm2d(16), b=b), noise(2, 20)


@network("LayerScale of shape (C,) and (C, 1, 1)", "parameters residual", widths=(24,))
def layer_scale():
    def run(m, x):
        x = m.stem(x)
        x = x + m.gamma * m.a(x)
        return m.head(x + (m.beta * m.b(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    gamma, beta = nn.Parameter(torch.zeros(24, 1, 1)), nn.Parameter(torch.zeros(24))
    return Net(run, stem=conv(3, 24), a=conv(24, 24), b=conv(24, 24), gamma=gamma, beta=beta, head=head(24)), picture()


@network("one convolution applied three times, PReLU", "shared_weights", widths=(16,))
def shared_module():
    def run(m, x):
        x = m.stem(x)
        for _ in range(3):
            x = m.act(m.body(x))
        return m.head(x)

    return Net(run, stem=conv(3, 16), body=conv(16, 16), act=nn.PReLU(16), head=head(16)), picture()


@network("parameters that no output depends on", "parameters", widths=(16,))
def unused_parameters():
    unused = nn.Parameter(torch.zeros(7, 3))
    return Net(
        lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 16), b=conv(16, 4), unused=unused, idle=conv(5, 9)
    ), picture()


@network("up-sampling by interpolation", "plain", widths=(12, 16))
def interpolate():
    def run(m, x):
        x = F.relu(m.b(F.avg_pool2d(F.relu(m.a(x)), 2)))
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return m.c(F.interpolate(x, size=(24, 24), mode="bilinear", align_corners=False))

    return Net(run, a=conv(3, 12), b=conv(12, 16), c=conv(16, 3)), picture()


@network("MLP with skips and BatchNorm1d", "residual concatenation", widths=(8, 32, 48))
def mlp_skips():
    def run(m, x):
        x = F.relu(m.norm(m.stem(x)))
        x = x + m.b(F.gelu(m.a(x)))
        return m.last(torch.cat([x, m.c(x)], -1))

    parts = {"a": nn.Linear(32, 48), "b": nn.Linear(48, 32), "c": nn.Linear(32, 8), "last": nn.Linear(40, 10)}
    return Net(run, stem=nn.Linear(16, 32), norm=nn.BatchNorm1d(32), **parts), noise(4, 16)


class Residual(nn.Module):
    """A residual block between two convolutions, with batch norms and a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.one = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.two = nn.Conv2d(2 * width, width, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.two(torch.relu(self.one(x)))
        return self.head(self.drop(x.mean((2, 3))))


@network("a residual block with a norm in front, dropout and a classifier", "residual", widths=(8, 16))
def residual_dropout():
    return Residual(), picture(size=8)


class Classifier(nn.Module):
    """A norm in the first group alone, a ReLU behind the first two, another activation behind the third."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.three = nn.Conv2d(8, 12, 3), nn.Linear(12, 10)
        self.out = nn.Linear(10, 4)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.norm(self.one(x)).relu()).relu().mean((2, 3))
        return self.out(self.activation(self.three(y)))


@network("a norm in the first group alone, activations of two kinds", "plain", widths=(8, 10, 12))
def classifier():
    return Classifier(torch.sigmoid), picture(size=6)


class GroupedBranch(nn.Module):
    """Convolutions with norms, the second in groups, a residual sum of the third, and a classifier."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu, groups: int = 2) -> None:
        super().__init__()
        self.act = act
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.up_norm = nn.Conv2d(8, 12, 3, padding=1, groups=groups), nn.BatchNorm2d(12)
        self.down = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        y = self.act(self.up_norm(self.up(x)))
        x = self.act(x + self.down(y))
        return self.head(x.mean((2, 3)))


@network("a branch with a grouped convolution beside a residual stream", "residual grouped", widths=(8, 12))
def grouped_branch():
    return GroupedBranch(), picture(size=6)


class ManyLayers(nn.Module):
    """Batch norms, a residual sum, a grouped and a depthwise convolution, and linear layers behind a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.one_norm = nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.BatchNorm2d(12)
        self.deep, self.two = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)
        self.hidden, self.head = nn.Linear(32, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.deep(torch.relu(self.one_norm(self.one(x)))))
        x = torch.relu(x + self.two(y))
        return self.head(torch.relu(self.hidden(F.adaptive_avg_pool2d(x, 2).flatten(1))))


@network(
    "norms, a residual sum, grouped and depthwise convolutions, a flattened map", "residual grouped", widths=(8, 9, 12)
)
def many_layers():
    return ManyLayers(), picture(size=5)
