"""Sums over all processes of a distributed run, so that each makes the same plan."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchshear.errors import DataError, TorchshearError
from torchshear.pruners.statistics._run import Run
from torchshear.pruners.statistics._statistics import GateSums, Statistics, ValueSums

_T = TypeVar("_T")


def is_distributed() -> bool:
    """Whether several processes collect together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(run: Run | None, error: Exception | None) -> None:
    """Raise on every process if any failed, or they did not do the same.

    Processes talk to one another here only, after their data, so that none waits for another that has ended.

    Args:
        run: what this process did; None if it failed before its first batch.
        error: what stopped it, or None.

    Raises:
        Exception: `error`, where there is one.
        DataError: another process failed; they have different networks or criteria, or numbers of batches.
    """
    if error is not None and not is_distributed():
        raise error
    if not is_distributed():
        return
    did = None if run is None else (run.graph.fingerprint, tuple(sorted(run.sums)), run.n_batches)
    failure = str(error) if error is None or isinstance(error, TorchshearError) else f"{type(error).__name__}: {error}"
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (did, failure if error else None))
    if error is not None:
        raise error
    failed = [(rank, message) for rank, (_, message) in enumerate(said) if message is not None]
    if failed:
        raise DataError(f"process {failed[0][0]} could not collect: {failed[0][1]}")
    networks, sums, counts = zip(*(did for did, _ in said), strict=True)
    if len(set(networks)) > 1 or len(set(sums)) > 1:
        raise DataError(
            "processes collect for different networks or criteria; expected the same on each. Seed them alike, and "
            "give all the same arguments."
        )
    if len(set(counts)) > 1:
        raise DataError(
            f"processes ran {list(counts)} batches; expected equally many on each. Give loaders of one length, as a "
            f"DistributedSampler does."
        )


def all_reduced(statistics: Statistics) -> Statistics:
    """The sums of all processes together; as they are where there is one."""
    if not is_distributed():
        return statistics
    world = dist.get_world_size()
    loss = (
        None if statistics.loss is None else float(_summed(torch.tensor(statistics.loss, dtype=torch.float64))) / world
    )
    return replace(
        statistics,
        n_batches=int(_summed(torch.tensor(statistics.n_batches))),
        n_samples=int(_summed(torch.tensor(statistics.n_samples))),
        values={key: _value(sums) for key, sums in statistics.values.items()},
        weights={name: _each(sums, _summed) for name, sums in statistics.weights.items()},
        rows={name: _each(sums, _summed) for name, sums in statistics.rows.items()},
        gates={
            name: GateSums(_summed(sums.squares), _gathered(sums.batches)) for name, sums in statistics.gates.items()
        },
        loss=loss,
    )


def _value(sums: ValueSums) -> ValueSums:
    count = int(_summed(torch.tensor(sums.count)))
    return replace(_each(sums, lambda item: _summed(item) if isinstance(item, Tensor) else item), count=count)


def _each(sums: _T, change: Callable[[Any], Any]) -> _T:
    return type(sums)(**{field.name: change(getattr(sums, field.name)) for field in fields(sums)})  # type: ignore[arg-type]


def _summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the device where the tensor was; as it is if it is empty on each."""
    if not tensor.numel():
        return tensor
    moved = tensor.clone().to(_device())
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def _gathered(batches: Tensor) -> Tensor:
    """Columns of all processes side by side, in order of their ranks."""
    own = batches.contiguous().to(_device())
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return torch.cat(found, 1).to(batches.device)


def _device() -> torch.device:
    """Where the processes can exchange tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
