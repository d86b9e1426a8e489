"""Kernels of a profile as onnxruntime writes it."""

from typing import Any

import pytest

from torchshear.speedup.latency._kernels import KernelTime, read_profile


def node(name: str, start: int, microseconds: int, size: int) -> dict[str, Any]:
    """One event of a kernel, as recorded from onnxruntime 1.31, without what is not read."""
    args = {
        "op_name": "Conv",
        "input_type_shape": [{"float": [1, 3, 8, 8]}, {"float": [size, 3, 3, 3]}, {"float": [size]}],
        "output_type_shape": [{"float": [1, size, 8, 8]}],
        "provider": "CPUExecutionProvider",
    }
    return {"cat": "Node", "ts": start, "dur": microseconds, "name": f"{name}_kernel_time", "args": args}


def run(start: int, *times: int) -> list[dict[str, Any]]:
    """One inference: a kernel, two more of one name, and what lies around them."""
    events, now = [], start + 5
    for name, microseconds in zip(("relu_nchwc", "Reorder", "Reorder"), times, strict=True):
        events.append(node(name, now, microseconds, 16 if name == "Reorder" else 8))
        now += microseconds
    execute = {"cat": "Session", "ts": start + 2, "dur": now - start, "name": "SequentialExecutor::Execute", "args": {}}
    whole = {"cat": "Session", "ts": start, "dur": sum(times) + 20, "name": "model_run", "args": {}}
    return [*events, execute, whole]


def test_kernels_have_their_least_time_after_the_warm_up() -> None:
    start = {"cat": "Session", "ts": 0, "dur": 90, "name": "session_initialization", "args": {}}
    events = [start, *run(100, 1, 1, 1), *run(2000, 50, 7, 9), *run(4000, 40, 8, 90)]
    profile = read_profile(events, warmup=1)
    assert profile.overhead_ms == pytest.approx(0.02)
    assert [(one.name, one.ms) for one in profile.kernels] == [
        ("relu_nchwc", 0.04),
        ("Reorder", 0.007),
        ("Reorder#1", 0.009),
    ]
    assert profile.total_ms == pytest.approx(0.076)
    inputs = (("float", (1, 3, 8, 8)), ("float", (8, 3, 3, 3)), ("float", (8,)))
    assert profile.kernels[0] == KernelTime("relu_nchwc", "Conv", inputs, (("float", (1, 8, 8, 8)),), 0.04)


def test_with_kernels_of_another_provider_the_least_whole_run_counts() -> None:
    """Kernels of CUDA, as an example, run on after the profiler has noted their end."""
    events = [*run(100, 1, 1, 1), *run(2000, 50, 7, 9), *run(4000, 40, 8, 90)]
    events[5]["args"]["provider"] = "CUDAExecutionProvider"
    profile = read_profile(events, warmup=1)
    assert profile.kernels == ()
    assert profile.total_ms == pytest.approx(0.086)


def test_a_single_run_is_better_than_none() -> None:
    assert read_profile(run(0, 5, 6, 7)).kernels[0].ms == 0.005
