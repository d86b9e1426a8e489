"""A classifier of words as a training loop of Neural Compressor calls it, its batches, and loops in its two forms."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchshear.compat.neural_compressor import CompressionManager, WeightPruningConfig, prepare_compression

N_WORDS, N_CLASSES = 20, 5


class Output(NamedTuple):
    """What the classifier gives, with its loss as models of transformers have it."""

    loss: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """Embeddings, three layers behind each other, of which the first holds two, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(N_WORDS, 16)
        self.layer1 = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Dropout(0.1))
        self.layer2 = nn.Sequential(nn.Linear(16, 24), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Linear(24, 16), nn.ReLU())
        self.classifier = nn.Linear(16, N_CLASSES)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        x = self.embeddings(input_ids).mean(1)
        logits = self.classifier(self.layer3(self.layer2(self.layer1(x))))
        return Output(functional.cross_entropy(logits, labels), logits)


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Classifier()


def batches(first: int = 0, count: int = 6) -> list[dict[str, Tensor]]:
    found = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        words = torch.randint(0, N_WORDS, (8, 6), generator=generator)
        found.append({"input_ids": words, "labels": words.sum(1) % N_CLASSES})
    return found


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train_with_hooks(manager: CompressionManager, optimizer: torch.optim.Optimizer, n_epochs: int = 2) -> Iterator[int]:
    """The loop that the pages of Neural Compressor show; gives the number of each step when it is over."""
    model, callbacks, number = manager.model, manager.callbacks, 0
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    callbacks.on_train_begin()
    for _ in range(n_epochs):
        model.train()
        for step, batch in enumerate(batches()):
            callbacks.on_step_begin(step)
            outputs = model(**batch)
            loss = outputs.loss
            loss.backward()
            callbacks.on_before_optimizer_step()
            optimizer.step()
            callbacks.on_after_optimizer_step()
            decay.step()
            model.zero_grad()
            yield number
            number += 1
    callbacks.on_train_end()


def trained(
    pruners: list[Mapping[str, Any]], common: Mapping[str, Any] | None = None, n_epochs: int = 2, seed: int = 0
) -> CompressionManager:
    """A manager whose training is over."""
    model = classifier(seed)
    manager = prepare_compression(model, WeightPruningConfig(pruners, **(common or {})))
    for _ in train_with_hooks(manager, sgd(model), n_epochs):
        pass
    return manager


def numbers(step: int, inputs: int = 8, size: int = 8) -> tuple[Tensor, Tensor]:
    """A batch of numbers, for models of linear layers."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, N_CLASSES, (size,), generator=generator)


def layers(inputs: int = 8, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, N_CLASSES)
    )
    return model.double()


def steps_on_numbers(
    manager: CompressionManager, optimizer: torch.optim.Optimizer, n_steps: int, inputs: int = 8, per_epoch: int = 0
) -> Iterator[int]:
    """A loop over batches of numbers, with all hooks if there are epochs."""
    model, callbacks = manager.model, manager.callbacks
    callbacks.on_train_begin()
    for step in range(n_steps):
        if per_epoch and step % per_epoch == 0:
            callbacks.on_epoch_begin(step // per_epoch)
        callbacks.on_step_begin(step)
        x, target = numbers(step, inputs)
        functional.cross_entropy(model(x), target).backward()
        callbacks.on_before_optimizer_step()
        optimizer.step()
        callbacks.on_after_optimizer_step()
        optimizer.zero_grad()
        if per_epoch:
            callbacks.on_step_end()
        yield step
        if per_epoch and step % per_epoch == per_epoch - 1:
            callbacks.on_epoch_end()
    callbacks.on_train_end()
