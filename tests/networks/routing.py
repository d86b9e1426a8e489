"""Concatenation and split, positions that move, layouts that change, padding and copies."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.networks._base import Net, conv, conv_bn, head, network, noise, picture
from tests.networks.plain import BasicBlock


@network("CoordConv: the input is concatenated with a feature map", "concatenation", widths=(16,))
def cat_with_input():
    return Net(lambda m, x: m.b(torch.cat([x, F.relu(m.a(x))], 1)), a=conv(3, 16), b=conv(19, 8)), picture()


@network("NeRF: the points join the hidden layer half-way", "concatenation", widths=(32, 32, 32))
def nerf_skip():
    def run(m, points):
        h = F.relu(m.b(F.relu(m.a(points))))
        return m.d(F.relu(m.c(torch.cat([points, h], -1))))

    layers = {"a": nn.Linear(6, 32), "b": nn.Linear(32, 32), "c": nn.Linear(38, 32), "d": nn.Linear(32, 4)}
    return Net(run, **layers), noise(5, 6)


@network("U-Net whose last layer sees the input again", "concatenation transposed", widths=(16, 16, 16, 24, 24, 24, 32))
def unet():
    def run(m, image):
        a = m.down1(image)
        b = m.down2(m.pool(a))
        x = m.middle(m.pool(b))
        x = m.join2(torch.cat([m.up2(x), b], 1))
        x = m.join1(torch.cat([a, m.up1(x)], 1))
        return m.last(torch.cat([image, x], 1))

    down = {"down1": conv_bn(3, 16), "down2": conv_bn(16, 24), "middle": conv_bn(24, 32), "pool": nn.MaxPool2d(2)}
    up = {"up2": nn.ConvTranspose2d(32, 24, 2, 2), "up1": nn.ConvTranspose2d(24, 16, 2, 2)}
    return Net(run, **down, **up, join2=conv_bn(48, 24), join1=conv_bn(32, 16), last=conv(19, 2, 1)), picture()


@network("halves are swapped", "split", widths=(8, 8))
def chunk_swapped():
    def run(m, x):
        a, b = m.stem(x).chunk(2, 1)
        return m.last(torch.cat([b, a], 1))

    return Net(run, stem=conv(3, 16), last=conv(16, 8)), picture()


@network("parts of a split are used in the other order", "split", widths=(4, 8, 10))
def uneven_split():
    def run(m, x):
        a, b = torch.split(F.relu(m.stem(x)), [m.f.in_channels, m.g.in_channels], 1)
        return m.last(m.f(a) + m.g(b))

    return Net(run, stem=conv(3, 12), f=conv(4, 10), g=conv(8, 10), last=conv(10, 5)), picture()


@network(
    "three parts, one convolution shared, returned in another order",
    "split shared_weights signature traced",
    widths=(10, 12, 16, 20),
)
def split_reordered():
    def run(m, x):
        x1, x2, x3 = torch.split(m.stem(x), [10, 10, 20], 1)
        x1, x2, x3 = m.shared(x1), m.shared(x2), m.wide(x3)
        return m.c(x3), m.a(x1), m.b(x2)

    layers = {"shared": conv(10, 12), "wide": conv(20, 16), "a": conv(12, 2), "b": conv(12, 3), "c": conv(16, 4)}
    return Net(run, stem=conv_bn(3, 40), **layers), picture()


class C2f(nn.Module):
    """YOLOv8's block: a chunk is used by the concatenation and by the bottlenecks."""

    def __init__(self, c_in: int, c_out: int, n: int = 2) -> None:
        super().__init__()
        self.c = c_out // 2
        self.cv1, self.cv2 = conv_bn(c_in, 2 * self.c, 1), conv_bn((2 + n) * self.c, c_out, 1)
        self.m = nn.ModuleList(nn.Sequential(conv_bn(self.c, self.c), conv_bn(self.c, self.c)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(y[-1] + m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


@network("YOLOv8 C2f", "split concatenation residual", widths=(16, 16, 16, 16, 16, 32))
def c2f():
    return nn.Sequential(conv_bn(3, 16), C2f(16, 32), head(32)), picture()


@network("split and chunk, pruned more than once", "split concatenation traced", widths=(8, 8, 8, 16))
def split_iterated():
    def run(m, x):
        a, b = torch.split(F.relu(m.stem(x)), [8, 16], 1)
        c, d = m.a(b).chunk(2, 1)
        return m.last(torch.cat([d, a, c, a], 1))

    return Net(run, stem=conv(3, 24), a=conv(16, 16), last=conv(32, 6)), picture()


@network("channels are reversed, alone and against themselves", "moved", widths=(6, 16))
def flip():
    def run(m, x):
        x = m.b(m.a(x).flip(1))
        return m.c(F.relu(x) + x.flip(1))

    return Net(run, a=conv(3, 16), b=conv(16, 12), c=conv(12, 4)), picture()


@network("channels are rolled", "moved", widths=(16,))
def roll():
    return Net(lambda m, x: m.b(F.relu(m.a(x)).roll(3, 1)), a=conv(3, 16), b=conv(16, 4)), picture()


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit, sizes taken from the tensor as torchvision does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1),
            conv(half, half, groups=half, bias=False),
            nn.BatchNorm2d(half),
            conv_bn(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), 1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@network("ShuffleNetV2 by view, transpose, view", "moved split grouped", widths=(6, 6, 12, 12, 12))
def shuffle_view():
    return nn.Sequential(conv_bn(3, 24), ShuffleUnit(24), ShuffleUnit(24), head(24)), picture()


@network("ShuffleNetV1 with nn.ChannelShuffle between grouped convolutions", "moved grouped", widths=(8, 24))
def shuffle_module():
    body = [conv_bn(3, 24), conv_bn(24, 24, 1, groups=3), nn.ChannelShuffle(3), conv_bn(24, 24, groups=24), head(24)]
    return nn.Sequential(*body), picture()


@network("flatten with channels last", "reshaped", widths=(16,))
def nhwc_flatten():
    def run(m, x):
        x = F.max_pool2d(F.relu(m.a(x)), 4)
        return m.fc(x.permute(0, 2, 3, 1).flatten(1))

    return Net(run, a=conv(3, 16), fc=nn.Linear(256, 10)), picture()


@network("(B, L, C) is flattened token by token", "reshaped", widths=(12,))
def tokens_flatten():
    def run(m, x):
        x = F.gelu(m.a(x))
        return m.fc(x.reshape(x.shape[0], x.shape[1] * x.shape[2]))

    return Net(run, a=nn.Linear(6, 12), fc=nn.Linear(96, 5)), noise(2, 8, 6)


@network("a flatten head, and a Linear on a 3-D value elsewhere", "reshaped", widths=(12, 20))
def flatten_and_tokens():
    def run(m, x):
        x = F.relu(m.a(x))
        tokens = m.token(x.flatten(2).transpose(1, 2))
        return m.fc(F.max_pool2d(x, 4).flatten(1)) + m.out(F.relu(tokens)).mean(1)

    return Net(run, a=conv(3, 12), token=nn.Linear(12, 20), out=nn.Linear(20, 10), fc=nn.Linear(192, 10)), picture()


@network("sub-pixel super-resolution", "reshaped", widths=(12, 16))
def pixel_shuffle():
    def run(m, x):
        return m.c(F.relu(m.shuffle(m.b(F.relu(m.a(x))))))

    return Net(run, a=conv(3, 16), b=conv(16, 48), shuffle=nn.PixelShuffle(2), c=conv(12, 3)), picture(size=8)


@network("PixelUnshuffle after a convolution", "reshaped", widths=(8,))
def pixel_unshuffle():
    return Net(
        lambda m, x: m.b(m.down(F.relu(m.a(x)))), a=conv(3, 8), down=nn.PixelUnshuffle(2), b=conv(32, 6)
    ), picture()


@network("space-to-depth by view and permute (YOLOv2 reorg)", "reshaped", widths=(8,))
def space_to_depth():
    def run(m, x):
        x = F.relu(m.a(x))
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        return m.b(x)

    return Net(run, a=conv(3, 8), b=conv(32, 6)), picture()


@network("gated linear unit over channels", "gate", widths=(12, 16))
def glu_module():
    return nn.Sequential(conv(3, 32), nn.GLU(1), conv(16, 24), nn.GLU(dim=1), head(12)), picture()


@network("q, k, v by chunk(3, dim=2) of a 3-D value", "attention split", widths=(16, 16))
def qkv_chunk():
    def run(m, x):
        q, k, v = m.qkv(x).chunk(3, dim=2)
        return m.out((q @ k.transpose(1, 2) / 4.0).softmax(-1) @ v)

    return Net(run, qkv=nn.Linear(12, 48), out=nn.Linear(16, 5)), noise(2, 7, 12)


@network("Linear branches joined by cat(dim=2)", "concatenation", widths=(12, 20))
def linear_branches():
    def run(m, x):
        return m.c(torch.cat([F.relu(m.a(x)), m.b(x)], dim=2))

    return Net(run, a=nn.Linear(8, 12), b=nn.Linear(8, 20), c=nn.Linear(32, 5)), noise(2, 6, 8)


@network("class token and patches are split along the tokens", "split", widths=(24,))
def token_split():
    def run(m, x):
        x = F.gelu(m.a(x))
        first, patches = x.split([1, x.shape[1] - 1], dim=1)
        return m.b(first[:, 0]) + m.c(patches).mean(1)

    return Net(run, a=nn.Linear(8, 24), b=nn.Linear(24, 5), c=nn.Linear(24, 5)), noise(2, 9, 8)


@network("causal Conv1d cropped in time", "split", widths=(16, 24))
def causal_crop():
    def run(m, x):
        x = F.relu(m.a(x))[:, :, : -m.crop]
        return m.c(F.relu(m.b(F.pad(x, (2, 0))))[:, :, 2:])

    layers = {"a": nn.Conv1d(4, 16, 3, padding=2), "b": nn.Conv1d(16, 24, 3), "c": nn.Conv1d(24, 5, 1)}
    return Net(run, crop=2, **layers), noise(2, 4, 20)


@network("Conv3d with every second frame", "split", widths=(12, 16))
def temporal_stride():
    def run(m, x):
        x = F.relu(m.norm(m.a(x)))[:, :, ::2]
        return m.fc(m.b(x).mean((2, 3, 4)))

    layers = {"a": nn.Conv3d(3, 12, 3, padding=1), "norm": nn.BatchNorm3d(12), "b": nn.Conv3d(12, 16, 3)}
    return Net(run, fc=nn.Linear(16, 5), **layers), noise(2, 3, 6, 6, 6)


@network("ends in a concatenation", "concatenation", widths=(24,))
def final_cat():
    def run(m, x):
        x = m.stem(x)
        return torch.cat([m.a(x), m.b(x)], 1)

    return Net(run, stem=conv_bn(3, 24), a=conv(24, 16), b=conv(24, 4)), picture()


class PaddedBlock(nn.Module):
    """A down-sampling block of the CIFAR ResNet, option A."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c_out, stride=2, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv(c_out, c_out, bias=False), nn.BatchNorm2d(c_out)
        self.extra = (c_out - c_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra), "constant", 0)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


@network(
    "CIFAR ResNet, option A: the shortcut is padded with zero channels", "residual traced", widths=(16, 16, 16, 32, 32)
)
def pad_shortcut():
    body = [conv_bn(3, 16), BasicBlock(16, 16), PaddedBlock(16, 32), BasicBlock(32, 32), head(32)]
    return nn.Sequential(*body), picture()


@network("F.unfold before a Linear", "reshaped", widths=(8,))
def unfold():
    def run(m, x):
        columns = F.unfold(F.relu(m.a(x)), 3, padding=1)
        return m.fc(columns.transpose(1, 2)).mean(1)

    return Net(run, a=conv(3, 8), fc=nn.Linear(72, 5)), picture(size=8)


@network("channels are repeated", "copied", widths=(2, 12))
def repeat():
    return Net(lambda m, x: m.b(m.a(x).repeat(1, 2, 1, 1)), a=conv_bn(3, 12), b=conv(24, 5)), picture()


@network("two maps interleaved by stack and view", "reshaped", widths=(12,))
def stack_view():
    def run(m, x):
        a, b = m.a(x), m.b(x)
        n, c, h, w = a.shape
        return m.c(torch.stack([a, b], 2).view(n, 2 * c, h, w))

    return Net(run, a=conv_bn(3, 12), b=conv_bn(3, 12), c=conv(24, 5)), picture()


class Chunked(nn.Module):
    """A literal in the forward that no attribute holds: only the traced form can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.5)
        self.two = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x))
        first, second = x.split([10, 6], 1)
        return self.two(self.drop(torch.cat([second, first], 1)))


@network("sizes of a split that no attribute holds", "split traced", widths=(6, 10))
def literal_split():
    return Chunked(), picture(size=8)
