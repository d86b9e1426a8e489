"""Small models that break pruners, one function each, numbered as in the head-to-head list (0: the parity bar).

A case says what pruning it must end in: "exact" (equal to the zero-masked original), "mixed" (a norm, softmax or mean
runs over a pruned axis, so zeroing is not cutting), or "refused" (nothing can be cut, and the reason is given).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.strategies import Net, randomise

Built = tuple[nn.Module, tuple, dict]
Expectation = Literal["exact", "mixed", "refused"]


@dataclass(frozen=True, slots=True)
class Case:
    """A model with its example inputs, and what pruning it must end in.

    A deferred case may be refused for now; what is cut must be right all the same.
    """

    number: int
    name: str
    build: Callable[[], Built]
    expect: Expectation
    note: str
    is_deferred: bool = False

    @property
    def id(self) -> str:
        return f"{self.number:02d}-{self.name}"


_REGISTERED: list[Case] = []


def case(number: int, note: str, expect: Expectation = "exact", is_deferred: bool = False) -> Callable:
    """Register a function that builds a model and its arguments; weights are made random and float64 here."""

    def register(build: Callable[[], tuple]) -> Callable[[], tuple]:
        def built() -> Built:
            with torch.random.fork_rng(devices=[]):
                model, args, *rest = build()
            model = randomise(model.double().eval(), seed=100 + number)
            return model, args, rest[0] if rest else {}

        _REGISTERED.append(Case(number, build.__name__, built, expect, note, is_deferred))
        return build

    return register


def noise(*shape: int, seed: int = 0) -> Tensor:
    """A random float64 input."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(channels: int = 3, size: int = 16) -> Tensor:
    return noise(2, channels, size, size)


def conv(c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)


def conv_bn(c_in: int, c_out: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(c_in, c_out, kernel, bias=False, **options), nn.BatchNorm2d(c_out), nn.ReLU())


def head(channels: int, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


# --- 0: what every pruner must do -------------------------------------------------------------------------------------


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


# --- 17-19: attention -------------------------------------------------------------------------------------------------


class FusedAttention(nn.Module):
    """Fused qkv as timm writes it; `taking` chooses unbind or indices, `is_explicit` the matmul-softmax form."""

    def __init__(self, width: int, heads: int, taking: str = "unbind", is_explicit: bool = False) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.scale, self.taking, self.is_explicit = self.head_width**-0.5, taking, is_explicit
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0) if self.taking == "unbind" else (qkv[0], qkv[1], qkv[2])
        if self.is_explicit:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


def _attention_net(taking: str, is_explicit: bool) -> tuple:
    attention = FusedAttention(24, 4, taking, is_explicit)

    def run(m, x):
        x = m.stem(x)
        return m.last(x + m.attention(x))

    return Net(run, stem=nn.Linear(10, 24), attention=attention, last=nn.Linear(24, 5)), (noise(2, 7, 10),)


@case(17, "fused qkv, reshape and unbind, SDPA: heads and head dimensions are separate groups")
def qkv_unbind_sdpa():
    return _attention_net("unbind", is_explicit=False)


@case(17, "fused qkv taken by index, explicit softmax")
def qkv_select_explicit():
    return _attention_net("index", is_explicit=True)


@case(17, "fused qkv, unbind, explicit softmax")
def qkv_unbind_explicit():
    return _attention_net("unbind", is_explicit=True)


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), FusedAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@case(17, "Vision Transformer: patches, class token, positions, pre-norm block", expect="mixed")
def vit():
    def run(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
        return m.head(m.norm(m.block(x))[:, 0])

    return Net(
        run,
        patches=nn.Conv2d(3, 24, 4, 4),
        token=nn.Parameter(torch.zeros(1, 1, 24)),
        position=nn.Parameter(torch.zeros(1, 17, 24)),
        block=ViTBlock(24, 4),
        norm=nn.LayerNorm(24),
        head=nn.Linear(24, 10),
    ), (image(),)


@case(18, "attention whose values are wider than its keys")
def attention_unequal_widths():
    def run(m, x, context):
        b, n, _ = x.shape
        q = m.q(x).view(b, n, 2, 4).transpose(1, 2)
        k = m.k(context).view(b, -1, 2, 4).transpose(1, 2)
        v = m.v(context).view(b, -1, 2, 6).transpose(1, 2)
        weights = torch.matmul(q, k.transpose(2, 3)).div(2.0).softmax(-1)
        return m.out(torch.matmul(weights, v).transpose(1, 2).reshape(b, n, 12))

    layers = {"q": nn.Linear(10, 8), "k": nn.Linear(9, 8), "v": nn.Linear(9, 12), "out": nn.Linear(12, 5)}
    return Net(run, **layers), (noise(2, 6, 10), noise(2, 4, 9))


@case(18, "cross dimensions by einsum and bmm")
def einsum_cross():
    def run(m, x):
        q, k, v = m.q(x), m.k(x), m.v(x)
        state = torch.einsum("bnd,bne->bde", k, v)
        return m.out(torch.bmm(q, state))

    layers = {"q": nn.Linear(10, 8), "k": nn.Linear(10, 8), "v": nn.Linear(10, 12), "out": nn.Linear(12, 5)}
    return Net(run, **layers), (noise(2, 6, 10),)


@case(18, "MLP-Mixer without norms: tokens and channels are mixed in turn")
def mixer():
    def run(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = x + m.token2(F.gelu(m.token1(x.transpose(1, 2)))).transpose(1, 2)
        x = x + m.channel2(F.gelu(m.channel1(x)))
        return m.head(x.mean(1))

    return Net(
        run,
        patches=nn.Conv2d(3, 24, 4, 4),
        token1=nn.Linear(16, 20),
        token2=nn.Linear(20, 16),
        channel1=nn.Linear(24, 48),
        channel2=nn.Linear(48, 24),
        head=nn.Linear(24, 10),
    ), (image(),)


@case(18, "MLP-Mixer as published", expect="mixed")
def mixer_normed():
    def run(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = x + m.token2(F.gelu(m.token1(m.norm1(x).transpose(1, 2)))).transpose(1, 2)
        return m.head(m.norm2(x).mean(1))

    return Net(
        run,
        patches=nn.Conv2d(3, 24, 4, 4),
        norm1=nn.LayerNorm(24),
        token1=nn.Linear(16, 20),
        token2=nn.Linear(20, 16),
        norm2=nn.LayerNorm(24),
        head=nn.Linear(24, 10),
    ), (image(),)


def _grouped_query(repeat: Callable[[Tensor], Tensor]) -> tuple:
    def run(m, x):
        b, n, _ = x.shape
        q = m.q(x).view(b, n, 4, 6).transpose(1, 2)
        k, v = (repeat(layer(x).view(b, n, 2, 6).transpose(1, 2)) for layer in (m.k, m.v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.out(x.transpose(1, 2).reshape(b, n, 24))

    layers = {"q": nn.Linear(10, 24), "k": nn.Linear(10, 12), "v": nn.Linear(10, 12), "out": nn.Linear(24, 5)}
    return Net(run, **layers), (noise(2, 7, 10),)


@case(19, "grouped-query attention by repeat_interleave", is_deferred=True)
def gqa_repeat():
    return _grouped_query(lambda x: x.repeat_interleave(2, dim=1))


@case(19, "grouped-query attention by expand and reshape, as Hugging Face does", is_deferred=True)
def gqa_expand():
    def repeat(x):
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)

    return _grouped_query(repeat)


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


@case(29, "weight_norm: the norm of a kernel runs over its input channels", expect="mixed")
def weight_norm():
    layers = [parametrizations.weight_norm(conv(a, b)) for a, b in ((3, 16), (16, 24), (24, 5))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), (image(),)


@case(29, "spectral_norm: the norm is a product with two buffers")
def spectral_norm():
    layers = [parametrizations.spectral_norm(nn.Linear(a, b)) for a, b in ((10, 16), (16, 24), (24, 5))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), (noise(4, 10),)


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


# --- 35-41: the rest --------------------------------------------------------------------------------------------------


def _recurrent(layer: nn.Module) -> tuple:
    return Net(lambda m, x: m.fc(m.rnn(x)[0]), rnn=layer, fc=nn.Linear(16, 5)), (noise(2, 6, 8),)


@case(35, "nn.LSTM", expect="refused")
def lstm():
    return _recurrent(nn.LSTM(8, 16, batch_first=True))


@case(35, "nn.GRU of two layers", expect="refused")
def gru():
    return _recurrent(nn.GRU(8, 16, num_layers=2, batch_first=True))


@case(35, "nn.RNN", expect="refused")
def rnn():
    return _recurrent(nn.RNN(8, 16, batch_first=True))


@case(36, "causal Conv1d cropped in time")
def causal_crop():
    def run(m, x):
        x = F.relu(m.a(x))[:, :, : -m.crop]
        return m.c(F.relu(m.b(F.pad(x, (2, 0))))[:, :, 2:])

    layers = {"a": nn.Conv1d(4, 16, 3, padding=2), "b": nn.Conv1d(16, 24, 3), "c": nn.Conv1d(24, 5, 1)}
    return Net(run, crop=2, **layers), (noise(2, 4, 20),)


@case(36, "Conv3d with every second frame")
def temporal_stride():
    def run(m, x):
        x = F.relu(m.norm(m.a(x)))[:, :, ::2]
        return m.fc(m.b(x).mean((2, 3, 4)))

    layers = {"a": nn.Conv3d(3, 12, 3, padding=1), "norm": nn.BatchNorm3d(12), "b": nn.Conv3d(12, 16, 3)}
    return Net(run, fc=nn.Linear(16, 5), **layers), (noise(2, 3, 6, 6, 6),)


@case(37, "returns (logits, None)")
def returns_none():
    return Net(lambda m, x: (m.b(m.a(x)), None), a=conv_bn(3, 16), b=head(16)), (image(),)


@case(38, "ends in a concatenation")
def final_cat():
    def run(m, x):
        x = m.stem(x)
        return torch.cat([m.a(x), m.b(x)], 1)

    return Net(run, stem=conv_bn(3, 24), a=conv(24, 16), b=conv(24, 4)), (image(),)


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


@case(39, "CIFAR ResNet, option A: the shortcut is padded with zero channels")
def pad_shortcut():
    body = [conv_bn(3, 16), BasicBlock(16, 16), PaddedBlock(16, 32), BasicBlock(32, 32), head(32)]
    return nn.Sequential(*body), (image(),)


@case(39, "F.unfold before a Linear")
def unfold():
    def run(m, x):
        columns = F.unfold(F.relu(m.a(x)), 3, padding=1)
        return m.fc(columns.transpose(1, 2)).mean(1)

    return Net(run, a=conv(3, 8), fc=nn.Linear(72, 5)), (image(size=8),)


@case(39, "channels are repeated")
def repeat():
    return Net(lambda m, x: m.b(m.a(x).repeat(1, 2, 1, 1)), a=conv_bn(3, 12), b=conv(24, 5)), (image(),)


@case(39, "two maps interleaved by stack and view")
def stack_view():
    def run(m, x):
        a, b = m.a(x), m.b(x)
        n, c, h, w = a.shape
        return m.c(torch.stack([a, b], 2).view(n, 2 * c, h, w))

    return Net(run, a=conv_bn(3, 12), b=conv_bn(3, 12), c=conv(24, 5)), (image(),)


@case(40, "several inputs, some by name, one unused")
def several_inputs():
    def run(m, x, *, scale, context=None):
        y = F.relu(m.a(x)) * scale
        return {"main": m.c(y + m.b(context)), "side": m.d(y)}

    model = Net(run, a=conv(3, 16), b=conv(2, 16), c=conv(16, 4), d=conv(16, 2))
    return model, (image(),), {"scale": noise(2, 1, 1, 1), "context": image(2)}


@case(41, "gated linear unit by chunk: half of the units asked, half cut")
def glu_chunk():
    def run(m, x):
        a, b = m.a(x).chunk(2, 1)
        return m.head(a * torch.sigmoid(b))

    return Net(run, a=conv(3, 48), head=head(24)), (image(),)


@case(41, "SwiGLU of fused halves")
def swiglu():
    def run(m, x):
        gate, up = m.gate_up(x).split(m.width, dim=-1)
        return m.down(F.silu(gate) * up)

    return Net(run, gate_up=nn.Linear(10, 64), down=nn.Linear(32, 5), width=32), (noise(2, 6, 10),)


@case(41, "attention by nn.MultiheadAttention", is_deferred=True)
def multihead_attention():
    attention = nn.MultiheadAttention(24, 4, batch_first=True)

    def run(m, x):
        x = m.stem(x)
        return m.last(x + m.attention(x, x, x, need_weights=False)[0] / math.sqrt(2))

    return Net(run, stem=nn.Linear(10, 24), attention=attention, last=nn.Linear(24, 5)), (noise(2, 7, 10),)


CASES = tuple(_REGISTERED)
