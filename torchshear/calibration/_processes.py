"""Processes that run data together: agreeing that all did, and sums over all of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchshear.errors import DataError, TorchshearError


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
