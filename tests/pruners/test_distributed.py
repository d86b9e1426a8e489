"""Two processes that collect together sum what one process would on the data of both; none waits for one that ended."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional

import torchshear
from tests.models import randomise
from tests.pruners.test_statistics import Net, analysed, batches
from torchshear.errors import DataError
from torchshear.pruners import Statistics


def _collect(rank: int, folder: str, counts: tuple[int, int]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        data = batches(4)[2 * rank : 2 * rank + counts[rank]]
        groups = analysed(randomise(Net()).eval())
        found: Any = torchshear.collect(groups, data, functional.cross_entropy, 2)
        plan = torchshear.plan(groups, criterion="taylor", statistics=found)
        torch.save(
            {"numbers": _numbers(found), "kept": {k: v.tolist() for k, v in plan.kept.items()}}, _file(folder, rank)
        )
    except DataError as error:
        torch.save({"error": str(error)}, _file(folder, rank))
    finally:
        dist.destroy_process_group()


def _file(folder: str, rank: int) -> str:
    return f"{folder}/{rank}.pt"


def _numbers(statistics: Statistics) -> dict[str, Any]:
    return {
        "n": (statistics.n_batches, statistics.n_samples),
        "taylor": {name: sums.taylor for name, sums in statistics.weights.items()},
        "rows": {name: sums.squares for name, sums in statistics.rows.items()},
        "gates": {name: (sums.squares, sums.batches) for name, sums in statistics.gates.items()},
        "values": {str(key): (sums.count, sums.squares) for key, sums in statistics.values.items()},
        "loss": statistics.loss,
    }


def _both(folder: Path, counts: tuple[int, int]) -> list[dict[str, Any]]:
    mp.spawn(_collect, (str(folder), counts), nprocs=2)
    return [torch.load(_file(str(folder), rank), weights_only=True) for rank in (0, 1)]


def test_two_processes_equal_one_on_the_union_of_their_data(tmp_path: Path) -> None:
    first, second = _both(tmp_path, (2, 2))
    alone = torchshear.collect(analysed(randomise(Net()).eval()), batches(4), functional.cross_entropy, 4)
    torch.testing.assert_close(first["numbers"], second["numbers"], rtol=0, atol=0)
    torch.testing.assert_close(first["numbers"], _numbers(alone), rtol=1e-5, atol=1e-9)
    assert first["kept"] == second["kept"]


def test_every_process_says_that_one_has_too_little_data(tmp_path: Path) -> None:
    errors = [found["error"] for found in _both(tmp_path, (2, 1))]
    assert errors == ["process 1 could not collect: " + errors[1], errors[1]]
    assert "ended after 1 of 2 batches" in errors[1]


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    with pytest.raises(DataError, match="ended after 1 of 2"):
        torchshear.collect(analysed(Net().eval()), batches(1), None, 2)
