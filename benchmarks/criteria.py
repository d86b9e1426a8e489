"""What scoring costs: collection of statistics beside the plain passes, and planning by criteria of weights.

    python benchmarks/criteria.py [--rounds 5] [--threads 1] [--cases resnet50_224 ...] [--output benchmarks/results]

For each model and criterion: `collect` for it, and the plain model on the same batches (forward alone where the
criterion needs no loss, forward and backward by all parameters where it needs one), turn by turn; the median of the
ratios of neighbouring runs is reported, of wall time and of processor time. The second is the steadier one where other
programs run beside. "everything" is `collect` without naming criteria. Then `plan` whole, by criteria of weights alone,
on ResNet-50: scoring, selection, and what becomes of every tensor.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchshear
from tests.zoo.torchvision_models import load_torchvision
from torchshear.calibration._statistics import SUMS_OF_GRADIENTS
from torchshear.dependency import ChannelGroups
from torchshear.pruners.criteria._criterion import needs_of, registered_criteria

OF_WEIGHTS = tuple(word for word in registered_criteria() if not needs_of(word))
ALL = "everything"


@dataclass(frozen=True)
class Case:
    """A model with its batches."""

    model: nn.Module
    groups: ChannelGroups
    batches: list[Any]
    outputs: Callable[[Any], Any]
    loss: Callable[[Any, Any], Tensor]
    is_whole: bool = True  # whether each criterion is measured, or only all at once

    def plain(self, with_loss: bool) -> None:
        """Run the model itself on all batches."""
        parameters = list(self.model.parameters())
        with torch.set_grad_enabled(with_loss):
            for batch in self.batches:
                output = self.outputs(batch)
                if with_loss:
                    target = batch[1] if isinstance(batch, tuple) else batch
                    torch.autograd.grad(self.loss(output, target), parameters, allow_unused=True)

    def collect(self, criterion: str, with_loss: bool) -> None:
        """Collect what a criterion needs on all batches."""
        loss = self.loss if with_loss else None
        chosen = None if criterion == ALL else criterion
        torchshear.collect(self.groups, self.batches, loss, len(self.batches), False, chosen)


def resnet(size: int, n_batches: int, is_whole: bool = True) -> Case:
    """ResNet-50 with batches of 8 images."""
    model = load_torchvision().models.resnet50(weights=None).eval()
    batches = [(torch.randn(8, 3, size, size), torch.randint(0, 1000, (8,))) for _ in range(n_batches)]
    groups = torchshear.analyze(torchshear.trace(model, (batches[0][0],)))
    return Case(model, groups, batches, lambda batch: model(batch[0]), functional.cross_entropy, is_whole)


def bert(n_batches: int) -> Case:
    """A BERT of 4 layers and width 256 with batches of 8 sequences of 64 tokens."""
    load_torchvision()
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    model: nn.Module = BertForMaskedLM(BertConfig(num_hidden_layers=4, **sizes)).eval()
    tokens = [torch.randint(3, 1000, (8, 64)) for _ in range(n_batches)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]

    def loss(output: Any, target: Any) -> Tensor:
        return functional.cross_entropy(output["logits"].flatten(0, 1), target["input_ids"].flatten())

    groups = torchshear.analyze(torchshear.trace(model, (), batches[0]))
    return Case(model, groups, batches, lambda batch: model(**batch), loss)


CASES: dict[str, Callable[[], Case]] = {
    "resnet50_224": lambda: resnet(224, 2),
    "resnet50_96": lambda: resnet(96, 6),
    "resnet50_96_long": lambda: resnet(96, 32, is_whole=False),  # as many batches as `collect` takes unless told
    "bert_4": lambda: bert(6),
}


def _took(run: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(name: str, case: Case, criterion: str, with_loss: bool, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of the plain passes and of collection; the first round warms up and is not counted."""
    raw = []
    for _ in range(rounds + 1):
        plain = _took(lambda: case.plain(with_loss))
        raw.append((plain, _took(lambda: case.collect(criterion, with_loss))))
    raw = raw[1:]
    return {
        "case": name,
        "criterion": criterion,
        "passes": "forward and backward" if with_loss else "forward",
        "plain_s": statistics.median(plain[0] for plain, _ in raw),
        "collect_s": statistics.median(ours[0] for _, ours in raw),
        "wall_ratio": statistics.median(ours[0] / plain[0] for plain, ours in raw),
        "processor_ratio": statistics.median(ours[1] / plain[1] for plain, ours in raw),
        "raw": raw,
    }


def of_case(name: str, rounds: int) -> list[dict[str, Any]]:
    """Everything without a loss, everything with one, and each criterion that looks at data alone."""
    torch.manual_seed(0)
    case = CASES[name]()
    of_data = [word for word in registered_criteria() if needs_of(word)]
    with_loss = {word: bool(needs_of(word) & SUMS_OF_GRADIENTS) for word in of_data}
    chosen = [(ALL, False), *((w, False) for w in of_data if not with_loss[w])]
    chosen += [(ALL, True), *((w, True) for w in of_data if with_loss[w])]
    chosen = [(word, has_loss) for word, has_loss in chosen if case.is_whole or word == ALL]
    rows = []
    for criterion, has_loss in chosen:
        rows.append(compare(name, case, criterion, has_loss, rounds))
        print(f"{name} {criterion} {has_loss}: {rows[-1]['wall_ratio']:.2f}", file=sys.stderr)
    return rows


def planning(rounds: int) -> list[dict[str, Any]]:
    """`plan` by criteria of weights on ResNet-50."""
    groups = resnet(64, 1).groups
    rows = []
    for criterion in OF_WEIGHTS:
        runs = [_took(lambda word=criterion: torchshear.plan(groups, criterion=word)) for _ in range(rounds + 1)][1:]
        seconds = statistics.median(wall for wall, _ in runs)
        processor = statistics.median(used for _, used in runs)
        rows.append({"criterion": criterion, "plan_s": seconds, "processor_s": processor, "raw": runs})
    return rows


def report(results: dict[str, Any], show: Callable[[str], None] = print) -> None:
    """Print what was measured as tables in Markdown."""
    show("| model | passes | for | plain s | collect s | ratio, wall | ratio, processor |")
    show("|---|---|---|---|---|---|---|")
    for row in results["collect"]:
        times = (
            f"{row['plain_s']:.2f} | {row['collect_s']:.2f} | {row['wall_ratio']:.2f} | {row['processor_ratio']:.2f}"
        )
        show(f"| {row['case']} | {row['passes']} | {row['criterion']} | {times} |")
    show("\n| criterion | plan s | processor s |")
    show("|---|---|---|")
    for row in results["plan"]:
        show(f"| {row['criterion']} | {row['plan_s']:.3f} | {row['processor_s']:.3f} |")


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "threads": options.threads, "torch": torch.__version__},
        "plan": planning(options.rounds),
        "collect": [],
    }
    for name in [None, *options.cases]:
        results["collect"] += of_case(name, options.rounds) if name else []
        (options.output / "criteria.json").write_text(json.dumps(results, indent=1) + "\n")
    report(results)


if __name__ == "__main__":
    main()
