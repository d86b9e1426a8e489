"""Sums over all processes of a distributed run, so that each makes the same plan."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchshear.calibration._processes import exchange_device, is_distributed, sum_over_processes
from torchshear.calibration._statistics import MOMENTUM, GateSums, Statistics, ValueSums, WeightSums

_T = TypeVar("_T")


def all_reduced(statistics: Statistics) -> Statistics:
    """The sums of all processes together; as they are where there is one."""
    if not is_distributed():
        return statistics
    world = dist.get_world_size()
    loss = (
        None
        if statistics.loss is None
        else float(sum_over_processes(torch.tensor(statistics.loss, dtype=torch.float64))) / world
    )
    return replace(
        statistics,
        n_batches=int(sum_over_processes(torch.tensor(statistics.n_batches))),
        n_samples=int(sum_over_processes(torch.tensor(statistics.n_samples))),
        values={key: _sum_values(sums) for key, sums in statistics.values.items()},
        weights={
            name: _map_fields(_rescale_momentum(sums), sum_over_processes) for name, sums in statistics.weights.items()
        },
        rows={name: _map_fields(sums, sum_over_processes) for name, sums in statistics.rows.items()},
        gates={
            name: GateSums(sum_over_processes(sums.squares), _gather_columns(sums.batches))
            for name, sums in statistics.gates.items()
        },
        heads={name: sum_over_processes(total) for name, total in statistics.heads.items()},
        loss=loss,
    )


def _rescale_momentum(sums: WeightSums) -> WeightSums:
    """Sums of this process in which momentum is as old as its last batch: in a step processes follow one another."""
    n_later = dist.get_world_size() - 1 - dist.get_rank()
    return replace(sums, momentum=sums.momentum * MOMENTUM**n_later)


def _sum_values(sums: ValueSums) -> ValueSums:
    count = int(sum_over_processes(torch.tensor(sums.count)))
    return replace(
        _map_fields(sums, lambda item: sum_over_processes(item) if isinstance(item, Tensor) else item), count=count
    )


def _map_fields(sums: _T, change: Callable[[Any], Any]) -> _T:
    return type(sums)(**{field.name: change(getattr(sums, field.name)) for field in fields(sums)})  # type: ignore[arg-type]


def _gather_columns(batches: Tensor) -> Tensor:
    """Columns of all processes side by side, in order of their ranks."""
    own = batches.contiguous().to(exchange_device())
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return torch.cat(found, 1).to(batches.device)
