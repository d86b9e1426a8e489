"""Time and memory to plan LLaMA-2-70B and Mixtral-8x7B on the meta device, and their growth with depth.

    python benchmarks/large.py [--models LLaMA-2-70B Mixtral-8x7B] [--output benchmarks/results]

For each model, with its published configuration and with 8, 16, ... of its layers: build, trace, analyze, plan (half of
every group, drawn at random, since there are no weights) and save, each depth in a process of its own. The peak is that
of the resident memory of the whole process (VmHWM), what Python and the libraries take themselves included. What cannot
shrink is listed with its reason.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import torchshear
from benchmarks.published import PUBLISHED, build, example_tokens
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut, dense_cost

STEPS = 8  # layers from one depth to the next
LIMIT_S, LIMIT_MB = 60.0, 2000.0
STAGES = ("build", "trace", "analyze", "plan", "save")


def resident_mb(key: str) -> float:
    """A figure of this process from /proc, in MB: "VmRSS" now, "VmHWM" at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:"))) / 1e6


def measure(name: str, n_layers: int) -> dict[str, Any]:
    """All stages on one model of one depth, in this process."""
    import transformers

    warnings.filterwarnings("ignore", module="transformers")
    build(name, num_hidden_layers=1)  # loads what the library imports late
    before = resident_mb("VmHWM")
    marks, cpu = [time.perf_counter()], [time.process_time()]

    def done(result: Any) -> Any:
        marks.append(time.perf_counter())
        cpu.append(time.process_time())
        return result

    model = done(build(name, num_hidden_layers=n_layers))
    graph = done(torchshear.trace(model, example_tokens()))
    groups = done(torchshear.analyze(graph))
    plan = done(torchshear.plan(groups, criterion="random", ratio=0.5))
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan.json")
        done(None)
        plan_mb = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
    peak = resident_mb("VmHWM")
    before_params, after_params = dense_cost(graph).n_params, Cut(groups, plan.kept).cost().n_params
    return {
        "model": name,
        "transformers": transformers.__version__,
        "layers": n_layers,
        "nodes": len(graph),
        "groups": len(groups),
        "prunable": len(groups.prunable),
        "n_params": before_params,
        "left": after_params / before_params,
        "seconds": dict(zip(STAGES, np.diff(marks).tolist(), strict=True)),
        "cpu_seconds": dict(zip(STAGES, np.diff(cpu).tolist(), strict=True)),
        "peak_mb": peak,
        "libraries_mb": before,
        "plan_mb": plan_mb,
        "fixed": fixed_reasons(groups),
    }


def fixed_reasons(groups: ChannelGroups) -> dict[str, int]:
    """Why parameter dimensions cannot shrink, with how many: reason and operator, without where it was called."""
    found = Counter(fixed.reason.partition(" in module")[0] for fixed in groups.fixed)
    return dict(found.most_common())


def in_own_process(name: str, n_layers: int) -> dict[str, Any]:
    """`measure` in a fresh process of two threads."""
    command = [sys.executable, __file__, "--one", name, str(n_layers)]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def planning_s(row: dict[str, Any], clock: str = "seconds") -> float:
    """Seconds of trace, analyze and plan: by the clock, or "cpu_seconds" of the processor."""
    return sum(row[clock][stage] for stage in ("trace", "analyze", "plan"))


def processor_s(row: dict[str, Any]) -> float:
    """The same in seconds of the processor, which other programs on the machine do not lengthen as much."""
    return planning_s(row, "cpu_seconds")


def linear_fit(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> tuple[float, float, float]:
    """Slope a layer, intercept, and the largest distance from the line relative to the largest value."""
    layers, values = np.array([row["layers"] for row in rows]), np.array([value(row) for row in rows])
    slope, intercept = np.polyfit(layers, values, 1)
    return float(slope), float(intercept), float(np.abs(slope * layers + intercept - values).max() / values.max())


def report(results: dict[str, Any]) -> str:
    """What was measured as text in Markdown."""
    machine = results["machine"]
    lines = [
        "# Planning large models on the meta device",
        "",
        f"`python benchmarks/large.py`: {machine['cores']} cores ({machine['processor']}), torch {machine['torch']}, "
        f"transformers {machine['transformers']},",
        f"published configurations and types; {machine['load']:.1f} processes were running on the machine on average.",
        "two sentences of 16 tokens, every depth in a process of its own, one run each. `peak MB` is the peak",
        "resident memory of the whole process, of which `libraries MB` are there before anything is done. `left` is",
        "the share of parameters that a plan leaves which removes half of every group. Raw figures: `large.json`.",
    ]
    for name in results["models"]:
        rows = [row for row in results["rows"] if row["model"] == name]
        lines += ["", f"## {name}", "", *_table(rows), ""]
        for what, value, unit in (("processor time", processor_s, "s"), ("peak", lambda row: row["peak_mb"], "MB")):
            slope, intercept, error = linear_fit(rows, value)
            lines.append(
                f"- Growth of {what}: {slope:.2f} {unit} a layer + {intercept:.1f} {unit}; the farthest measurement is "
                f"{error:.0%} of the largest off that line."
            )
        last = rows[-1]
        fits = planning_s(last) <= LIMIT_S and last["peak_mb"] <= LIMIT_MB
        lines.append(
            f"- Whole model: {planning_s(last):.1f} s and {last['peak_mb']:.0f} MB; the bar of {LIMIT_S:.0f} s and "
            f"{LIMIT_MB:.0f} MB is {'met' if fits else 'missed'}."
        )
        lines.append("- Parameter dimensions that cannot shrink, of the whole model, by reason:")
        lines += [f"  - {count}: {reason}" for reason, count in last["fixed"].items()]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = (
        "layers",
        "G parameters",
        "nodes",
        "groups",
        "can shrink",
        "left",
        "trace s",
        "analyze s",
        "plan s",
        "save s",
    )
    lines = [
        f"| {' | '.join((*head, 'trace+analyze+plan s', 'same, processor s', 'peak MB', 'libraries MB'))} |",
        "|---" * 14 + "|",
    ]
    for row in rows:
        stages = " | ".join(f"{row['seconds'][stage]:.2f}" for stage in STAGES[1:])
        lines.append(
            f"| {row['layers']} | {row['n_params'] / 1e9:.1f} | {row['nodes']} | {row['groups']} | {row['prunable']} "
            f"| {row['left']:.1%} | {stages} | {planning_s(row):.1f} | {processor_s(row):.1f} | {row['peak_mb']:.0f} "
            f"| {row['libraries_mb']:.0f} |"
        )
    return lines


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "LAYERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    rows = []
    for name in options.models:
        for n_layers in range(STEPS, PUBLISHED[name][1]["num_hidden_layers"] + 1, STEPS):
            rows.append(in_own_process(name, n_layers))
            print(
                f"{name}, {n_layers} layers: {planning_s(rows[-1]):.1f} s, {rows[-1]['peak_mb']:.0f} MB",
                file=sys.stderr,
            )
    results = {
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "load": os.getloadavg()[2],
            "torch": torch.__version__,
            "transformers": rows[0]["transformers"],
        },
        "models": options.models,
        "rows": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "large.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.output / "large.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
