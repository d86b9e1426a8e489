"""Times of the kernels of an ONNX model as onnxruntime's optimized graph runs them, from its own profile."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from torchshear.errors import LatencyError
from torchshear.speedup.onnx._session import error_reason, open_session
from torchshear.storage._reading import UnreadableError, read_json

Shape = tuple[int, ...]

_WARMUP: Final = 3  # runs that are not kept
_LEAST_RUNS, _MOST_RUNS, _SECONDS = 15, 100, 1.0
_SUFFIX = "_kernel_time"
_LARGEST_PROFILE = 1 << 29  # bytes


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel of an optimized graph.

    Attributes:
        name: name of its node; fused kernels have that of one of the nodes that they were made of, or of its result.
        operator: type of the node, as "Conv".
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
    """

    kernels: tuple[KernelTime, ...]
    overhead_ms: float

    @property
    def total_ms(self) -> float:
        """Time of a run in which nothing else takes its core."""
        return sum(kernel.ms for kernel in self.kernels) + self.overhead_ms


def profile_kernels(path: Path, threads: int, feeds: Mapping[str, np.ndarray]) -> Profile:
    """Run a model with onnxruntime's profiler.

    Args:
        path: the ONNX file.
        threads: intra-op threads.
        feeds: input name -> array.

    Returns:
        The kernels, each with the least of its times over some runs.

    Raises:
        LatencyError: the model does not run, or the profile cannot be read.
    """
    with TemporaryDirectory(prefix="torchshear-") as folder:
        session = open_session(path, threads, Path(folder) / "profile")
        try:
            start = time.perf_counter()
            for run in range(_WARMUP + _MOST_RUNS):
                session.run(None, dict(feeds))
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
        The kernels of a run. Those of one name are told apart by their place among these.
    """
    runs: list[list[Mapping[str, Any]]] = []
    overheads: list[float] = []
    own: list[Mapping[str, Any]] = []
    for event in sorted(events, key=lambda event: event["ts"] + event["dur"]):
        if event["cat"] == "Node" and str(event["name"]).endswith(_SUFFIX):
            own.append(event)
        elif event["cat"] == "Session" and event["name"] == "model_run":
            runs.append(own)
            overheads.append(max(0.0, event["dur"] - sum(kernel["dur"] for kernel in own)) / 1e3)
            own = []
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    last: dict[tuple[str, int], Mapping[str, Any]] = {}
    first = min(warmup, len(runs) - 1)
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
