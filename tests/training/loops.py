"""A small network, its batches, and the loop that a user would write."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchshear import PruningSession

N_CLASSES = 5


class Residual(nn.Module):
    """Two convolutions whose outputs are added, a third that reads the sum, norms, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.side = nn.Conv2d(3, 8, 1, bias=False)
        self.last, self.scale = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm(self.stem(x)) + self.side(x))
        return self.head(functional.relu(self.scale(self.last(y))).mean((2, 3)))


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Residual().double()
    with torch.no_grad():
        for norm in (model.norm, model.scale):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.3, 0.3)
    return model


def perceptron(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, N_CLASSES)).double()


def images(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """The batch of a step, the same in every run."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, N_CLASSES, (size,), generator=generator)


def vectors(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, N_CLASSES, (size,), generator=generator)


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)


def steps_of(
    session: PruningSession,
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    n_steps: int,
    per_epoch: int = 4,
    first: int = 0,
    adds_penalty: bool = False,
) -> Iterator[int]:
    """Train as a user does, from a step on; gives the number of each step when it is over."""
    session.on_train_begin()
    step = first
    while step < n_steps:
        session.on_epoch_begin(step // per_epoch)
        while True:
            session.on_step_begin(step % per_epoch)
            x, target = batch(step)
            loss = functional.cross_entropy(model(x), target)
            (loss + session.penalty() if adds_penalty else loss).backward()
            session.on_before_optimizer_step()
            optimizer.step()
            session.on_after_optimizer_step()
            optimizer.zero_grad()
            session.on_step_end(loss)
            step += 1
            yield step - 1
            if step % per_epoch == 0 or step == n_steps:
                break
        session.on_epoch_end()
    session.on_train_end()


def train(*args: Any, **kwargs: Any) -> None:
    """All of `steps_of` at once."""
    for _ in steps_of(*args, **kwargs):
        pass
