"""What `prune` with its proof costs: seconds, forward passes and memory, by stage, for the zoo.

    python benchmarks/proving.py [--only PATTERN] [--threads 2] [--rounds 3] [--output benchmarks/results]

Each model is built and pruned by half (L1) in a fresh process, with the example of its library (one image, or two
sentences of 64 tokens). For each stage (trace, analyze, plan, shrink with its trials of the native form, verify):

- seconds of wall time, and of processor time of all threads: medians of the rounds;
- forward passes: how often the model, a copy of it or a captured graph was run, in samples and pixels over those of
  the example; a run that ends half-way counts as the share of its modules or operators that ran;
- how far the process's memory grows above what it has with the model built and run once, in copies of the weights: of
  a first round, which is not timed (but with --rounds 0), and in which freed memory goes back to the system at once.

`passes by time` is the total over the time of one plain forward of the dense model on the example in float32. Proofs
run in float64, in which a pass alone takes twice as long.
"""

import argparse
import ctypes
import fnmatch
import functools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchshear
from tests.zoo import zoo
from tests.zoo.torchvision_models import load_torchvision
from torchshear import api
from torchshear.graph import _run
from torchshear.graph._graph import PartRun
from torchshear.speedup import TracedModule
from torchshear.speedup import _shrink as _apply

VISION_MODELS = (
    "torchvision:resnet50",
    "torchvision:vgg16",
    "torchvision:vit_b_16",
    "torchvision:swin_v2_t",
    "torchvision:convnext_tiny",
    "torchvision:maxvit_t",
    "torchvision:densenet201",
    "torchvision:mobilenet_v3_large",
    "timm:twins_svt_small",
    "timm:cait_xxs24_224",
    "timm:convmixer_768_32",
    "timm:convit_tiny",
    "timm:halonet_h1",
)
LANGUAGE_MODELS = ("transformers:bert_base", "transformers:llama_76m")
STAGES = ("trace", "analyze", "plan", "shrink", "verify")
CALLS = (  # where a stage is called, by what name; the rest is "plan"
    (api, "trace", "trace"),
    (api, "analyze", "analyze"),
    (_apply, "shrink_whole", "shrink"),
    (_apply, "verify_analyzed", "verify"),
)

GLIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt: from what size on freed memory goes back to the system

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def build(name: str) -> Built:
    """A model with random weights in eval mode, and its example arguments."""
    return _language_model(name) if name in LANGUAGE_MODELS else zoo.build(name)


def _language_model(name: str) -> Built:
    load_torchvision()
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "transformers:bert_base":
        model: nn.Module = BertForMaskedLM(BertConfig())
    else:
        sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=14, **sizes))
    tokens = torch.randint(3, 1000, (2, 64))
    return model.eval(), (), {"input_ids": tokens, "attention_mask": torch.ones(2, 64, dtype=torch.long)}


@dataclass
class Cost:
    """What one stage took."""

    wall: float = 0.0
    cpu: float = 0.0
    passes: float = 0.0
    peak_bytes: int = 0


@dataclass
class Meter:
    """Counts what a run of `prune` costs, by stage."""

    example_size: int
    calls_a_pass: int
    n_calls: int = 0
    depth: int = 0
    stage: str = "plan"
    costs: dict[str, Cost] = field(default_factory=lambda: {stage: Cost() for stage in STAGES})

    def start(self) -> None:
        """Begin with what is resident now."""
        GLIBC.malloc_trim(0)
        self.before = status_bytes("VmRSS")
        self._begin("plan")

    def switch(self, stage: str) -> str:
        """End one stage and begin another; gives the one that ended."""
        ended, cost = self.stage, self.costs[self.stage]
        cost.wall += time.perf_counter() - self.since
        cost.cpu += time.process_time() - self.cpu_since
        cost.peak_bytes = max(cost.peak_bytes, status_bytes("VmHWM") - self.before)
        self._begin(stage)
        return ended

    def _begin(self, stage: str) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is resident now
        self.stage, self.since, self.cpu_since = stage, time.perf_counter(), time.process_time()

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """A function of a stage; what it calls of other stages counts for these."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            outer = self.switch(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(outer)

        return run

    def saw(self, inputs: Any, share: float) -> None:
        """Count a run, or part of one, on some inputs; one on tensors without values costs nothing."""
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) or t.is_meta for t in tensors):
            self.costs[self.stage].passes += share * size_of(tensors) / self.example_size

    def interpret(self, graph: torch.fx.Graph, leaves: list[Any], *rest: Any, **more: Any) -> Iterator[Any]:
        """Run a graph, and count the share of its operators that ran."""
        ran = 0
        try:
            for item in INTERPRET(graph, leaves, *rest, **more):
                ran += 1
                yield item
        finally:
            self.saw(leaves, ran / len(graph.nodes))

    def count_module(self, *_: Any) -> None:
        """A module, of any model, is called."""
        self.n_calls += 1

    def counted_call(self) -> Callable[..., Any]:
        """How a model is called: as ever, and the share of its modules that ran is counted."""

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            before, self.depth = self.n_calls, self.depth + 1
            try:
                return module._wrapped_call_impl(*args, **kwargs)  # type: ignore[operator]
            finally:
                self.depth -= 1
                if not self.depth:
                    share = 1.0 if isinstance(module, TracedModule) else (self.n_calls - before) / self.calls_a_pass
                    self.saw((args, kwargs), min(share, 1.0))

        return call


INTERPRET = _run.interpret


def size_of(tensors: list[Tensor]) -> int:
    """Numbers in the first input that has a batch: samples times pixels or tokens."""
    return next((t.numel() for t in tensors if t.ndim), 1)


@contextmanager
def watching(meter: Meter, model: nn.Module) -> Iterator[None]:
    """Have a meter see all stages, all runs of graphs and all calls of the model and its copies."""
    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(meter.count_module).remove)
        for owner, name, stage in CALLS:
            _replace(stack, owner, name, meter.timed(getattr(owner, name), stage))
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("torchshear.") and hasattr(module, "interpret"):
                _replace(stack, module, "interpret", meter.interpret)
        for kind in (type(model), PartRun, TracedModule):
            kind.__call__ = meter.counted_call()  # type: ignore[method-assign, assignment]
            stack.callback(delattr, kind, "__call__")
        yield


def _replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def status_bytes(key: str) -> int:
    """A figure of this process from /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def forward_of(built: Built) -> tuple[float, int]:
    """Median seconds of a plain forward, and the number of modules that it calls."""
    model, args, kwargs = built
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    times = []
    with torch.no_grad():
        handle = register_module_forward_pre_hook(count)
        model(*args, **kwargs)
        handle.remove()
        for _ in range(5):
            start = time.perf_counter()
            model(*args, **kwargs)
            times.append(time.perf_counter() - start)
    return statistics.median(times), calls


def forward_bytes(built: Built) -> int:
    """How far memory grows in a plain forward: what no proof that runs the model can do without."""
    model, args, kwargs = built
    GLIBC.mallopt(M_MMAP_THRESHOLD, 2**16)
    GLIBC.malloc_trim(0)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with torch.no_grad():
        model(*args, **kwargs)
    return status_bytes("VmHWM") - before


def measure(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """Prune one model some times, after a tiny one that loads what is loaded once."""
    torch.set_num_threads(threads)
    built = build(name)
    model, args, kwargs = built
    torchshear.prune(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(1, 4),))
    forward, calls = forward_of(built)
    grown = forward_bytes(built)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    runs, form = [], ""
    for number in range(rounds + 1):
        GLIBC.mallopt(M_MMAP_THRESHOLD, 2**16 if number == 0 else 2**25)
        GLIBC.mallopt(M_TRIM_THRESHOLD, 2**22 if number == 0 else 2**26)
        meter = Meter(size_of(tensors), calls)
        with watching(meter, model):
            meter.start()
            result = torchshear.prune(model, args, kwargs)
            meter.switch("plan")
        form = result.form
        runs.append({stage: asdict(cost) for stage, cost in meter.costs.items()})
        del result
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    known = {"model": name, "weights_bytes": weights, "forward": forward, "forward_bytes": grown, "form": form}
    return known | summary(runs, forward, weights)


def summary(rounds: list[dict[str, dict[str, float]]], forward: float, weights: int) -> dict[str, Any]:
    """Medians over the timed rounds, or of the first if there are none, by stage and in all; memory of the first."""
    first, runs = rounds[0], rounds[1:] or rounds
    stages = {
        stage: {key: statistics.median(run[stage][key] for run in runs) for key in runs[0][stage]} for stage in STAGES
    }
    sums = [{key: sum(run[stage][key] for stage in STAGES) for key in run["trace"]} for run in runs]
    total = {key: statistics.median(each[key] for each in sums) for key in ("wall", "cpu", "passes")}
    peaks = {stage: first[stage]["peak_bytes"] / weights for stage in STAGES}
    return {
        "stages": stages,
        "total": total,
        "passes_by_time": total["wall"] / forward,
        "copies": peaks | {"whole": max(peaks.values())},
        "is_within": total["wall"] <= 60 * forward + 3,
        "raw": rounds,
    }


def _in_process(queue: Any, name: str, threads: int, rounds: int) -> None:
    queue.put(measure(name, threads, rounds))


def measure_apart(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """As `measure`, in a fresh process.

    Raises:
        RuntimeError: the process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_process, args=(queue, name, threads, rounds))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"measuring {name!r} ended with exit code {process.exitcode}; its error is above.")
    result: dict[str, Any] = queue.get()
    return result


def report(results: dict[str, Any]) -> str:
    """What was measured, as a page in Markdown."""
    machine = results["machine"]
    lines = [
        "# What `prune` with its proof costs",
        "",
        f"`python benchmarks/proving.py --rounds {results['rounds']} --threads {machine['threads']}` on "
        f"{machine['processor']} with {machine['cores']} cores, torch {machine['torch']}. Half of the channels by L1; "
        "what the columns mean stands at the head of the script. Seconds are of wall time, by stage; `limit` is 60 "
        "passes of the dense model and 3 s.",
        "",
        "| model | form | trace | analyze | plan | shrink | verify | total s | limit s | processor s | passes "
        "| passes by time | memory, copies of the weights | of one forward | weights MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["models"]:
        stages = " | ".join(f"{row['stages'][stage]['wall']:.2f}" for stage in STAGES)
        total, limit = row["total"], 60 * row["forward"] + 3
        lines.append(
            f"| {row['model'].partition(':')[2]} | {row['form']} | {stages} | {total['wall']:.1f} | {limit:.1f} | "
            f"{total['cpu']:.1f} | {total['passes']:.0f} | {row['passes_by_time']:.0f} | "
            f"{row['copies']['whole']:.2f} | {row['forward_bytes'] / row['weights_bytes']:.2f} | "
            f"{row['weights_bytes'] / 1e6:.0f} |"
        )
    lines += ["", "Passes, and memory in copies of the weights, by stage:", ""]
    lines += ["| model | " + " | ".join(STAGES) + " |", "|---|" + "---|" * len(STAGES)]
    for row in results["models"]:
        cells = (f"{row['stages'][stage]['passes']:.0f}, {row['copies'][stage]:.2f}" for stage in STAGES)
        lines.append(f"| {row['model'].partition(':')[2]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'} ({platform.machine()})"


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern of the names, as '*resnet*'")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    names = [name for name in (*VISION_MODELS, *LANGUAGE_MODELS) if fnmatch.fnmatch(name, options.only)]
    if not names:
        parser.error(f"--only {options.only!r} fits none of {', '.join((*VISION_MODELS, *LANGUAGE_MODELS))}")
    machine = {"processor": _processor(), "cores": os.cpu_count(), "threads": options.threads}
    machine["torch"] = torch.__version__
    results: dict[str, Any] = {"machine": machine, "rounds": options.rounds, "models": []}
    for name in names:
        row = measure_apart(name, options.threads, options.rounds)
        results["models"].append(row)
        stages = ", ".join(f"{stage} {row['stages'][stage]['wall']:.2f}" for stage in STAGES)
        print(f"{name}: {row['total']['wall']:.1f} s ({stages}), {row['total']['passes']:.0f} passes", file=sys.stderr)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "proving.json").write_text(json.dumps(results, indent=1) + "\n")
    page = report(results)
    (options.output / "proving.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
