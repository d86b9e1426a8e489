"""A network with rectified outputs, data for it, and a config."""

import torch
from torch import Tensor, nn

HALF = [{"op_types": ["Conv2d"], "sparsity": 0.5}]


class Plain(nn.Module):
    """Convolutions with rectified outputs, for criteria of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        return self.head(torch.relu(self.two(x)).mean((2, 3)))


def batches(n: int = 3):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 5, (4,), generator=generator)) for _ in range(n)
    ]
