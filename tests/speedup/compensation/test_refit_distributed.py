"""Refit in two processes, each with half of the data: the weights of one process with all of it."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import torchshear
from tests.processes import end_together
from torchshear.speedup import refit


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 6, 1),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    return model.double().eval()


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4)]


def fitted(batches: list[Tensor]) -> dict[str, Tensor]:
    model = network()
    result = torchshear.prune(model, data()[0][:2], ratio=0.5)
    small, record = refit(model, result.model, result.plan, batches, batches=len(batches), progress=False)
    assert record.is_kept
    assert record.error_after < record.error_before
    return small.state_dict()


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(fitted(data()[2 * rank : 2 * rank + 2]), Path(folder, f"{rank}.part"))
    Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.pt"))
    end_together(folder)


@pytest.mark.zoo
def test_two_processes_fit_what_one_fits(tmp_path: Path) -> None:
    expected = fitted(data())
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
