"""A residual CNN and scikit-learn's real handwritten digits: what the demo trains, prunes and measures.

torchshear inspect examples.digits:factory
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

BATCH = 64
NORM_LEARNING_RATE = 2e-2


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, n_in, H, W) to (N, n_out, H / stride, W / stride)."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A stem, three stages of residual blocks at 8x8, 4x4 and 2x2, global pooling and a linear classifier."""

    def __init__(self, widths: tuple[int, int, int] = (64, 128, 256), n_blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks, n_in = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(n_blocks):
                blocks.append(ResidualBlock(n_in, width, stride=2 if stage and not block else 1))
                n_in = width
        self.stages = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(n_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to scores of the ten digits (N, 10)."""
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))


@dataclass(frozen=True, slots=True)
class Digits:
    """1,797 images of 8x8 pixels, split; images are (N, 1, 8, 8) in [0, 1], labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(seed: int = 0) -> Digits:
    """Read the digits that scikit-learn brings along, and keep a fifth of each class for testing."""
    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(raw.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=seed, stratify=raw.target)
    return Digits(images[train], labels[train], images[test], labels[test])


def fit(
    model: nn.Module,
    data: Digits,
    n_epochs: int,
    learning_rate: float,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    scale_penalty: float = 0.0,
) -> None:
    """Train with AdamW and one cycle of the learning rate, each batch shifted by at most one pixel.

    With a penalty on the scales of batch norms, as in network slimming (Liu et al., arXiv:1708.06519), many of them
    come to zero. Norms then learn faster than the rest, and without weight decay.

    Args:
        model: changed in place; left in evaluation mode.
        data: the digits.
        n_epochs: passes over the training images.
        learning_rate: highest value in the cycle.
        seed: of the order and the shifts.
        progress: called with (epochs done, mean loss of the epoch).
        scale_penalty: the loss grows by so much for each unit of a scale.
    """
    generator = torch.Generator().manual_seed(seed)
    n_batches = len(data.train_labels) // BATCH
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] if scale_penalty else []
    of_norms = {parameter for norm in norms for parameter in norm.parameters()}
    groups = [{"params": [p for p in model.parameters() if p not in of_norms]}]
    groups += [{"params": list(of_norms), "weight_decay": 0.0}] if norms else []
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.01)
    highest = [learning_rate, NORM_LEARNING_RATE][: len(groups)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=n_epochs * n_batches)
    model.train()
    for epoch in range(n_epochs):
        order = torch.randperm(len(data.train_labels), generator=generator)
        total = 0.0
        for chosen in order[: n_batches * BATCH].split(BATCH):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            scores = model(_shifted(data.train_images[chosen], shift))
            loss = functional.cross_entropy(scores, data.train_labels[chosen])
            loss = loss + scale_penalty * sum(norm.weight.abs().sum() for norm in norms)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if progress is not None:
            progress(epoch + 1, total / n_batches)
    model.eval()


def _shifted(images: Tensor, shift: list[int]) -> Tensor:
    """Move images by (rows, columns), with empty pixels coming in."""
    down, right = shift
    return functional.pad(images, (1 + right, 1 - right, 1 + down, 1 - down))[..., 1:-1, 1:-1]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that a model in evaluation mode labels right."""
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def factory() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The untrained network and an example call, for the command line."""
    torch.manual_seed(0)
    return DigitsNet(), (load_data().test_images[:2],)
