"""How long planning takes, beside Torch-Pruning on the same models in the same run.

    python benchmarks/planning.py [--rounds 5] [--models resnet50 vgg16 ...] [--output benchmarks/results]

For each model: capture, analyze, plan and shrink without verification, against Torch-Pruning's graph building and step
at the same ratio (50 %, L1, classifier kept). Verification is what runs models on data to see that they are equal:
graph against model in trace, native against traced form in shrink, with the search for the sizes that make the native
form right; its time is reported apart, since Torch-Pruning has none. Capture counts as capture also where shrink asks
for it: the traced form has a graph for train mode as well. Rounds are interleaved and medians are reported. Then growth
with depth (ResNets of 50 to 800 layers) and peak memory beside the model's own.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchshear
from tests.zoo.torchvision_models import load_torchvision
from torchshear.speedup import shrink_to_form

WITH_RIVAL = ("resnet50", "densenet121", "densenet201", "vgg16", "mobilenet_v2", "convnext_tiny", "vit_b_16")
MODELS = (*WITH_RIVAL, "swin_t", "bert_base", "llama_24")
DEPTHS = (50, 101, 200, 401, 800)
STAGES = ("trace", "analyze", "plan", "shrink")


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def build(name: str) -> nn.Module:
    """A model with random weights, in eval mode: of torchvision, or a language model of usual size."""
    torch.manual_seed(0)
    vision = load_torchvision()
    if name in ("bert_base", "llama_24"):
        return _language_model(name).eval()
    model: nn.Module = vision.models.get_model(name, weights=None)
    return model.eval()


def _language_model(name: str) -> nn.Module:
    """BERT-base (110 M parameters), and a LLaMA of 24 layers (207 M)."""
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    if name == "bert_base":
        bert: nn.Module = BertForMaskedLM(BertConfig())
        return bert
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
    llama: nn.Module = LlamaForCausalLM(LlamaConfig(num_hidden_layers=24, **sizes))
    return llama


def example(name: str) -> Inputs:
    """Example arguments and keyword arguments of a model."""
    if name in ("bert_base", "llama_24"):
        return (), {"input_ids": torch.randint(3, 1000, (2, 64)), "attention_mask": torch.ones(2, 64, dtype=torch.long)}
    return (torch.randn(1, 3, 224, 224),), {}


class Timer:
    """Seconds spent in some functions, those inside one another counted once, without those of another timer."""

    def __init__(self, other: "Timer | None" = None) -> None:
        self.seconds = 0.0
        self.other = other
        self._depth = 0

    def watch(self, owner: Any, name: str) -> None:
        """Have a function of a module or class add its time."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, self._depth = self._now(), self._depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                self.seconds += self._now() - start if self._depth == 0 else 0.0

        setattr(owner, name, timed)

    def _now(self) -> float:
        return time.perf_counter() - (self.other.seconds if self.other else 0.0)


CHECKS = Timer()
AGAIN = Timer(CHECKS)
CHECKS.watch(torchshear.graph.capture._trace, "agrees_with_model")
CHECKS.watch(torchshear.graph.capture._trace, "outputs_differ_in_training")
CHECKS.watch(torchshear.speedup.native._form._FormSearch, "run")
CHECKS.watch(torchshear.speedup.native._attention_scale.FactorPlacement, "for_implied")
CHECKS.watch(torchshear.speedup.native._form, "_training_failure")
AGAIN.watch(torchshear.speedup.shrinking._whole_model, "capture_training_cut")


def ours(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> dict[str, float]:
    """Seconds of each stage of prune without verification, and of the checks inside the stages."""
    CHECKS.seconds = AGAIN.seconds = 0.0
    marks = [time.perf_counter()]
    checks = [0.0]

    def done(result: Any) -> Any:
        marks.append(time.perf_counter())
        checks.append(CHECKS.seconds)
        return result

    graph = done(torchshear.trace(model, args, kwargs))
    groups = done(torchshear.analyze(graph))
    plan = done(torchshear.plan(groups, criterion="l1", ratio=0.5))
    done(shrink_to_form(model, plan))
    spent = [b - a - (d - c) for a, b, c, d in zip(marks[:-1], marks[1:], checks[:-1], checks[1:], strict=True)]
    stages = dict(zip(STAGES, spent, strict=True))
    stages["trace"] += AGAIN.seconds
    stages["shrink"] -= AGAIN.seconds
    return stages | {"checks": CHECKS.seconds}


def theirs(name: str, args: tuple[Any, ...]) -> float:
    """Seconds that Torch-Pruning needs to build its graph and prune once; on a model of its own, which it changes."""
    import torch_pruning as tp

    model = build(name)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    start = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model, args[0], importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5, ignored_layers=[last]
    )
    pruner.step()
    return time.perf_counter() - start


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of both on one model; the first round warms up and is not counted."""
    model, (args, kwargs) = build(name), example(name)
    own: list[dict[str, float]] = []
    rival: list[float] = []
    failure = "" if name in WITH_RIVAL else "not run: does not end within a minute"
    for _ in range(rounds + 1):
        own.append(ours(model, args, kwargs))
        if not failure:
            try:
                rival.append(theirs(name, args))
            except Exception as error:  # whatever the rival raises is its result
                failure = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    stages = {stage: statistics.median(row[stage] for row in own[1:]) for stage in (*STAGES, "checks")}
    total = statistics.median(sum(row[stage] for stage in STAGES) for row in own[1:])
    return {
        "model": name,
        "seconds": stages,
        "without_export": statistics.median(sum(row[stage] for stage in STAGES[1:]) for row in own[1:]),
        "total": total,
        "rival": statistics.median(rival[1:]) if not failure else None,
        "rival_failure": failure,
        "ratio": statistics.median(rival[1:]) / total if not failure else None,
        "raw": {"ours": own[1:], "rival": rival[1:]},
    }


def growth(rounds: int) -> list[dict[str, Any]]:
    """Analyze, plan and shrink on narrow ResNets of growing depth."""
    resnet = load_torchvision().models.resnet
    rows = []
    for depth in DEPTHS:
        n_blocks = (depth - 2) // 3
        counts = [max(1, round(n_blocks * share)) for share in (3 / 16, 4 / 16, 6 / 16, 3 / 16)]
        model = resnet.ResNet(resnet.Bottleneck, counts, width_per_group=16).eval()
        args = (torch.randn(1, 3, 64, 64),)
        n_nodes = len(torchshear.trace(model, args))
        times = [ours(model, args) for _ in range(max(1, rounds // 2))]
        rows.append({"layers": depth, "nodes": n_nodes} | {s: statistics.median(t[s] for t in times) for s in STAGES})
    return rows


def _peak_bytes(queue: Any, name: str) -> None:
    model, args = build(name), (torch.randn(1, 3, 224, 224),)
    torchshear.trace(nn.Linear(2, 2), (torch.randn(1, 2),))  # what torch.export itself loads once
    with torch.no_grad():
        model(*args)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again at what is resident now
    before = _status_bytes("VmRSS")
    ours(model, args)
    queue.put((weights, _status_bytes("VmHWM") - before))


def _status_bytes(key: str) -> int:
    """A figure of this process from /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def peak_memory(name: str) -> dict[str, Any]:
    """Growth of the process's peak memory while a model is pruned, in copies of its weights; in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_bytes, args=(queue, name))
    process.start()
    weights, grown = queue.get()
    process.join()
    return {"model": name, "weights_mb": weights / 1e6, "grown_mb": grown / 1e6, "copies": grown / weights}


def report(results: dict[str, Any], show: Callable[[str], None] = print) -> None:
    """Print what was measured as tables in Markdown."""
    show(
        "| model | capture s | analyze s | plan s | shrink s | without capture s | total s | Torch-Pruning s | ratio "
        "| our checks s |"
    )
    show("|---|---|---|---|---|---|---|---|---|---|")
    for row in results["models"]:
        stages = " | ".join(f"{row['seconds'][stage]:.2f}" for stage in STAGES)
        rival = f"{row['rival']:.2f} | {row['ratio']:.2f}" if row["rival"] else f"fails ({row['rival_failure']}) | "
        checks = f"{row['seconds']['checks']:.2f}"
        show(f"| {row['model']} | {stages} | {row['without_export']:.2f} | {row['total']:.2f} | {rival} | {checks} |")
    show(f"\ngeometric mean of Torch-Pruning / ours: {results['geometric_mean']:.2f}\n")
    show("| layers | nodes | capture s | analyze s | plan s | shrink s | ms a node without capture |")
    show("|---|---|---|---|---|---|---|")
    for row in results["growth"]:
        each = 1000 * (row["analyze"] + row["plan"] + row["shrink"]) / row["nodes"]
        stages = " | ".join(f"{row[stage]:.2f}" for stage in STAGES)
        show(f"| {row['layers']} | {row['nodes']} | {stages} | {each:.2f} |")
    for row in results["memory"]:
        show(f"\npeak memory while pruning {row['model']} ({row['weights_mb']:.0f} MB): +{row['copies']:.2f} copies")


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch_pruning")  # its hints on single parameters, once a round
    models = []
    for name in options.models:
        models.append(compare(name, options.rounds))
        print(f"{name}: {models[-1]['total']:.2f} s, Torch-Pruning {models[-1]['rival'] or 'fails'}", file=sys.stderr)
    ratios = [row["ratio"] for row in models if row["ratio"]]
    results = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "models": models,
        "geometric_mean": statistics.geometric_mean(ratios) if ratios else float("nan"),
        "growth": growth(options.rounds),
        "memory": [peak_memory(name) for name in ("vgg16", "resnet50") if name in options.models],
    }
    report(results)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "planning.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
