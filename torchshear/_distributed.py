"""Processes that run data together: agreeing that all did, and sums over all of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchshear.errors import DataError


def is_distributed() -> bool:
    """Whether several processes run together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree_on_length(n_batches: int, error: DataError | None, task: str) -> None:
    """Raise on every process if any failed or they ran different numbers of batches.

    Processes talk to one another here only, after their data, so that none waits for another that has ended.

    Args:
        n_batches: how many batches this process ran.
        error: why it failed, or None.
        task: what they do, for the message: "collect".

    Raises:
        DataError: a process failed; or the numbers differ.
    """
    if not is_distributed():
        if error is not None:
            raise error
        return
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (n_batches, None if error is None else str(error)))
    if error is not None:
        raise error
    failed = [(rank, message) for rank, (_, message) in enumerate(said) if message is not None]
    if failed:
        raise DataError(f"process {failed[0][0]} could not {task}: {failed[0][1]}")
    counts = [count for count, _ in said]
    if len(set(counts)) > 1:
        raise DataError(
            f"processes ran {counts} batches; expected equally many on each. Give loaders of one length, as a "
            f"DistributedSampler does."
        )


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, on the device where the tensor was."""
    moved = tensor.clone().to(exchange_device())
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def exchange_device() -> torch.device:
    """Where the processes can exchange tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
