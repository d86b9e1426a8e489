"""Alignment side by side: what widths by a profile, by measurement, or rounded to a number are worth in time.

    OMP_NUM_THREADS=1 python benchmarks/alignment.py --folder out/alignment --build     # writes the ONNX files
    OMP_NUM_THREADS=1 python benchmarks/alignment.py --folder out/alignment --output benchmarks/results

Each model, with random weights, loses 30 and 50 % of its channels by "l1": here without alignment, with `align="auto"`,
`"measured"` and 16; and by Torch-Pruning with `round_to` 16 and 8. Both sides go through the same exporter, the older
one of torch, which takes seconds; onnxruntime makes the same kernels of either. All files of a model and a ratio run in
the same rounds, in an order drawn anew, with onnxruntime's profiler. Told are

  MACs       how many times fewer operations there are, counted from the shapes of the kernels that ran,
  rounds     the median over rounds of the dense model's time by this one's, with its quartiles,
  kernels    the same of sums over kernels, each by the least time of all kernels with its shapes,
  realised   the latter by the former: what share of the saved operations became speed,
  plain      convolutions that run outside of the blocked layout.

Below that stand the staircase of this machine and its profile; a width that the profile allows and that is no step of
the staircase is named.
"""

import argparse
import copy
import json
import platform
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchshear
from tests.zoo import zoo
from torchshear.speedup.latency import Device, measure_staircase
from torchshear.speedup.latency._alignment_profiles import resolve_alignment
from torchshear.speedup.latency._device import cpu_name
from torchshear.speedup.latency._kernels import KernelTime, Profile, read_profile
from torchshear.speedup.onnx._session import open_session
from torchshear.speedup.shrinking._whole_model import make_unproved_traced

MODELS = ("mobilenet_v2", "efficientnet_b0")
RATIOS = (0.3, 0.5)
OURS = {"none": None, "auto": "auto", "measured": "measured", "16": 16}
RIVAL = {"Torch-Pruning, 16": 16, "Torch-Pruning, 8": 8}
_CONVOLUTIONS = ("Conv", "FusedConv")


@dataclass(frozen=True)
class Row:
    """One way to choose widths, on one model at one ratio."""

    model: str
    ratio: float
    widths: str
    macs_ratio: float
    rounds: float
    rounds_low: float
    rounds_high: float
    kernels: float
    realised: float
    n_plain: int


def prune_by_rival(model: nn.Module, x: torch.Tensor, ratio: float, round_to: int) -> nn.Module:
    """Torch-Pruning as its own examples set it up."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    last = [module for module in small.modules() if isinstance(module, nn.Linear)][-1]
    importance = tp.importance.MagnitudeImportance(p=1)
    tp.pruner.MagnitudePruner(
        small, x, importance=importance, pruning_ratio=ratio, round_to=round_to, ignored_layers=[last]
    ).step()
    return small


def build(folder: Path, name: str) -> None:
    """Write the files of a model that are not there yet."""
    model, _, _ = zoo.build(f"torchvision:{name}")
    x = torch.randn(1, 3, 224, 224)
    groups = torchshear.analyze(torchshear.trace(model, x))

    def export(one: nn.Module, tag: str) -> None:
        draft = folder / "draft"
        torch.onnx.export(one.eval(), (x,), str(draft), dynamo=False, input_names=["x"])
        draft.rename(folder / f"{name} {tag}.onnx")

    def is_missing(tag: str) -> bool:
        return not (folder / f"{name} {tag}.onnx").exists()

    if is_missing("dense"):
        export(model, "dense")
    for ratio in RATIOS:
        for tag, align in OURS.items():
            if is_missing(f"{ratio} {tag}"):
                plan = torchshear.plan(groups, "l1", ratio, align=align)
                export(make_unproved_traced(model, groups, plan), f"{ratio} {tag}")
        for tag, round_to in RIVAL.items():
            if is_missing(f"{ratio} {tag}"):
                export(prune_by_rival(model, x, ratio, round_to), f"{ratio} {tag}")


def run_together(files: Mapping[str, Path], rounds: int) -> tuple[dict[str, np.ndarray], dict[str, Profile]]:
    """Run files in the same rounds; return the seconds of each, and the least times of its kernels."""
    order, feeds = np.random.default_rng(0), {"x": np.random.default_rng(1).normal(size=(1, 3, 224, 224))}
    feeds = {"x": feeds["x"].astype(np.float32)}
    with TemporaryDirectory() as folder:
        sessions = {tag: open_session(path, 1, Path(folder) / str(n)) for n, (tag, path) in enumerate(files.items())}
        seconds = {tag: np.zeros(rounds) for tag in files}
        for number in range(rounds):
            for tag in order.permutation(list(files)).tolist():
                start = time.perf_counter()
                sessions[tag].run(None, feeds)
                seconds[tag][number] = time.perf_counter() - start
        return seconds, {
            tag: read_profile(json.loads(Path(one.end_profiling()).read_text())) for tag, one in sessions.items()
        }


def signature(kernel: KernelTime) -> tuple[object, ...]:
    """What the time of a kernel depends on."""
    return kernel.operator, kernel.inputs, kernel.outputs


def macs_of(profile: Profile) -> int:
    """Operations of convolutions and matrix products, from shapes."""
    total = 0
    for kernel in profile.kernels:
        weight = kernel.inputs[1][1] if len(kernel.inputs) > 1 else ()
        if kernel.operator in _CONVOLUTIONS:
            total += prod(kernel.outputs[0][1]) * prod(weight[1:])
        elif kernel.operator == "Gemm":
            total += prod(kernel.outputs[0][1]) * kernel.inputs[0][1][-1]
    return total


def n_plain(path: Path) -> int:
    """Count convolutions that onnxruntime leaves in the plain layout."""
    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return sum(node.op_type in _CONVOLUTIONS and "nchwc" not in node.domain for node in nodes)


def compare(folder: Path, name: str, ratio: float, rounds: int) -> list[Row]:
    """All ways to choose widths of a model at a ratio, against the dense model."""
    tags = {tag: folder / f"{name} {ratio} {tag}.onnx" for tag in (*OURS, *RIVAL)}
    files = {"dense": folder / f"{name} dense.onnx"} | tags
    seconds, profiles = run_together(files, rounds)
    least: dict[tuple[object, ...], float] = {}
    for profile in profiles.values():
        for kernel in profile.kernels:
            key = signature(kernel)
            least[key] = min(least.get(key, np.inf), kernel.ms)
    total = {tag: sum(least[signature(kernel)] for kernel in profile.kernels) for tag, profile in profiles.items()}
    macs = {tag: macs_of(profile) for tag, profile in profiles.items()}
    rows = []
    for tag in tags:
        low, middle, high = np.quantile(seconds["dense"] / seconds[tag], (0.25, 0.5, 0.75))
        fewer, faster = macs["dense"] / macs[tag], total["dense"] / total[tag]
        rows.append(Row(name, ratio, tag, fewer, middle, low, high, faster, faster / fewer, n_plain(files[tag])))
    return rows


def staircase_text() -> str:
    """The staircase of this machine, its profile, and what they disagree on."""
    staircase, profile = measure_staircase(Device()), resolve_alignment("auto")
    one = staircase.alignment
    lines = ["```text", str(staircase), "```", ""]
    lines.append(
        f"Profile {profile.name}: blocks of {profile.block}, granules of {profile.granule} and {profile.linear}."
    )
    for what, ours, measured in (
        ("block", profile.block, one.block),
        ("granule", profile.granule, one.granule),
        ("granule between matrix products", profile.granule_of(False), one.granule_of(False)),
    ):
        verdict = "on steps" if ours % measured == 0 else "NOT on steps"
        lines.append(f"- its {what}, {ours}: {verdict} of {measured}")
    return "\n".join(lines)


def table_text(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = [
        "| model, share removed | widths | MACs | rounds (quartiles) | kernels | realised | plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        quartiles = f"{row.rounds:.2f} ({row.rounds_low:.2f} to {row.rounds_high:.2f})"
        figures = f"{row.macs_ratio:.2f} | {quartiles} | {row.kernels:.2f} | {row.realised:.2f} | {row.n_plain}"
        lines.append(f"| {row.model}, {row.ratio:.0%} | {row.widths} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Build or measure, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.build:
        for name in options.models:
            build(options.folder, name)
        return
    rows = []
    for name in options.models:
        for ratio in RATIOS:
            rows += compare(options.folder, name, ratio, options.rounds)
            print(table_text(rows), flush=True)
    where = f"{cpu_name()}, {platform.machine()}, onnxruntime {onnxruntime.__version__}, one thread, batch 1"
    text = f"# Alignment\n\n{where}; `benchmarks/alignment.py`.\n\n{table_text(rows)}\n\n{staircase_text()}\n"
    print(text)
    if options.output is not None:
        (options.output / "alignment.md").write_text(text)


if __name__ == "__main__":
    main()
