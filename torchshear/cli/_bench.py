"""`torchshear bench`: compare ONNX files for speed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import torchshear
from torchshear.cli._shared_options import Provider
from torchshear.cli._terminal import stdout_console
from torchshear.speedup import LatencyComparison
from torchshear.speedup.onnx._session import CPU


def bench(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="ONNX files; the first is the baseline.")],
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime.")] = 1,
    rounds: Annotated[int, typer.Option(help="Times taken of each file; 20 or more for a useful interval.")] = 50,
    batch: Annotated[int, typer.Option(help="Batch size of the inputs.")] = 1,
    provider: Provider = CPU,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the raw times.")] = False,
) -> None:
    """Compare ONNX files for speed in onnxruntime, in interleaved rounds."""
    comparison = torchshear.compare_latency(
        _names_of(files), threads=threads, rounds=rounds, batch=batch, provider=provider
    )
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=2))
    else:
        print_latency(stdout_console(), comparison)


def _names_of(files: Sequence[Path]) -> dict[str, Path]:
    """Short names for files: stems where they differ, else paths; a file given twice gets a number."""
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(set(files)) else [str(file) for file in files]
    counted = [f"{name}#{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]
    return dict(zip(counted, files, strict=True))


def print_latency(console: Console, comparison: LatencyComparison) -> None:
    """Print a comparison as a table."""
    share = f"{comparison[comparison.baseline].confidence:.0%}"
    table = Table("model", title="Latency", title_justify="left")
    for heading in ("median ms", f"{share} interval", "speed-up", f"{share} interval"):
        table.add_column(heading, justify="right")
    for name, result in comparison.results.items():
        low, high = result.interval_ms
        slow, fast = comparison.speedup_interval(name)
        speedup = f"{comparison.speedup(name):.2f}"
        table.add_row(name, f"{result.median_ms:.3f}", f"{low:.3f} to {high:.3f}", speedup, f"{slow:.2f} to {fast:.2f}")
    console.print(table)
    threads = f"{comparison.threads} thread{'s' * (comparison.threads > 1)}"
    console.print(f"{comparison.runtime}, {comparison.cpu}, {threads}, batch {comparison.batch}")
    for note in comparison.notes:
        console.print(note, style="bold")
