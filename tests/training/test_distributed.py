"""Two processes that train one model with a session each agree bit for bit, and train as one on the data of both."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import torchshear
from tests.processes import end_together
from tests.training.loops import perceptron, sgd, train, vectors
from torchshear.pruners.regularizers import GroupLasso
from torchshear.pruners.schedules import AGP

N_STEPS = 8
CASES: dict[str, dict[str, Any]] = {
    "taylor": {"criterion": "taylor", "regularizer": GroupLasso(1e-2)},
    "weights": {"criterion": "snip_momentum", "pattern": "1x1"},
    "data": {"criterion": "apoz", "data": [vectors(50), vectors(51)], "batches": 2},
    "shrinking": {"criterion": "taylor", "shrink_every": 1},
}


def _session(model: nn.Module, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> torchshear.PruningSession:
    words = options | ({"optimizer": optimizer} if "shrink_every" in options else {})
    return torchshear.PruningSession(
        model, vectors(0)[0], ratio=0.5, schedule=AGP(start=1, end=7, frequency=2), **words
    )  # fmt: skip


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, options in CASES.items():
        model = perceptron()
        optimizer = sgd(model, 0.3)
        session = _session(model, optimizer, options)
        wrapped = DistributedDataParallel(session.model)
        session.on_train_begin()
        session.on_epoch_begin(0)
        for step in range(N_STEPS):
            session.on_step_begin(step)
            if wrapped.module is not session.model:  # it has shrunk
                wrapped = DistributedDataParallel(session.model)
            x, target = vectors(step)
            half = slice(4 * rank, 4 * rank + 4)
            functional.cross_entropy(wrapped(x[half]), target[half]).backward()
            session.on_before_optimizer_step()
            optimizer.step()
            session.on_after_optimizer_step()
            optimizer.zero_grad()
            session.on_step_end()
        session.on_epoch_end()
        session.on_train_end()
        small = session.finish().model.state_dict()
        found[name] = {**model.state_dict(), **{f"small.{key}": value for key, value in small.items()}}
    torch.save(found, f"{folder}/{rank}.pt")
    end_together(folder)


def test_two_processes_prune_one_model(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, options in CASES.items():
        assert first[name].keys() == second[name].keys()
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)
        alone = perceptron()
        optimizer = sgd(alone, 0.3)
        session = _session(alone, optimizer, options)
        train(session, lambda x, session=session: session.model(x), optimizer, vectors, N_STEPS, per_epoch=N_STEPS)
        for key, value in session.finish().model.state_dict().items():
            assert value.shape == first[name][f"small.{key}"].shape
            torch.testing.assert_close(first[name][f"small.{key}"], value, rtol=1e-9, atol=1e-12)
    widths = [len(first["taylor"][f"small.{layer}.bias"]) for layer in (0, 2)]
    assert widths == [8, 6]
