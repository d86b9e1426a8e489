"""Case 0: what every pruner must do."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.blocks import Net
from tests.cases._base import case, conv, conv_bn, head, image, noise


@case(0, "plain VGG-like stack")
def sequential():
    body = [conv_bn(3, 16), nn.MaxPool2d(2), conv_bn(16, 24), nn.Dropout(0.2), conv_bn(24, 32), head(32)]
    return nn.Sequential(*body), (image(),)


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


@case(0, "ResNet with in-place sums and relu")
def residual():
    return nn.Sequential(conv_bn(3, 16), BasicBlock(16, 16), BasicBlock(16, 32, 2), head(32)), (image(),)


@case(0, "DenseNet block and transition")
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
    return Net(run, stem=conv(3, 16), layers=layers, transition=conv(40, 20, 1), head=head(20)), (image(),)


@case(0, "four branches of different width")
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
    return Net(run, stem=conv_bn(3, 16), head=head(40), **parts), (image(),)


@case(0, "MobileNetV2 inverted residual")
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
    ), (image(),)


@case(0, "ResNeXt bottleneck")
def grouped_bottleneck():
    def run(m, x):
        x = m.stem(x)
        return m.head(F.relu(x + m.c(m.b(m.a(x)))))

    parts = {"a": conv_bn(16, 32, 1), "b": conv_bn(32, 32, groups=4), "c": conv(32, 16, 1)}
    return Net(run, stem=conv_bn(3, 16), head=head(16), **parts), (image(),)


@case(0, "squeeze-and-excitation by 1x1 convolutions and by Linear")
def squeeze_excitation():
    def run(m, x):
        x = m.stem(x)
        x = x * m.b(F.relu(m.a(x.mean((2, 3), keepdim=True)))).sigmoid()
        gate = F.hardsigmoid(m.d(F.relu(m.c(F.adaptive_avg_pool2d(x, 1).flatten(1)))))
        return m.head(x * gate[:, :, None, None])

    parts = {"a": conv(32, 8, 1), "b": conv(8, 32, 1), "c": nn.Linear(32, 8), "d": nn.Linear(8, 32)}
    return Net(run, stem=conv_bn(3, 32), head=head(32), **parts), (image(),)


@case(0, "conv, flatten (channels first), Linear")
def flatten_head():
    body = [conv(3, 12), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(12 * 16, 40), nn.ReLU(), nn.Linear(40, 10)]
    return nn.Sequential(*body), (image(),)


@case(0, "generator: Linear, view as a map, transposed convolutions")
def generator():
    def run(m, z):
        x = m.fc(z).view(-1, 32, 4, 4)
        return torch.tanh(m.b(F.relu(m.norm(m.a(x)))))

    a, b = nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ConvTranspose2d(16, 3, 4, 2, 1)
    return Net(run, fc=nn.Linear(20, 512), a=a, norm=nn.BatchNorm2d(16), b=b), (noise(2, 20),)


@case(0, "LayerScale of shape (C,) and (C, 1, 1)")
def layer_scale():
    def run(m, x):
        x = m.stem(x)
        x = x + m.gamma * m.a(x)
        return m.head(x + (m.beta * m.b(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    gamma, beta = nn.Parameter(torch.zeros(24, 1, 1)), nn.Parameter(torch.zeros(24))
    return Net(run, stem=conv(3, 24), a=conv(24, 24), b=conv(24, 24), gamma=gamma, beta=beta, head=head(24)), (image(),)


@case(0, "one convolution applied three times, PReLU")
def shared_module():
    def run(m, x):
        x = m.stem(x)
        for _ in range(3):
            x = m.act(m.body(x))
        return m.head(x)

    return Net(run, stem=conv(3, 16), body=conv(16, 16), act=nn.PReLU(16), head=head(16)), (image(),)


@case(0, "dictionary of inputs")
def dict_input():
    def run(m, batch):
        return m.head(F.relu(m.a(batch["left"]) + m.b(batch["right"])))

    return Net(run, a=conv(3, 16), b=conv(1, 16), head=head(16)), ({"left": image(), "right": image(1)},)


@case(0, "parameters that no output depends on")
def unused_parameters():
    unused = nn.Parameter(torch.zeros(7, 3))
    return Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 16), b=conv(16, 4), unused=unused, idle=conv(5, 9)), (
        image(),
    )


@case(0, "up-sampling by interpolation")
def interpolate():
    def run(m, x):
        x = F.relu(m.b(F.avg_pool2d(F.relu(m.a(x)), 2)))
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return m.c(F.interpolate(x, size=(24, 24), mode="bilinear", align_corners=False))

    return Net(run, a=conv(3, 12), b=conv(12, 16), c=conv(16, 3)), (image(),)


@case(0, "MLP with skips and BatchNorm1d")
def mlp_skips():
    def run(m, x):
        x = F.relu(m.norm(m.stem(x)))
        x = x + m.b(F.gelu(m.a(x)))
        return m.last(torch.cat([x, m.c(x)], -1))

    parts = {"a": nn.Linear(32, 48), "b": nn.Linear(48, 32), "c": nn.Linear(32, 8), "last": nn.Linear(40, 10)}
    return Net(run, stem=nn.Linear(16, 32), norm=nn.BatchNorm1d(32), **parts), (noise(4, 16),)
