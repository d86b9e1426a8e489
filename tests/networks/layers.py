"""One kind of layer between others, for criteria, which score every kind."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.networks._base import noise, register
from tests.networks.attention import Attention
from tests.networks.weights import Tied


class Steps(nn.Module):
    """What a recurrent layer gives at every step, without its final state."""

    def forward(self, results: tuple[Tensor, Tensor]) -> Tensor:
        return results[0]


SEQUENCE, MAP, VOLUME, WORDS = noise(3, 3, 8), noise(3, 3, 6, 6), noise(3, 3, 5, 5, 5), noise(3, 4, 6)
# Name: tags, widths, input and layers.
LAYERS: dict[str, tuple[str, tuple[int, ...], Tensor, Callable[[], list[nn.Module]]]] = {
    "conv1d": ("", (6,), SEQUENCE, lambda: [nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 1)]),
    "conv3d": ("", (6,), VOLUME, lambda: [nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.SiLU(), nn.Conv3d(6, 4, 1)]),
    "transposed1d": (
        "transposed", (6,), SEQUENCE,
        lambda: [nn.ConvTranspose1d(3, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 4, 1)],
    ),
    "transposed2d_in_groups": (
        "transposed grouped", (4, 6), MAP,
        lambda: [nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)],
    ),
    "transposed3d": ("transposed", (6,), VOLUME, lambda: [nn.ConvTranspose3d(3, 6, 2), nn.ReLU(), nn.Conv3d(6, 4, 1)]),
    "depthwise": (
        "grouped", (6,), MAP,
        lambda: [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.PReLU(6), nn.Conv2d(6, 4, 1)],
    ),
    "group_norm": (
        "norm cross_channel", (6,), MAP,
        lambda: [nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 1)],
    ),
    "instance_norm_with_scale": (
        "norm", (6,), MAP,
        lambda: [nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.Conv2d(6, 4, 1)],
    ),
    "norm_without_scale": (
        "norm", (6,), MAP,
        lambda: [nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 4, 1)],
    ),
    "linear": (
        "norm cross_channel", (9,), WORDS,
        lambda: [nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 4, bias=False)],
    ),
    "root_mean_square_norm": (
        "norm cross_channel", (9,), WORDS, lambda: [nn.Linear(6, 9, bias=False), nn.RMSNorm(9), nn.Linear(9, 4)],
    ),
    "batch_norm_of_steps": (
        "cross_channel", (9,), WORDS,
        lambda: [nn.Linear(6, 9), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(9, 4)],
    ),
    "bidirectional_lstm": (
        "recurrent", (28,), WORDS,
        lambda: [nn.LSTM(6, 7, 2, batch_first=True, bidirectional=True), Steps(), nn.Linear(14, 3)],
    ),
    "rnn_with_relu": (
        "recurrent", (7,), WORDS, lambda: [nn.RNN(6, 7, nonlinearity="relu"), Steps(), nn.Linear(7, 3)],
    ),
    "embedding": ("shared_weights", (16, 32), torch.arange(12).view(3, 4) % 11, lambda: [Tied()]),
    "attention": ("attention traced", (3, 8, 24), noise(3, 4, 24), lambda: [Attention(), nn.Linear(24, 4)]),
}  # fmt: skip


def _built(layers: Callable[[], list[nn.Module]], x: Tensor) -> Callable[[], tuple]:
    def build() -> tuple:
        made = layers()
        return made[0] if len(made) == 1 else nn.Sequential(*made), x

    return build


for _name, (_tags, _widths, _x, _layers) in LAYERS.items():
    register(_name, f"{_name.replace('_', ' ')} between others", f"layer {_tags}", _widths, _built(_layers, _x))
