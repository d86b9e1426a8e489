"""A small network for every kind of layer that criteria score."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.models import Attention, Tied


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


class Recurrent(nn.Module):
    """Two layers of an LSTM in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 7, 2, batch_first=True, bidirectional=True), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


class Experts(nn.Module):
    """Weights of all experts in one tensor, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(6, 4), nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.zeros(4, 6, 9)), nn.Parameter(torch.zeros(4, 9, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bnd,edf->benf", x, self.up).relu()
        y = torch.einsum("benf,efd->bend", y, self.down)
        return self.head((y * self.router(x).softmax(-1).permute(0, 2, 1)[..., None]).sum(1))


class Steps(nn.Module):
    """What a recurrent layer gives at every step, without its final state."""

    def forward(self, results: tuple[Tensor, Tensor]) -> Tensor:
        return results[0]


class Pooled(nn.Module):
    """Mean of the results over the tokens."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(1)


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


SEQUENCE, MAP, VOLUME, WORDS = (3, 3, 8), (3, 3, 6, 6), (3, 3, 5, 5, 5), (3, 4, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (chain(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 1)), SEQUENCE),
    "conv3d": (chain(nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.SiLU(), nn.Conv3d(6, 4, 1)), VOLUME),
    "transposed1d": (chain(nn.ConvTranspose1d(3, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 4, 1)), SEQUENCE),
    "transposed2d in groups": (
        chain(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)),
        MAP,
    ),
    "transposed3d": (chain(nn.ConvTranspose3d(3, 6, 2), nn.ReLU(), nn.Conv3d(6, 4, 1)), VOLUME),
    "depthwise": (chain(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.PReLU(6), nn.Conv2d(6, 4, 1)), MAP),
    "group norm": (chain(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 1)), MAP),
    "instance norm": (
        chain(nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.Conv2d(6, 4, 1)),
        MAP,
    ),
    "norm without scale": (
        chain(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 4, 1)),
        MAP,
    ),
    "linear": (chain(nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 4, bias=False)), WORDS),
    "root mean square norm": (chain(nn.Linear(6, 9, bias=False), nn.RMSNorm(9), nn.Linear(9, 4)), WORDS),
    "embedding": (Tied, ()),
    "parameters": (Tokens, WORDS),
    "lstm": (Recurrent, WORDS),
    "rnn with relu": (chain(nn.RNN(6, 7, nonlinearity="relu"), Steps(), nn.Linear(7, 3)), WORDS),
    "experts": (Experts, WORDS),
    "attention": (lambda: nn.Sequential(Attention(), nn.Linear(24, 4)), (3, 4, 24)),
}
