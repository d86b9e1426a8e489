"""Train, prune, prove, refit, fine-tune, export and measure a residual CNN on real digits; results go to out/demo.

python examples/digits_demo.py [--fast] [--output FOLDER]
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import torch
from digits import BATCH, Digits, DigitsNet, accuracy, fit, load_data
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import torchshear
from torchshear.report import PruningReport
from torchshear.speedup import LatencyComparison, OnnxFile
from torchshear.speedup.latency import measure_table

mpl.use("Agg")
from matplotlib import pyplot as plt

TARGET = 1 / 3  # of the dense model's latency
DENSE_COLOUR, PRUNED_COLOUR = "#9aa5b1", "#0b7285"
console = Console(highlight=False)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a small network, hardly trained, nothing demanded of it")
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for the results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.set_num_threads(1)  # the same figures whatever the number of cores
    torch.manual_seed(0)
    run(options.output, is_fast=options.fast)
    console.print(f"Took {time.perf_counter() - started:.0f} s. Everything is in {options.output}.")


def run(output: Path, *, is_fast: bool) -> None:
    """All steps, with their results in a folder."""
    data = load_data()
    example = (data.test_images[:2],)
    model = DigitsNet((32, 64, 128), n_blocks=1) if is_fast else DigitsNet()
    console.print(f"{len(data.train_labels):,} digits to train on, {len(data.test_labels):,} to test with\n")

    train("training", model, data, n_epochs=2 if is_fast else 7, learning_rate=3e-3)
    images = data.train_images[: 4 * BATCH if is_fast else 16 * BATCH].split(BATCH)
    with timed("table"):
        table = measure_table(model, example, probes=4 if is_fast else 10)
    result = torchshear.prune(
        model,
        args=example,
        target_latency=0.9 if is_fast else TARGET,
        device=table,
        must_be_faster=not is_fast,
        data=images,
        compensate="refit",
    )
    result.plan.save(output / "plan.json")
    say_pruned(result)
    cut = torchshear.shrink(model, result.plan)  # the same widths, and the weights as they were
    accuracies = {"dense": score(model, data), "cut": score(cut, data), "refitted": score(result.model, data)}
    console.print(f"{'cut':<12} {accuracies['cut']:.1%} right")
    console.print(
        f"{'refit':<12} {accuracies['refitted']:.1%} right, from {sum(map(len, images))} images without labels"
    )
    train("fine-tuning", result.model, data, n_epochs=1 if is_fast else 6, learning_rate=2e-3)
    accuracies["pruned"] = score(result.model, data)

    models: dict[str, nn.Module] = {"dense": model, "pruned": result.model}
    with timed("exporting"):
        files = {name: torchshear.export_onnx(one, output / f"{name}.onnx", example) for name, one in models.items()}
    with timed("measuring"):
        latency = torchshear.compare_latency(
            {name: file.path for name, file in files.items()}, rounds=10 if is_fast else 200, min_seconds=0.01
        )
    write_report(output / "report.json", result, accuracies, files, latency)
    draw(output / "demo.png", result.report, latency)
    console.print(final_table(accuracies, result.report, files, latency))
    console.print(f"Latency: medians, {latency.runtime}, {latency.cpu}, 1 thread, batch 1.")
    for note in latency.notes:
        console.print(note, style="bold")
    if not is_fast:
        demand(accuracies, latency)


def train(title: str, model: nn.Module, data: Digits, n_epochs: int, learning_rate: float) -> None:
    """Train with a bar, and say how well it went."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(30),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=n_epochs, state=f"epoch 0/{n_epochs}")

        def show(epoch: int, loss: float) -> None:
            progress.update(task, completed=epoch, state=f"epoch {epoch}/{n_epochs}, loss {loss:.3f}")

        fit(model, data, n_epochs, learning_rate, progress=show)
    console.print(f"{title:<12} {score(model, data):.1%} of the test digits right")


def score(model: nn.Module, data: Digits) -> float:
    """Test accuracy; the model is left in evaluation mode."""
    return accuracy(model.eval(), data.test_images, data.test_labels)


@contextmanager
def timed(title: str) -> Iterator[None]:
    """Say how long a step took."""
    started = time.perf_counter()
    yield
    console.print(f"{title:<12} {time.perf_counter() - started:.1f} s")


def say_pruned(result: torchshear.PruneResult) -> None:
    """Print what was cut and how closely it is proved."""
    report, proof, found = result.report, result.verification, result.allocation
    assert found is not None, "a latency was asked for"
    console.print(f"{'pruning':<12} {report.achieved_ratio:.1%} of the channels in {len(report.groups)} groups removed")
    console.print(
        f"{'latency':<12} {found.target_share:.1%} of the dense model's asked for, {found.round.measured_share:.1%} "
        f"measured, after {len(found.rounds)} rounds"
    )
    reference = "the original with its cut weights set to zero" if proof.reference == "masked" else proof.reference
    console.print(f"{'proof':<12} equal to {reference}:")
    console.print(f"{'':<12} largest relative error {proof.max_error:.1e} in {str(proof.dtype).removeprefix('torch.')}")


def write_report(
    path: Path,
    result: torchshear.PruneResult,
    accuracies: dict[str, float],
    files: dict[str, OnnxFile],
    latency: LatencyComparison,
) -> None:
    """Write every figure, raw times included, as JSON."""
    document = {
        "accuracy": accuracies,
        "request": dict(result.plan.request),
        "report": result.report.to_dict(),
        "verification": asdict(result.verification) | {"dtype": str(result.verification.dtype)},
        "onnx": {name: asdict(file) | {"path": file.path.name} for name, file in files.items()},
        "allocation": result.allocation and result.allocation.to_dict(),
        "latency": latency.to_dict(),
        "versions": {"python": sys.version.split()[0], **result.plan.versions},
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def final_table(
    accuracies: dict[str, float], report: PruningReport, files: dict[str, OnnxFile], latency: LatencyComparison
) -> Table:
    """Dense against pruned, in one table."""
    table = Table("", title="\nHandwritten digits, dense and pruned", title_justify="left")
    for heading in ("dense", "pruned", "change"):
        table.add_column(heading, justify="right")
    before, after = report.before, report.after
    sizes = [files[name].size_bytes for name in ("dense", "pruned")]
    points = 100 * (accuracies["pruned"] - accuracies["dense"])
    table.add_row("accuracy", f"{accuracies['dense']:.1%}", f"{accuracies['pruned']:.1%}", f"{points:+.1f} points")
    table.add_row("  without training", "", f"{accuracies['refitted']:.1%}", "")
    table.add_row("parameters", f"{before.n_params:,}", f"{after.n_params:,}", change(before.n_params, after.n_params))
    table.add_row("MACs", f"{before.macs:,}", f"{after.macs:,}", change(before.macs, after.macs))
    table.add_row("ONNX file", *(f"{size / 1e6:.2f} MB" for size in sizes), change(*sizes))
    medians = [f"{latency[name].median_ms:.3f} ms" for name in ("dense", "pruned")]
    table.add_row("latency", *medians, f"{latency.speedup('pruned'):.2f} times faster")
    intervals = ["{:.3f} to {:.3f}".format(*latency[name].interval_ms) for name in ("dense", "pruned")]
    table.add_row("  95% interval", *intervals, "{:.2f} to {:.2f}".format(*latency.speedup_interval("pruned")))
    return table


def change(before: float, after: float) -> str:
    """Relative change."""
    return f"{after / before - 1:+.1%}"


def draw(path: Path, report: PruningReport, latency: LatencyComparison) -> None:
    """Draw the widths of every group and the latency, before and after."""
    height = 1.6 + 0.38 * len(report.groups)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), width_ratios=(2.2, 1), layout="constrained")
    rows = range(len(report.groups))
    for group, row in zip(report.groups, rows, strict=True):
        left.barh(row, group.width, 0.72, color=DENSE_COLOUR, label="dense" if not row else None)
        left.barh(row, group.kept, 0.72, color=PRUNED_COLOUR, label="pruned" if not row else None)
        left.annotate(
            f"{group.width} → {group.kept}", (group.width, row), (4, 0), textcoords="offset points", va="center"
        )
    left.set_yticks(rows, [group.name.removesuffix(".weight[0]") for group in report.groups])
    left.invert_yaxis()
    left.set_xlim(0, 1.16 * max(group.width for group in report.groups))
    left.set(title="Width of each channel group,\ndense and pruned", xlabel="channels")
    left.legend(loc="upper right", frameon=False)

    medians = [latency[name].median_ms for name in ("dense", "pruned")]
    intervals = [latency[name].interval_ms for name in ("dense", "pruned")]
    errors = [[m - low for m, (low, _) in zip(medians, intervals, strict=True)]]
    errors.append([high - m for m, (_, high) in zip(medians, intervals, strict=True)])
    right.bar(["dense", "pruned"], medians, 0.6, yerr=errors, capsize=5, color=[DENSE_COLOUR, PRUNED_COLOUR])
    for place, (median, (_, high)) in enumerate(zip(medians, intervals, strict=True)):
        right.annotate(f"{median:.2f} ms", (place, high), (0, 5), textcoords="offset points", ha="center")
    right.set_ylim(0, 1.15 * max(high for _, high in intervals))
    low, high = latency.speedup_interval("pruned")
    right.set(title=f"Latency: {latency.speedup('pruned'):.1f} times faster\n({low:.1f} to {high:.1f})")
    right.set(ylabel="ms, median and 95% interval", xlabel=f"{latency.runtime}, 1 thread, batch 1")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def demand(accuracies: dict[str, float], latency: LatencyComparison) -> None:
    """End with an error if the demo does not show what it is there to show."""
    dense, pruned, speedup = accuracies["dense"], accuracies["pruned"], latency.speedup("pruned")
    low, high = latency.speedup_interval("pruned")
    for holds, message in (
        (dense >= 0.97, f"the dense model gets {dense:.1%} of the test digits right; expected at least 97%"),
        (dense - pruned <= 0.01, f"the pruned model gets {pruned:.1%}; expected at most 1 point less than {dense:.1%}"),
        (
            high >= 0.97 / TARGET,
            f"the pruned model is {speedup:.2f} ({low:.2f} to {high:.2f}) times faster; expected {1 / TARGET:.2g}, "
            f"but for 3 % that measurements differ by",
        ),
    ):
        if not holds:
            raise SystemExit(f"error: {message}.")


if __name__ == "__main__":
    main()
