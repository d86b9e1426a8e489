"""Targets of latency: what is reached, and how much less an exact choice of widths loses than the usual ones.

    OMP_NUM_THREADS=1 python benchmarks/latency_target.py [--models digits torchvision:resnet18 ...] [--targets 0.7 0.5]
                                                          [--choices-only] [--write]

For each model, with random weights, one thread and a batch of 1: the table is measured or read from the cache. Then,
for each target, widths are chosen from the same table, levels and losses ("l1") by

  exact    the allocation of the library, with its gap,
  uniform  the same share of every group, the largest that is within the budget,
  greedy   from dense widths, step by step the narrowing of one group with the least loss for the time that it saves,
  halp     knapsacks over single groups whose costs are those at the widths of the round before, under a budget that
           falls from dense to the target in 30 rounds (HALP, arXiv:2110.10811),

and their losses are compared. Unless --choices-only is given, the model is pruned for each target from end to end: time
measured by the target, rounds, realised share (speed-up by the ratio of operations), and seconds of the whole call with
the table at hand. `--write` puts rows into benchmarks/results/latency_target.json, in the place of those of the same
machine, model and target, and all of it into latency_target.md. Models are those of torchvision and timm, that of the
demo ("digits"), one of six convolutions ("convolutions"), BERT-base with 128 tokens ("bert-base"), and a detector built
like YOLOv8n ("yolo").
"""

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchshear
from examples.digits import DigitsNet
from tests.yolo import Yolo
from tests.zoo import zoo
from tests.zoo.torchvision_models import load_torchvision
from torchshear.errors import TorchshearError
from torchshear.latency_target._budgets import latency_budget
from torchshear.pruners._planning import RankedGroups
from torchshear.pruners.allocation._problem import CostBudget, CostTerm, Levels
from torchshear.pruners.allocation._solve import allocate
from torchshear.pruners.selection._request import Request
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.speedup.latency._alignment_profiles import resolve_alignment
from torchshear.speedup.latency._device import cpu_name
from torchshear.speedup.latency._measure_table import table_of

MODELS = (
    "digits",
    "convolutions",
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
    "torchvision:efficientnet_b0",
    "torchvision:resnet50",
    "timm:deit_tiny_patch16_224",
    "bert-base",
    "yolo",
)
HALP_ROUNDS = 30
RESULTS = Path(__file__).with_name("results") / "latency_target.json"

Choice = list[int]  # number of the level of each group; 0 is the widest


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a model with random weights in eval mode, and its example arguments."""
    torch.manual_seed(0)
    if name == "digits":
        return DigitsNet().eval(), (torch.randn(1, 1, 8, 8),)
    if name == "convolutions":
        widths, layers = (3, 64, 64, 128, 128, 256, 256), []
        for number, (read, made) in enumerate(pairwise(widths)):
            stride = 2 if number in (2, 4) else 1
            layers += [nn.Conv2d(read, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
        return model.eval(), (torch.randn(1, 3, 64, 64),)
    if name == "bert-base":
        load_torchvision()
        from transformers import BertConfig, BertModel

        bert = BertModel(BertConfig(return_dict=False, attn_implementation="sdpa"), add_pooling_layer=False)
        return bert.eval(), (torch.randint(0, 30000, (1, 128)),)
    if name == "yolo":
        return Yolo(16, 80).eval(), (torch.randn(1, 3, 320, 320),)
    model, args, _ = zoo.build(name)
    return model, args


def choose_exact(levels: list[Levels], budget: CostBudget) -> tuple[Choice, float]:
    """Return the choice of the library, and its gap."""
    found = allocate(levels, [budget])
    return [one.widths.index(found.widths[one.name]) for one in levels], found.gap


def choose_uniform(levels: list[Levels], budget: CostBudget) -> Choice:
    """Give every group the widest level below one share of its width, the largest share that the budget allows."""
    for share in np.linspace(1, 0, 401):
        at = [next((n for n, w in enumerate(o.widths) if w <= share * o.widths[0]), len(o.widths) - 1) for o in levels]
        if budget.cost(levels, at) <= budget.limit:
            return at
    raise TorchshearError("no uniform share is within the budget")


def choose_greedily(levels: list[Levels], budget: CostBudget) -> Choice:
    """Narrow one group after another, each time the one that loses least for the time that it saves."""
    at = [0] * len(levels)
    cost = budget.cost(levels, at)
    while cost > budget.limit:
        steps = []
        for group, one in enumerate(levels):
            for level in range(at[group] + 1, len(one.widths)):
                narrower = [*at[:group], level, *at[group + 1 :]]
                saved = cost - budget.cost(levels, narrower)
                if saved > 0:
                    steps.append(((one.losses[level] - one.losses[at[group]]) / saved, narrower))
                    break
        _, at = min(steps, key=lambda step: step[0])
        cost = budget.cost(levels, at)
    return at


def choose_as_halp(levels: list[Levels], budget: CostBudget) -> Choice:
    """Solve knapsacks whose costs are those of one group at a time, at the widths of the round before."""
    at = [0] * len(levels)
    dense = budget.cost(levels, at)
    for number in range(1, 3 * HALP_ROUNDS):
        share = min(number / HALP_ROUNDS, 1.0)
        limit = float(np.exp(share * np.log(budget.limit) + (1 - share) * np.log(dense)))
        left = [Levels(o.name, o.widths[n:], o.losses[n:]) for o, n in zip(levels, at, strict=True)]
        now, terms = budget.cost(levels, at), []
        for group, one in enumerate(left):
            costs = [
                budget.cost(levels, [*at[:group], at[group] + n, *at[group + 1 :]]) - now
                for n in range(len(one.widths))
            ]
            terms.append(CostTerm((one.name,), np.array(costs)))
        least = now + sum(float(term.table.min()) for term in terms)
        found = allocate(left, [CostBudget("ms", max(limit, least + 1e-9 * now), tuple(terms), now)], gap=1e-3)
        at = [one.widths.index(found.widths[one.name]) for one in levels]
        if number >= HALP_ROUNDS and budget.cost(levels, at) <= budget.limit:
            break
    return at


CHOICES: Mapping[str, Callable[[list[Levels], CostBudget], Choice]] = {
    "uniform": choose_uniform,
    "greedy": choose_greedily,
    "halp": choose_as_halp,
}


def compare_choices(model: nn.Module, args: tuple[Any, ...], target: float) -> dict[str, Any]:
    """Loss of each way to choose widths within a share of the dense model's time, by the table."""
    groups = torchshear.analyze(torchshear.trace(model, args))
    alignment = resolve_alignment("auto")
    table: LatencyTable = table_of(model, groups, args, None, Device(), alignment)
    levels = RankedGroups.of(groups, Request(target_latency=target, alignment=alignment), None).levels()
    budget = latency_budget(groups, levels, table, target)
    start = time.perf_counter()
    exact, gap = choose_exact(levels, budget)
    row: dict[str, Any] = {
        "groups": len(levels),
        "table error, median and largest": table.errors,
        "seconds": time.perf_counter() - start,
        "gap": gap,
        "exact": loss_of(levels, exact),
    }
    for name, choose in CHOICES.items():
        found = choose(levels, budget)
        assert budget.cost(levels, found) <= budget.limit * (1 + 1e-6)
        row[name] = loss_of(levels, found)
    return row


def loss_of(levels: list[Levels], at: Choice) -> float:
    """Sum the losses of a choice."""
    return float(sum(one.losses[level] for one, level in zip(levels, at, strict=True)))


def prune_for(model: nn.Module, args: tuple[Any, ...], target: float) -> dict[str, Any]:
    """Prune from end to end for a target, and say what was measured."""
    start = time.perf_counter()
    result = torchshear.prune(model, args, target_latency=target, must_be_faster=False)
    assert result.latency is not None
    assert result.allocation is not None
    share = 1 / result.latency.speedup("pruned")
    return {
        "measured share": share,
        "by the target": share / target,
        "rounds": len(result.allocation.rounds),
        "uncertainty": result.latency.uncertainty("pruned"),
        "realised": result.allocation.macs_share / share,
        "seconds of the call": time.perf_counter() - start,
    }


def write(rows: list[dict[str, Any]]) -> None:
    """Put rows in the place of those of the same machine, model and target, and write all of them as tables, too."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    by_key = {(row["cpu"], row["model"], row["target"]): row for row in [*known, *rows]}
    every = sorted(by_key.values(), key=lambda row: (row["cpu"], MODELS.index(row["model"]), -row["target"]))
    RESULTS.write_text(json.dumps(every, indent=1) + "\n")
    lines = [
        "# Targets of latency",
        "",
        "`python benchmarks/latency_target.py --write`: random weights, one thread, a batch of 1. Losses are by the "
        "same table, widths and scores (`l1`), less is better; HALP stands for its knapsacks over single groups. A "
        "target is met by a measured time of at most the target, and not more than 3 % below it.",
    ]
    for cpu in dict.fromkeys(row["cpu"] for row in every):
        lines += _table(cpu, [row for row in every if row["cpu"] == cpu])
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _table(cpu: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows of one machine as lines of Markdown."""
    lines = [
        "",
        f"## {cpu}",
        "",
        "| model | target | table off by, median, most | exact | greedy | HALP | uniform | solver, s | measured by the "
        "target | met | rounds | realised | call, s |",
        "|---" * 13 + "|",
    ]
    for row in rows:
        median, most = row["table error, median and largest"]
        losses = " | ".join(f"{row[name]:.2f}" for name in ("exact", "greedy", "halp", "uniform"))
        cells = f"{row['model']} | {row['target']} | {median:.1%}, {most:.1%} | {losses} | {row['seconds']:.1f}"
        if "by the target" in row:
            met = "yes" if 0.97 <= row["by the target"] <= 1 else "no"
            cells += f" | {row['by the target']:.3f} | {met} | {row['rounds']} | {row['realised']:.2f}"
            cells += f" | {row['seconds of the call']:.0f}"
        else:
            cells += " | - | - | - | - | -"
        lines.append(f"| {cells} |")
    pruned = [row for row in rows if "by the target" in row]
    halves = [row["realised"] for row in pruned if row["target"] == 0.5]
    if halves:
        n_met = sum(0.97 <= row["by the target"] <= 1 for row in pruned)
        lines += [
            "",
            f"{n_met} of {len(pruned)} targets met. Realised share at half of the latency, geometric mean of "
            f"{len(halves)} models: {statistics.geometric_mean(halves):.2f}.",
        ]
    return lines


def main() -> None:
    """Run all models and targets, and print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--targets", nargs="+", type=float, default=(0.7, 0.5, 0.35))
    parser.add_argument("--choices-only", action="store_true")
    parser.add_argument("--write", action="store_true", help="write the rows to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cpu = f"{cpu_name()}, {platform.machine()}, onnxruntime {onnxruntime.__version__}"
    rows = []
    for name in options.models:
        for target in options.targets:
            model, args = build(name)
            row = {"cpu": cpu, "model": name, "target": target} | compare_choices(model, args, target)
            row |= {} if options.choices_only else prune_for(model, args, target)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.write:
                write(rows)


if __name__ == "__main__":
    main()
