"""Prune a small language model without training it again: perplexity as cut, with means folded in, and refitted.

    python examples/language_model.py [--left 0.8 0.5 0.25] [--methods l1 "wanda, inside"] [--seeds 1] [--fast]

A transformer learns to write the help pages that Python ships (`pydoc_data.topics`), character by character. It is cut
to shares of its MACs, and brought nearer to the original from 256 sequences, in closed form or by a short distillation.
Perplexity is that of a character of a part of the text that is held out; paragraphs that stand in several pages count
once. The network is trained once a seed, for about two and a half minutes: its weights stay beside the results.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import torchshear

LENGTH: Final = 128  # characters of a sequence
N_CODES: Final = 128  # ASCII
BATCH: Final = 32
STEPS: Final = 1600  # of training, about two and a half minutes on one core
BLOCK: Final = 4096  # characters; every tenth block of the text is held out
METHODS: Final[Mapping[str, dict[str, Any]]] = {
    "l1": {"criterion": "l1"},
    "l1, inside": {"criterion": "l1", "roles": ("heads", "ffn")},
    "wanda, inside": {"criterion": "wanda", "roles": ("heads", "ffn")},
    "reconstruction": {"criterion": "reconstruction"},
    "reconstruction, global": {"criterion": "reconstruction", "scope": "global"},
    "reconstruction, global, inside": {
        "criterion": "reconstruction", "scope": "global", "roles": ("heads", "ffn"),
    },
}  # fmt: skip
DISTILLED: Final = "reconstruction, global"  # what is distilled and timed
console = Console(highlight=False)


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map a stream (N, T, width) to the same shape."""
        read = self.norm1(x)
        q, k, v = (
            layer(read).unflatten(2, (self.n_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """A table of characters, places, blocks of causal attention, and a linear classifier of the next character."""

    def __init__(self, width: int = 128, n_heads: int = 4, n_blocks: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(N_CODES, width)
        self.places = nn.Parameter(torch.empty(LENGTH, width))
        self.blocks = nn.Sequential(*(Block(width, n_heads) for _ in range(n_blocks)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, N_CODES)
        for weight in self.parameters():
            if weight.ndim == 2:  # matrices and tables
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map codes of characters (N, 128) to scores of the next one (N, 128, 128)."""
        return self.classifier(self.norm(self.blocks(self.table(tokens) + self.places)))


def load_text() -> tuple[Tensor, Tensor]:
    """Return the codes of the characters to learn from, and of those held out: each of shape (count,)."""
    paragraphs = dict.fromkeys(part.strip() for name in sorted(topics) for part in topics[name].split("\n\n"))
    codes = torch.tensor(list("\n\n".join(paragraphs).encode("ascii", "replace")))
    blocks = codes[: len(codes) // BLOCK * BLOCK].view(-1, BLOCK)
    is_held = torch.arange(len(blocks)) % 10 == 9
    return blocks[~is_held].flatten(), blocks[is_held].flatten()


def sequences(codes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw sequences of a text, each with the character behind it: shape (count, 129)."""
    starts = torch.randint(len(codes) - LENGTH, (count, 1), generator=generator)
    return codes[starts + torch.arange(LENGTH + 1)]


def fit(model: nn.Module, codes: Tensor, steps: int, seed: int, learning_rate: float = 2e-3) -> None:
    """Train a model in place with AdamW and one cycle of the learning rate; it is left in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        drawn = sequences(codes, 8, generator)
        loss = functional.cross_entropy(model(drawn[:, :-1]).flatten(0, 1), drawn[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def trained(build: Callable[[], nn.Module], codes: Tensor, steps: int, seed: int, folder: Path) -> nn.Module:
    """Return the trained network of a seed, from the folder if it was trained before."""
    torch.manual_seed(seed)
    model, path = build(), folder / f"weights-{seed}-{steps}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        fit(model, codes, steps, seed)
        save_file(model.state_dict(), path)
    return model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, codes: Tensor) -> float:
    """Return the perplexity of a character, over all sequences of a text one after another."""
    count = (len(codes) - 1) // LENGTH
    inputs, targets = (codes[begin : begin + count * LENGTH].view(count, LENGTH) for begin in (0, 1))
    nats = 0.0
    for part, wanted in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
        nats += float(functional.cross_entropy(model(part).flatten(0, 1), wanted.flatten(), reduction="sum"))
    return math.exp(nats / targets.numel())


def prune(
    model: nn.Module, codes: tuple[Tensor, Tensor], left: float, method: str, seed: int, n_sequences: int = 256
) -> tuple[dict[str, Any], Any]:
    """Cut a network to a share of its MACs, refit it, and measure it in between; returns figures and the result."""
    drawn = sequences(codes[0], n_sequences, torch.Generator().manual_seed(1000 + seed))[:, :-1]
    batches = list(drawn.split(BATCH))
    began = time.perf_counter()
    result = torchshear.prune(
        model, drawn[:2], target_macs=left, data=batches, batches=len(batches), compensate="refit", **METHODS[method]
    )
    seconds = time.perf_counter() - began
    cut = torchshear.shrink(model, result.plan)  # the same widths, and the weights as they were
    means = torchshear.compensate(model, cut, result.plan, batches, "means", batches=len(batches), progress=False)
    found = {
        "left": left, "method": method, "seed": seed, "seconds": seconds,
        "macs": result.report.after.macs / result.report.before.macs,
        "cut": perplexity(cut, codes[1]), "means": perplexity(means, codes[1]),
        "refitted": perplexity(result.model, codes[1]),
        "layers": [[layer.name, layer.error_before, layer.error_after] for layer in result.refit.layers],
    }  # fmt: skip
    return found, result


def distilled(model: nn.Module, result: Any, codes: tuple[Tensor, Tensor], steps: int) -> float:
    """Return the perplexity of a refitted network after a distillation from its original, which needs no labels."""
    generator = torch.Generator().manual_seed(2000)
    loader = [sequences(codes[0], 8, generator)[:, :-1] for _ in range(min(steps, 400) + 1)]
    found = torchshear.distill(
        result.model, model, loader, steps=steps, plan=result.plan, learning_rate=1e-3, progress=False
    )
    return perplexity(found.model, codes[1])


def speedup(model: nn.Module, small: nn.Module, tokens: Tensor, folder: Path) -> list[float]:
    """Return how many times faster a network is in onnxruntime, and the interval of that."""
    files = {
        name: torchshear.export_onnx(one, folder / f"{name}.onnx", (tokens,)).path
        for name, one in (("dense", model), ("pruned", small))
    }
    latency = torchshear.compare_latency(files, inputs={"tokens": tokens.numpy()}, rounds=30, progress=False)
    return [latency.speedup("pruned"), *latency.speedup_interval("pruned")]


def table(rows: list[dict[str, Any]], dense: list[float]) -> Table:
    """Return means, and half of the ranges, over seeds as a table."""
    found = Table(title=f"Perplexity of a character; dense {_mean(dense)}", title_justify="left")
    for heading in ("MACs", "method", "cut", "means", "refitted", "distilled"):
        found.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=heading != "method")
    for left, method in dict.fromkeys((row["left"], row["method"]) for row in rows):
        own = [row for row in rows if (row["left"], row["method"]) == (left, method)]
        cells = [_mean([row[name] for row in own if name in row]) for name in ("cut", "means", "refitted", "distilled")]
        found.add_row(f"{statistics.fmean(row['macs'] for row in own):.0%}", method, *cells)
    return found


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ±{(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def main() -> None:
    """Train, prune, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--left", nargs="+", type=float, default=[0.8, 0.5, 0.25], help="shares of the MACs left")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["l1", "wanda, inside", DISTILLED])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="a small network, hardly trained")
    parser.add_argument("--output", type=Path, default=Path("out/language_model"), help="folder for the results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    steps, n_distilled = (20, 5) if options.fast else (STEPS, 200)
    build = (lambda: LanguageModel(32, 2, 1)) if options.fast else LanguageModel
    learnt, held = load_text()
    codes = (learnt, held[: 8 * BLOCK // 4] if options.fast else held)
    rows: list[dict[str, Any]] = []
    dense = []
    for seed in range(options.seeds):
        model = trained(build, learnt, steps, seed, options.output)
        dense.append(perplexity(model, codes[1]))
        for left in options.left:
            for method in options.methods:
                row, result = prune(model, codes, left, method, seed, 64 if options.fast else 256)
                if method == DISTILLED and seed == 0:
                    row["distilled"] = distilled(model, result, codes, n_distilled)
                    row["speedup"] = speedup(model, result.model, held[None, :LENGTH], options.output)
                rows.append(row)
                report = json.dumps({"dense": dense, "rows": rows}, indent=1)
                (options.output / "report.json").write_text(report + "\n", encoding="utf-8")
    console.print(table(rows, dense))
    console.print("inside: heads and feed-forward networks alone; the stream between them stays whole")
    for row in rows:
        if "speedup" in row:
            times, low, high = row["speedup"]
            console.print(f"{row['method']}, {row['macs']:.0%}: {times:.2f} times faster ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
