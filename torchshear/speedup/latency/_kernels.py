"""Kernels of a model with their times; those of an ONNX model, from onnxruntime's own profile."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from torchshear.errors import LatencyError
from torchshear.speedup.latency._device import Device
from torchshear.speedup.onnx._session import CPU, error_reason, open_session
from torchshear.storage._reading import UnreadableError, read_json

Shape = tuple[int, ...]

_WARMUP: Final = 3  # runs that are not kept
_LEAST_RUNS, _MOST_RUNS, _SECONDS = 15, 100, 1.0
_SUFFIX = "_kernel_time"
_LARGEST_PROFILE = 1 << 29  # bytes


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel of onnxruntime's optimized graph, or one operator of torch.

    Attributes:
        name: name of its node, or of the operator and its place; fused kernels have that of one of the nodes that they
            were made of, or of its result.
        operator: type of the node, as "Conv", or the operator, as "aten.conv2d".
        inputs: type and shape of each input, as the runtime reports them; packed weights are not reported.
        outputs: the same of each output.
        ms: the least of its times: what it takes while nothing else takes its core.
    """

    name: str
    operator: str
    inputs: tuple[tuple[str, Shape], ...]
    outputs: tuple[tuple[str, Shape], ...]
    ms: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One model, kernel by kernel.

    Attributes:
        kernels: the kernels in the order in which they run.
        overhead_ms: the least that a run takes beside them.
        whole_ms: the least time of a whole run, where that was measured apart from the kernels; else None.
    """

    kernels: tuple[KernelTime, ...]
    overhead_ms: float
    whole_ms: float | None = None

    @property
    def total_ms(self) -> float:
        """Time of a run in which nothing else takes its core."""
        if self.whole_ms is not None:
            return self.whole_ms
        return sum(kernel.ms for kernel in self.kernels) + self.overhead_ms


def profile_kernels(path: Path, inputs: Sequence[np.ndarray], device: Device) -> Profile:
    """Run a model with onnxruntime's profiler.

    Args:
        path: the ONNX file.
        inputs: its inputs, in their order.
        device: threads and provider.

    Returns:
        The kernels, each with the least of its times over some runs. Where a provider other than the CPU's ran one of
        them, there are none, and the least time of whole runs counts: such kernels may run on after the profiler has
        noted their end, and those that a provider made of many nodes have no sizes to follow.

    Raises:
        LatencyError: the model does not run, or the profile cannot be read.
    """
    with TemporaryDirectory(prefix="torchshear-") as folder:
        session = open_session(path, device.threads, Path(folder) / "profile", device.provider)
        feeds = dict(zip((node.name for node in session.get_inputs()), inputs, strict=True))
        try:
            start = time.perf_counter()
            for run in range(_WARMUP + _MOST_RUNS):
                session.run(None, feeds)
                if run >= _WARMUP + _LEAST_RUNS and time.perf_counter() - start > _SECONDS:
                    break
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise LatencyError(f"{str(path)!r} fails on the inputs it was given: {error_reason(error)}") from error
        try:
            return read_profile(read_json(Path(session.end_profiling()), _LARGEST_PROFILE))
        except (UnreadableError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise LatencyError(f"the profile that onnxruntime wrote {error}; update onnxruntime.") from error


def read_profile(events: Sequence[Mapping[str, Any]], warmup: int = _WARMUP) -> Profile:
    """Read the events of a profile.

    Args:
        events: what the file of a profile holds.
        warmup: runs at the beginning that do not count.

    Returns:
        The kernels of a run, those of one name told apart by their place among these; or the time of a whole run alone,
        where a provider other than the CPU's ran one of them.
    """
    runs: list[list[Mapping[str, Any]]] = []
    overheads: list[float] = []
    whole: list[float] = []
    own: list[Mapping[str, Any]] = []
    for event in sorted(events, key=lambda event: event["ts"] + event["dur"]):
        if event["cat"] == "Node" and str(event["name"]).endswith(_SUFFIX):
            own.append(event)
        elif event["cat"] == "Session" and event["name"] == "model_run":
            runs.append(own)
            whole.append(event["dur"])
            overheads.append(max(0.0, event["dur"] - sum(kernel["dur"] for kernel in own)) / 1e3)
            own = []
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    last: dict[tuple[str, int], Mapping[str, Any]] = {}
    first = min(warmup, len(runs) - 1)
    if any(event["args"].get("provider", CPU) != CPU for event in runs[first]):
        return Profile((), 0.0, min(whole[first:]) / 1e3)
    for run in runs[first:]:
        seen: dict[str, int] = defaultdict(int)
        for event in run:
            name = str(event["name"])
            key = (name, seen[name])
            seen[name] += 1
            times[key].append(event["dur"] / 1e3)
            last[key] = event["args"]
    kernels = tuple(
        KernelTime(
            f"{name.removesuffix(_SUFFIX)}#{place}" if place else name.removesuffix(_SUFFIX),
            str(last[name, place]["op_name"]),
            _shapes(last[name, place]["input_type_shape"]),
            _shapes(last[name, place]["output_type_shape"]),
            min(found),
        )
        for (name, place), found in times.items()
    )
    return Profile(kernels, min(overheads[first:]))


def _shapes(entries: Sequence[Mapping[str, Sequence[int]]]) -> tuple[tuple[str, Shape], ...]:
    return tuple((kind, tuple(map(int, shape))) for entry in entries for kind, shape in entry.items())
