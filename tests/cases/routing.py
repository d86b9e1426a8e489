"""Cases 1 to 16: concatenation and split, positions that move, layouts that change."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.blocks import Net
from tests.cases._base import case, conv, conv_bn, head, image, noise

# --- 1-6: concatenation and split -------------------------------------------------------------------------------------


@case(1, "CoordConv: the input is concatenated with a feature map")
def cat_with_input():
    return Net(lambda m, x: m.b(torch.cat([x, F.relu(m.a(x))], 1)), a=conv(3, 16), b=conv(19, 8)), (image(),)


@case(1, "NeRF: the points join the hidden layer half-way")
def nerf_skip():
    def run(m, points):
        h = F.relu(m.b(F.relu(m.a(points))))
        return m.d(F.relu(m.c(torch.cat([points, h], -1))))

    layers = {"a": nn.Linear(6, 32), "b": nn.Linear(32, 32), "c": nn.Linear(38, 32), "d": nn.Linear(32, 4)}
    return Net(run, **layers), (noise(5, 6),)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv_bn(3, 16), conv_bn(16, 24), conv_bn(24, 32)
        self.up2, self.join2 = nn.ConvTranspose2d(32, 24, 2, 2), conv_bn(48, 24)
        self.up1, self.join1 = nn.ConvTranspose2d(24, 16, 2, 2), conv_bn(32, 16)
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(19, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        a = self.down1(image)
        b = self.down2(self.pool(a))
        x = self.middle(self.pool(b))
        x = self.join2(torch.cat([self.up2(x), b], 1))
        x = self.join1(torch.cat([a, self.up1(x)], 1))
        return self.last(torch.cat([image, x], 1))


@case(1, "U-Net whose last layer sees the input again")
def unet():
    return UNet(), (image(),)


@case(2, "halves are swapped")
def chunk_swapped():
    def run(m, x):
        a, b = m.stem(x).chunk(2, 1)
        return m.last(torch.cat([b, a], 1))

    return Net(run, stem=conv(3, 16), last=conv(16, 8)), (image(),)


@case(3, "parts of a split are used in the other order")
def uneven_split():
    def run(m, x):
        a, b = torch.split(F.relu(m.stem(x)), [m.f.in_channels, m.g.in_channels], 1)
        return m.last(m.f(a) + m.g(b))

    return Net(run, stem=conv(3, 12), f=conv(4, 10), g=conv(8, 10), last=conv(10, 5)), (image(),)


@case(4, "three parts, one convolution shared, returned in another order")
def split_reordered():
    def run(m, x):
        x1, x2, x3 = torch.split(m.stem(x), [10, 10, 20], 1)
        x1, x2, x3 = m.shared(x1), m.shared(x2), m.wide(x3)
        return m.c(x3), m.a(x1), m.b(x2)

    layers = {"shared": conv(10, 12), "wide": conv(20, 16), "a": conv(12, 2), "b": conv(12, 3), "c": conv(16, 4)}
    return Net(run, stem=conv_bn(3, 40), **layers), (image(),)


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


@case(5, "YOLOv8 C2f")
def c2f():
    return nn.Sequential(conv_bn(3, 16), C2f(16, 32), head(32)), (image(),)


@case(6, "split and chunk, pruned more than once")
def split_iterated():
    def run(m, x):
        a, b = torch.split(F.relu(m.stem(x)), [8, 16], 1)
        c, d = m.a(b).chunk(2, 1)
        return m.last(torch.cat([d, a, c, a], 1))

    return Net(run, stem=conv(3, 24), a=conv(16, 16), last=conv(32, 6)), (image(),)


# --- 7-16: positions move, layouts change -----------------------------------------------------------------------------


@case(7, "channels are reversed, alone and against themselves")
def flip():
    def run(m, x):
        x = m.b(m.a(x).flip(1))
        return m.c(F.relu(x) + x.flip(1))

    return Net(run, a=conv(3, 16), b=conv(16, 12), c=conv(12, 4)), (image(),)


@case(7, "channels are rolled")
def roll():
    return Net(lambda m, x: m.b(F.relu(m.a(x)).roll(3, 1)), a=conv(3, 16), b=conv(16, 4)), (image(),)


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


@case(8, "ShuffleNetV2 by view, transpose, view")
def shuffle_view():
    return nn.Sequential(conv_bn(3, 24), ShuffleUnit(24), ShuffleUnit(24), head(24)), (image(),)


@case(8, "ShuffleNetV1 with nn.ChannelShuffle between grouped convolutions")
def shuffle_module():
    body = [conv_bn(3, 24), conv_bn(24, 24, 1, groups=3), nn.ChannelShuffle(3), conv_bn(24, 24, groups=24), head(24)]
    return nn.Sequential(*body), (image(),)


@case(9, "flatten with channels last")
def nhwc_flatten():
    def run(m, x):
        x = F.max_pool2d(F.relu(m.a(x)), 4)
        return m.fc(x.permute(0, 2, 3, 1).flatten(1))

    return Net(run, a=conv(3, 16), fc=nn.Linear(256, 10)), (image(),)


@case(10, "(B, L, C) is flattened token by token")
def tokens_flatten():
    def run(m, x):
        x = F.gelu(m.a(x))
        return m.fc(x.reshape(x.shape[0], x.shape[1] * x.shape[2]))

    return Net(run, a=nn.Linear(6, 12), fc=nn.Linear(96, 5)), (noise(2, 8, 6),)


@case(11, "a flatten head, and a Linear on a 3-D value elsewhere")
def flatten_and_tokens():
    def run(m, x):
        x = F.relu(m.a(x))
        tokens = m.token(x.flatten(2).transpose(1, 2))
        return m.fc(F.max_pool2d(x, 4).flatten(1)) + m.out(F.relu(tokens)).mean(1)

    return Net(run, a=conv(3, 12), token=nn.Linear(12, 20), out=nn.Linear(20, 10), fc=nn.Linear(192, 10)), (image(),)


@case(12, "sub-pixel super-resolution")
def pixel_shuffle():
    def run(m, x):
        return m.c(F.relu(m.shuffle(m.b(F.relu(m.a(x))))))

    return Net(run, a=conv(3, 16), b=conv(16, 48), shuffle=nn.PixelShuffle(2), c=conv(12, 3)), (image(size=8),)


@case(12, "PixelUnshuffle after a convolution")
def pixel_unshuffle():
    return Net(lambda m, x: m.b(m.down(F.relu(m.a(x)))), a=conv(3, 8), down=nn.PixelUnshuffle(2), b=conv(32, 6)), (
        image(),
    )


@case(12, "space-to-depth by view and permute (YOLOv2 reorg)")
def space_to_depth():
    def run(m, x):
        x = F.relu(m.a(x))
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        return m.b(x)

    return Net(run, a=conv(3, 8), b=conv(32, 6)), (image(),)


@case(13, "gated linear unit over channels")
def glu_module():
    return nn.Sequential(conv(3, 32), nn.GLU(1), conv(16, 24), nn.GLU(dim=1), head(12)), (image(),)


@case(14, "q, k, v by chunk(3, dim=2) of a 3-D value")
def qkv_chunk():
    def run(m, x):
        q, k, v = m.qkv(x).chunk(3, dim=2)
        return m.out((q @ k.transpose(1, 2) / 4.0).softmax(-1) @ v)

    return Net(run, qkv=nn.Linear(12, 48), out=nn.Linear(16, 5)), (noise(2, 7, 12),)


@case(15, "Linear branches joined by cat(dim=2)")
def linear_branches():
    def run(m, x):
        return m.c(torch.cat([F.relu(m.a(x)), m.b(x)], dim=2))

    return Net(run, a=nn.Linear(8, 12), b=nn.Linear(8, 20), c=nn.Linear(32, 5)), (noise(2, 6, 8),)


@case(16, "class token and patches are split along the tokens")
def token_split():
    def run(m, x):
        x = F.gelu(m.a(x))
        first, patches = x.split([1, x.shape[1] - 1], dim=1)
        return m.b(first[:, 0]) + m.c(patches).mean(1)

    return Net(run, a=nn.Linear(8, 24), b=nn.Linear(24, 5), c=nn.Linear(24, 5)), (noise(2, 9, 8),)
