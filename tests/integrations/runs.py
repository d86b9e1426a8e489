"""Small networks, sessions and data for runs of real trainers, and the same training as a loop by hand."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

import torchshear
from tests.processes import end_together
from tests.zoo.torchvision_models import load_torchvision
from torchshear.pruners.regularizers import GroupLasso
from torchshear.pruners.schedules import Linear

N_CLASSES, N_FEATURES, N_SAMPLES, BATCH = 4, 6, 48, 4
LR = 0.2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(N_FEATURES, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, N_CLASSES)
    )  # fmt: skip


def session_of(model: nn.Module, **options: Any) -> torchshear.PruningSession:
    settings: dict[str, Any] = {
        "criterion": "taylor", "ratio": 0.5, "schedule": Linear(start=1, end=5, frequency=2),
        "regularizer": GroupLasso(1e-2), **options,
    }  # fmt: skip
    return torchshear.PruningSession(model, torch.randn(2, N_FEATURES), **settings)


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(N_SAMPLES, N_FEATURES, generator=generator)
    return x, torch.randint(0, N_CLASSES, (N_SAMPLES,), generator=generator)


class Samples(Dataset):
    """Samples as mappings, which the trainers of both libraries take."""

    def __init__(self) -> None:
        self.x, self.labels = samples()

    def __len__(self) -> int:
        return N_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


def loss_of(model: nn.Module, batch: Sequence[int]) -> Tensor:
    x, labels = samples()
    return functional.cross_entropy(model(x[list(batch)]), labels[list(batch)])


def by_hand(
    epochs: int, gather: int, clip: float, clips_first: bool, dtype: torch.dtype | None = None
) -> tuple[torchshear.PruneResult, dict[str, Tensor]]:
    """Train in a plain loop; `gather` batches a step, gradients clipped before or behind the session's hook."""
    model = network()
    session = session_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    batches = [range(first, first + BATCH) for first in range(0, N_SAMPLES, BATCH)]
    session.on_train_begin()
    for epoch in range(epochs):
        session.on_epoch_begin(epoch)
        for first in range(0, len(batches), gather):
            session.on_step_begin()
            for batch in batches[first : first + gather]:
                with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
                    loss = loss_of(model, batch)
                (loss / gather).backward()
            for is_clip in (clips_first, not clips_first):
                if is_clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                else:
                    session.on_before_optimizer_step()
            optimizer.step()
            session.on_after_optimizer_step()
            optimizer.zero_grad()
            session.on_step_end()
        session.on_epoch_end()
    session.on_train_end()
    return session.finish(), dict(model.state_dict())


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Assert that two states are equal bit for bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def check_result(result: torchshear.PruneResult) -> None:
    """Assert that a result has half of the channels and was proved."""
    assert [layer.out_features for layer in result.model if isinstance(layer, nn.Linear)] == [8, 4, N_CLASSES]
    assert result.verification.max_error < 1e-12
    assert not result.history.note


def as_rank(rank: int, folder: str, port: int, run: Callable[[str], dict[str, Tensor]]) -> None:
    """Run as one of two processes that a launcher has started, and save what the run gives."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    load_torchvision()  # the trainers import it
    state = run(folder)
    assert dist.get_backend() == "gloo"
    torch.save(state, f"{folder}/{rank}.pt")
    end_together(folder)
