"""Small real networks that tests of several parts use."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


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
        """Logits of shape (batch, 5)."""
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.two(torch.relu(self.one(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Grouped(nn.Module):
    """A grouped convolution between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 12, 1)
        self.two = nn.Conv2d(12, 12, 3, groups=3)
        self.three = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A map of 4 channels."""
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


class Attention(nn.Module):
    """Self-attention with fused qkv, as vision transformers write it."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as the input, (batch, tokens, width)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Chunked(nn.Module):
    """A literal in the forward that no attribute holds: only the traced form can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.5)
        self.two = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A map of 4 channels."""
        x = self.norm(self.one(x))
        first, second = x.split([10, 6], 1)
        return self.two(self.drop(torch.cat([second, first], 1)))


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
        """Logits of shape (batch, tokens, 11)."""
        x = self.embedding(tokens)
        return self.head(x + self.back(torch.relu(self.hidden(x))))


class Classifier(nn.Module):
    """A norm in the first group alone, a ReLU behind the first two, another activation behind the third."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.three = nn.Conv2d(8, 12, 3), nn.Linear(12, 10)
        self.out = nn.Linear(10, 4)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (batch, 4)."""
        y = self.two(self.norm(self.one(x)).relu()).relu().mean((2, 3))
        return self.out(self.activation(self.three(y)))


def labelled(n_batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches of four pictures of 6 x 6 with one of four labels each, the same ones every time."""
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(4, 3, 6, 6, generator=generator), torch.randint(0, 4, (4,), generator=generator))
        for _ in range(n_batches)
    ]


def image(batch: int = 2, size: int = 8) -> Tensor:
    """A random image of three channels, the same every time."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic values of its own; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                values = torch.rand(buffer.shape, generator=generator)
                buffer.copy_(values + 0.5 if name.endswith("running_var") else values - 0.5)
    return model
