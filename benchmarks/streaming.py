"""Shrinking a checkpoint on disk: peak memory, and processes killed at random points.

    python benchmarks/streaming.py [--kills 20] [--output benchmarks/results]

A LLaMA of about 180 million random parameters is saved in float16 as shards of 64 MB, as `save_pretrained` does. In
fresh processes, from those files alone: a plan by L1 norms with the model on the meta device; the checkpoint shrunk by
that plan. Measured is the growth of the peak resident memory, files mapped into memory included, against the largest
shard and tensor. Then shrinking is killed (SIGKILL) at random times and started again, many times over, and every file
is looked at after every kill. The result must equal, bit for bit, the model shrunk in memory.
"""

import argparse
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import torchshear
from benchmarks.large import resident_mb
from benchmarks.published import build, example_tokens

SETTINGS = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
}
RATIO = 0.5


def save_dense(folder: Path) -> nn.Module:
    """The model with weights, saved as users have it."""
    torch.manual_seed(0)
    model = build("LLaMA-2-70B", with_weights=True, **SETTINGS)
    model.save_pretrained(folder, max_shard_size="64MB")  # type: ignore[operator]
    return model


def grown(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, and how far it raises the peak of resident memory, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is resident now
    before, start = resident_mb("VmRSS"), time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start, "grown_mb": resident_mb("VmHWM") - before}


def plan_from_disk(source: Path, plan: Path) -> dict[str, float]:
    """Plan on meta with weights from disk; tracing and analysis, which read no weights, are not counted."""
    groups = torchshear.analyze(torchshear.trace(build("LLaMA-2-70B", **SETTINGS), example_tokens()))
    return grown(lambda: torchshear.plan(groups, "l1", RATIO, weights=source).save(plan))


def shrink_on_disk(plan: Path, source: Path, destination: Path) -> dict[str, float]:
    """Shrink, measured."""
    return grown(lambda: torchshear.shrink_checkpoint(plan, source, destination))


def in_own_process(command: str, *paths: Path) -> dict[str, float]:
    """A command of this script in a fresh process."""
    arguments = [sys.executable, __file__, "--one", command, *map(str, paths)]
    out = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(out.splitlines()[-1])
    return result


def killed(plan: Path, source: Path, folder: Path, kills: int, seconds: float) -> dict[str, Any]:
    """Start and kill until that many runs were killed, each destination until a run of it ends; look at all files."""
    draw = random.Random(0)
    result = {"kills": 0, "destinations": 0, "resumed_shards": 0}
    while result["kills"] < kills:
        destination = folder / str(result["destinations"])
        result["destinations"] += 1
        finished: dict[str, int] = {}  # shards with the time of their writing
        while not killed_once(plan, source, destination, draw.uniform(0, seconds)):
            result["kills"] += 1
            now = {file.name: file.stat().st_mtime_ns for file in destination.glob("model*.safetensors")}
            assert finished.items() <= now.items(), "a finished shard was written again or is gone"
            for name in now:
                check_whole(destination / name)
            finished = now
            result["resumed_shards"] += len(finished)
        assert (
            finished.items() <= {f.name: f.stat().st_mtime_ns for f in destination.glob("model*.safetensors")}.items()
        )
        check_equal(destination, folder / "0")
    return result


def killed_once(plan: Path, source: Path, destination: Path, after: float) -> bool:
    """Shrink in a process that is killed after some seconds; whether it ended before."""
    context = multiprocessing.get_context("fork")  # libraries are loaded already, so the time is that of the work
    process = context.Process(target=torchshear.shrink_checkpoint, args=(plan, source, destination))
    process.start()
    process.join(after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"a run ended with {process.exitcode}"
    return process.exitcode == 0


def check_whole(path: Path) -> None:
    """Read a shard from end to end."""
    with safe_open(path, "pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys()), path  # noqa: SIM118


def check_equal(folder: Path, other: Path) -> None:
    """Compare two results, byte by byte but for the record of when the source was read."""
    names = {file.name for file in other.iterdir()}
    assert {file.name for file in folder.iterdir()} == names
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def check_bits(model: nn.Module, plan: Path, folder: Path) -> int:
    """Compare with the model shrunk in memory, bit for bit; gives the number of tensors."""
    small = torchshear.shrink(model, torchshear.PruningPlan.load(plan))
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {file: load_file(folder / file) for file in set(where.values())}
    expected: dict[str, Tensor] = small.state_dict()
    assert expected.keys() == where.keys()
    assert all(torch.equal(shards[file][name], expected[name]) for name, file in where.items())
    again = torchshear.shrink(build("LLaMA-2-70B", **SETTINGS), torchshear.PruningPlan.load(plan))
    torchshear.load_checkpoint(again, folder)
    tokens = torch.arange(32).reshape(2, 16)
    traced = torchshear.speedup.shrink_to_form(model, torchshear.PruningPlan.load(plan), form="traced").model
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, traced(tokens).logits)
    return len(where)


def run(folder: Path, kills: int) -> dict[str, Any]:
    """All measurements in a folder."""
    source, plan = folder / "dense", folder / "plan.json"
    model = save_dense(source)
    shards = sorted(source.glob("*.safetensors"))
    planned = in_own_process("plan", source, plan)
    shrunk = in_own_process("shrink", plan, source, folder / "small")
    n_tensors = check_bits(model, plan, folder / "small")
    return {
        "n_params": sum(p.numel() for p in model.parameters()),
        "shards": len(shards),
        "largest_shard_mb": max(file.stat().st_size for file in shards) / 1e6,
        "largest_tensor_mb": max(p.nbytes for p in model.parameters()) / 1e6,
        "checkpoint_mb": sum(file.stat().st_size for file in shards) / 1e6,
        "result_mb": sum(file.stat().st_size for file in (folder / "small").glob("model*.safetensors")) / 1e6,
        "plan": planned,
        "shrink": shrunk,
        "equal_tensors": n_tensors,
        "killed": killed(plan, source, folder / "killed", kills, 1.3 * shrunk["seconds"]),
    }


def report(result: dict[str, Any]) -> str:
    """What was measured as text in Markdown."""
    limit = result["largest_shard_mb"] + result["largest_tensor_mb"]
    killed = result["killed"]
    lines = [
        "# Shrinking a checkpoint on disk",
        "",
        f"`python benchmarks/streaming.py`: torch {torch.__version__}, a LLaMA of {result['n_params'] / 1e6:.0f} "
        f"million parameters in float16,",
        f"{result['shards']} shards, {result['checkpoint_mb']:.0f} MB; the largest shard has "
        f"{result['largest_shard_mb']:.0f} MB, the largest tensor {result['largest_tensor_mb']:.0f} MB.",
        "Growth of the peak resident memory of a fresh process, pages of mapped files included:",
        "",
        "| | seconds | peak grows by MB | of one shard and one tensor |",
        "|---|---|---|---|",
    ]
    for what, key in (("plan by L1 norms, weights from disk", "plan"), ("shrink", "shrink")):
        row = result[key]
        lines.append(f"| {what} | {row['seconds']:.2f} | {row['grown_mb']:.0f} | {row['grown_mb'] / limit:.0%} |")
    lines += [
        "",
        f"- {result['checkpoint_mb']:.0f} MB became {result['result_mb']:.0f} MB. All {result['equal_tensors']} "
        "tensors equal those of the model shrunk in memory,",
        "  bit for bit; loaded into the model shrunk without weights, they compute the same logits.",
        f"- {killed['kills']} runs into {killed['destinations']} destinations were killed at random times. After each "
        "kill every shard that",
        f"  had its name was whole; {killed['resumed_shards']} times a finished shard was found by the next run, and "
        "none was written again;",
        "  all results are the same bytes.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    if options.one:
        command, *paths = options.one
        print(json.dumps({"plan": plan_from_disk, "shrink": shrink_on_disk}[command](*map(Path, paths))))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), options.kills)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "streaming.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "streaming.md").write_text(report(result))
    print(report(result))


if __name__ == "__main__":
    main()
