"""Processes of a test that end together."""

import os
import time
from pathlib import Path

import torch.distributed as dist


def end_together(folder: str, limit: float = 60.0) -> None:
    """End this process when every process of its group has written its result.

    One that left early would break calls of others; and taking the connections of gloo down aborts now and then, so
    that is left to the system.

    Args:
        folder: where process n writes n.pt.
        limit: seconds to wait.
    """
    results = [Path(folder, f"{rank}.pt") for rank in range(dist.get_world_size())]
    end = time.monotonic() + limit
    while not all(path.exists() for path in results) and time.monotonic() < end:
        time.sleep(0.01)
    os._exit(0)
