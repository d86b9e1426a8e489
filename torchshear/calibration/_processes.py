"""Processes that run data together: agreeing that all did, and sums over all of them."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchshear.calibration._statistics import MOMENTUM, GateSums, Statistics, ValueSums, WeightSums
from torchshear.errors import DataError, TorchshearError

_T = TypeVar("_T")


def is_distributed() -> bool:
    """Return whether several processes run together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def n_processes() -> int:
    """Return the number of processes that run together."""
    return dist.get_world_size() if is_distributed() else 1


def agree(task: str, setting: object, n_batches: int, error: Exception | None) -> None:
    """Raise on every process if any failed, or they did not do the same.

    Processes talk to one another here only, after their data, so that none waits for another that has ended.

    Args:
        task: what they do, for messages: "collect".
        setting: what must be the same on each, as plain data; not looked at where a process failed.
        n_batches: how many batches this process ran.
        error: what stopped it, or None.

    Raises:
        Exception: `error`, where there is one.
        DataError: another process failed; they have different settings, or numbers of batches.
    """
    if not is_distributed():
        if error is not None:
            raise error
        return
    failure = str(error) if error is None or isinstance(error, TorchshearError) else f"{type(error).__name__}: {error}"
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (setting, n_batches, failure if error else None))
    if error is not None:
        raise error
    failed = [(rank, message) for rank, (_, _, message) in enumerate(said) if message is not None]
    if failed:
        raise DataError(f"process {failed[0][0]} could not {task}: {failed[0][1]}")
    if any(of != setting for of, _, _ in said):
        raise DataError(
            f"processes {task} for different networks or criteria; expected the same on each. Seed them alike, and "
            f"give all the same arguments."
        )
    counts = [count for _, count, _ in said]
    if len(set(counts)) > 1:
        raise DataError(
            f"processes ran {counts} batches; expected equally many on each. Give loaders of one length, as a "
            f"DistributedSampler does."
        )


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the device where the tensor was; as it is if it is empty on each."""
    if not tensor.numel():
        return tensor
    moved = tensor.clone().to(exchange_device())
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def exchange_device() -> torch.device:
    """Return the device on which the processes can exchange tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


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
        output_gradients={name: sum_over_processes(one) / world for name, one in statistics.output_gradients.items()},
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
