"""Prune a network of real digits while it trains on: to an eighth of its channels, little by little.

python examples/training_digits.py [--ratio 0.875] [--epochs 8] [--output out/training]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from digits import BATCH, Digits, DigitsNet, accuracy, fit, load_data
from torch import nn
from torch.nn import functional

import torchshear
from torchshear.pruners.schedules import AGP

MakeSession = Callable[[torch.optim.Optimizer, int], torchshear.PruningSession]


def train_pruned(
    data: Digits, model: nn.Module, n_epochs: int, learning_rate: float, seed: int, make: MakeSession
) -> Any:
    """Train as `digits.fit` does, and tell a session where the training is.

    Args:
        data: the digits.
        model: changed in place.
        n_epochs: passes over the training images.
        learning_rate: highest value in the cycle of the learning rate.
        seed: of the order of the images.
        make: makes the session, of the optimizer and the number of its steps.

    Returns:
        The result of the session.
    """
    generator = torch.Generator().manual_seed(seed)
    n_batches = len(data.train_labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_epochs * n_batches)
    model.train()
    session = make(optimizer, n_epochs * n_batches)
    session.on_train_begin()
    for epoch in range(n_epochs):
        session.on_epoch_begin(epoch)
        order = torch.randperm(len(data.train_labels), generator=generator)
        for chosen in order[: n_batches * BATCH].split(BATCH):
            session.on_step_begin()
            scores = session.model(data.train_images[chosen])
            loss = functional.cross_entropy(scores, data.train_labels[chosen])
            (loss + session.penalty()).backward()
            session.on_before_optimizer_step()
            optimizer.step()
            session.on_after_optimizer_step()
            optimizer.zero_grad()
            rate.step()
            session.on_step_end(loss)
        session.on_epoch_end()
    session.on_train_end()
    return session.finish()


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.875, help="share of the channels that goes")
    parser.add_argument(
        "--epochs", type=int, default=8, help="of the training before, and of that in which it is pruned"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out/training"), help="folder for plan, weights and picture"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    data, model = load_data(), DigitsNet((32, 64, 128))
    fit(model, data, options.epochs, 3e-3)
    example, tests = data.test_images[:2], (data.test_images, data.test_labels)
    print(f"dense          {accuracy(model, *tests):.1%} of the test digits right")

    def session_of(optimizer: torch.optim.Optimizer, n_steps: int) -> torchshear.PruningSession:
        schedule = AGP(end=n_steps // 2, frequency=max(1, n_steps // 12))
        asked = {"ratio": options.ratio, "criterion": "l1", "schedule": schedule, "optimizer": optimizer}
        return torchshear.PruningSession(model, example, shrink_every=1, **asked)

    result = train_pruned(data, model, options.epochs, 3e-3, 0, session_of)
    small = result.model.eval()
    print(result.history)
    print(result.report)
    print(f"pruned         {accuracy(small, *tests):.1%} right, equal to the masked network to "
          f"{result.verification.max_error:.1e}")  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    result.plan.save(options.output / "plan.json")
    torch.save(small.state_dict(), options.output / "pruned.pt")
    result.history.draw(options.output / "history.png")
    print(f"Plan, weights and the picture of the training are in {options.output}.")


if __name__ == "__main__":
    main()
