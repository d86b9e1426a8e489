"""Cases 35 to 41: recurrent layers, other dimensions, padding, copies, several inputs and outputs."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.blocks import Net
from tests.cases._base import case, conv, conv_bn, head, image, noise
from tests.cases.plain import BasicBlock


def _recurrent(layer: nn.Module) -> tuple:
    return Net(lambda m, x: m.fc(m.rnn(x)[0]), rnn=layer, fc=nn.Linear(16, 5)), (noise(2, 6, 8),)


@case(35, "nn.LSTM: gate blocks of the weights go with the hidden units")
def lstm():
    return _recurrent(nn.LSTM(8, 16, batch_first=True))


@case(35, "nn.GRU of two layers: gate blocks of the weights go with the hidden units")
def gru():
    return _recurrent(nn.GRU(8, 16, num_layers=2, batch_first=True))


@case(35, "nn.RNN: gate blocks of the weights go with the hidden units")
def rnn():
    return _recurrent(nn.RNN(8, 16, batch_first=True))


@case(35, "a bidirectional LSTM of two layers with projections, read at its final states")
def lstm_final_states():
    def run(m, x):
        _, (state, _) = m.rnn(x)
        return m.fc(torch.cat([state[-2], state[-1]], 1))

    layer = nn.LSTM(8, 16, num_layers=2, bidirectional=True, proj_size=6)
    return Net(run, rnn=layer, fc=nn.Linear(12, 5)), (noise(6, 2, 8),)


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


@case(41, "attention by nn.MultiheadAttention")
def multihead_attention():
    attention = nn.MultiheadAttention(24, 4, batch_first=True)

    def run(m, x):
        x = m.stem(x)
        return m.last(x + m.attention(x, x, x, need_weights=False)[0] / math.sqrt(2))

    return Net(run, stem=nn.Linear(10, 24), attention=attention, last=nn.Linear(24, 5)), (noise(2, 7, 10),)
