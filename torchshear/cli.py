"""The command line: inspect a model's channel groups, prune it into a folder, and compare ONNX files for speed."""

import difflib
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from errno import EISDIR
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn
from typer.core import TyperGroup

import torchshear
from torchshear._files import atomic_path
from torchshear._options import parse_align, takes_choice
from torchshear.api import Choice
from torchshear.dependency import ChannelGroup, ChannelGroups, dense_cost
from torchshear.errors import ArgumentError, OutputError, TorchshearError
from torchshear.report import render_report
from torchshear.speedup import LatencyComparison, OnnxFile

_EXPECTED: Final = "a function without arguments that returns (model, args) or (model, args, kwargs)"
_INDEX_FILE: Final = re.compile(r"plan-[0-9a-f]{12}\.safetensors")
_WHERE: Final = re.compile(r"^aten\.(\w+)\.\w+(?: in module '(.*?)')?")

Target = Annotated[str, typer.Argument(metavar="PACKAGE.MODULE:FACTORY", help=f"Names {_EXPECTED}.")]


class _Commands(TyperGroup):
    """Commands whose failures end as one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; print an error of the library, without traceback."""
        try:
            return super().invoke(ctx)
        except TorchshearError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchshear {version('torchshear')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Structured pruning that ends in a smaller, provably equal and measurably faster model."""


@app.command()
def inspect(
    target: Target,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every member and source line.")] = False,
) -> None:
    """Show the channel groups of a model: what can shrink, what must shrink with it, and what is fixed and why."""
    model, args, kwargs = load_example(target)
    with _status("tracing and analysing"):
        groups = torchshear.analyze(torchshear.trace(model, args, kwargs))
    if as_json:
        typer.echo(json.dumps(_groups_document(groups), indent=2))
        return
    console = _console()
    console.print(_groups_table(groups))
    cost = dense_cost(groups.graph)
    console.print(f"{len(groups.prunable)} of {len(groups)} can shrink.")
    console.print(f"{cost.n_params:,} parameters, {cost.macs:,} MACs per sample.")
    _print_fixed(console, groups)


@app.command()
@takes_choice
def prune(
    target: Target,
    output: Annotated[Path, typer.Option(help="Folder for the results; made if missing.")],
    criterion: Annotated[str, typer.Option(help="How channels are scored: l1, l2.")] = "l1",
    align: Annotated[
        str, typer.Option(help="Widths that the device runs well: auto (this CPU), a profile, a number, or none.")
    ] = "auto",
    min_width: Annotated[int, typer.Option(help="Fewest channels to keep in a group.")] = 1,
    bench: Annotated[bool, typer.Option(help="Measure both ONNX files in onnxruntime.")] = True,
    *,
    ratio: float | dict[str, float],
    choice: Choice,
) -> None:
    """Prune a model, prove it equal to the masked one, write it with its plan and as ONNX, and measure it.

    Writes plan.json, model.safetensors, dense.onnx, pruned.onnx and report.json. The pruned model in Python:
    small = torchshear.shrink(Model(), PruningPlan.load("plan.json")), then
    safetensors.torch.load_model(small, "model.safetensors").
    """
    model, args, kwargs = load_example(target)
    with _output_folder(output) as draft, _status("pruning and verifying") as say:
        result = torchshear.prune(model, args, kwargs, criterion, ratio, parse_align(align), min_width, **choice)
        say("writing the plan and the weights")
        result.plan.save(draft / "plan.json")
        with atomic_path(draft / "model.safetensors") as temporary:
            save_model(result.model, str(temporary))  # tied tensors once, their other names in the metadata
        say("exporting ONNX")
        files = {
            name: torchshear.export_onnx(one, draft / f"{name}.onnx", args, kwargs)
            for name, one in (("dense", model), ("pruned", result.model))
        }
        document = _report_document(target, result, files)
        (draft / "report.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    console = _console()
    _print_lines(console, render_report(result.report, console.width))
    proof = result.verification
    error = f"error {proof.max_error:.1e} in {str(proof.dtype).removeprefix('torch.')}"
    _print_lines(console, f"verified    equal to the original ({proof.reference}): {error}")
    if bench:
        comparison = _measure({name: output / f"{name}.onnx" for name in files})
        document["latency"] = comparison.to_dict()
        with _output_folder(output) as draft:
            (draft / "report.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        _print_latency(console, comparison)
    written = ", ".join(["plan.json", "model.safetensors", *(file.path.name for file in files.values()), "report.json"])
    _print_lines(console, f"written     in {output}: {written}")


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="ONNX files; the first is the baseline.")],
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime.")] = 1,
    rounds: Annotated[int, typer.Option(help="Times taken of each file; 20 or more for a useful interval.")] = 50,
    batch: Annotated[int, typer.Option(help="Batch size of the inputs.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the raw times.")] = False,
) -> None:
    """Compare ONNX files for speed in onnxruntime, in interleaved rounds."""
    comparison = _measure(_names_of(files), threads, rounds, batch)
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=2))
    else:
        _print_latency(_console(), comparison)


def load_example(target: str) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]:
    """Import a factory, with the current folder importable, and call it: gives model, args and kwargs.

    Args:
        target: "package.module:factory"; the part after the colon may have dots.

    Raises:
        ArgumentError: there is no such factory, it fails, or it returns something else than it should.
    """
    factory = _find_factory(target)
    try:
        made = factory()
    except Exception as error:  # a factory can raise anything
        raise ArgumentError(f"{target} fails: {_failure(error)} Expected {_EXPECTED}.") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        kinds = f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else _kind(made)
        raise ArgumentError(f"{target} returned {kinds}. Expected {_EXPECTED}.")
    model, args, kwargs = (*made, {}) if len(made) == 2 else made
    for name, value, kind in (("model", model, nn.Module), ("args", args, tuple), ("kwargs", kwargs, Mapping)):
        if not isinstance(value, kind):
            hint = " Write (x,) for a single argument x." if name == "args" else ""
            raise ArgumentError(f"{target} returned {_kind(value)} as its {name}. Expected {_EXPECTED}.{hint}")
    return model, args, kwargs


def _find_factory(target: str) -> Callable[[], Any]:
    module_name, _, path = target.partition(":")
    if not (path and all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")])):
        raise ArgumentError(f"cannot read {target!r}. Expected package.module:factory, as in nets.small:make.")
    found: Any = _imported(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [name for name in dir(found) if not name.startswith("_")], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"{target}: {module_name!r} has no {part!r}.{hint} Expected {_EXPECTED}.")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise ArgumentError(f"{target} is {_kind(found)}. Expected {_EXPECTED}.")
    return found  # type: ignore[no-any-return]


def _imported(name: str) -> object:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ArgumentError(
                f"no module {error.name!r} in {folder} or among the installed packages. "
                f"Expected package.module:factory; run in the folder that holds the package."
            ) from error
        raise ArgumentError(f"importing {name!r} fails: {_failure(error)}") from error


def _failure(error: Exception) -> str:
    """Exception and innermost line of the source, for a message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (at {Path(frame.filename).name}:{frame.lineno})."


def _kind(value: object) -> str:
    return f"an object of type {type(value).__name__}"


def _names_of(files: Sequence[Path]) -> dict[str, Path]:
    """Short names for files: stems where they differ, else paths; a file given twice gets a number."""
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(set(files)) else [str(file) for file in files]
    counted = [f"{name}#{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]
    return dict(zip(counted, files, strict=True))


@contextmanager
def _output_folder(output: Path) -> Iterator[Path]:
    """Give a draft folder whose files move into `output` if the block succeeds; else nothing is left behind.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    draft = None
    try:
        output.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=output))
        yield draft
        _publish(draft, output)
    except (OSError, SafetensorError) as error:
        cause = error.__cause__ or error
        raise OutputError(
            f"cannot write into {str(output)!r}: {getattr(cause, 'strerror', None) or cause}. Expected a folder that "
            f"can be made or written, with space on its disk; what was there before is unchanged."
        ) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # it holds something, so it stays
                folder.rmdir()


def _publish(draft: Path, output: Path) -> None:
    """Move the files of a draft to their place, all or none."""
    made = sorted(file.name for file in draft.iterdir())
    for name in made:
        if (output / name).is_dir():
            raise IsADirectoryError(EISDIR, f"{name} is a folder there")
    for name in made:
        (draft / name).replace(output / name)
    for file in output.iterdir():  # the index file of an earlier plan belongs to nothing now
        if "plan.json" in made and _INDEX_FILE.fullmatch(file.name) and file.name not in made:
            file.unlink()


def _report_document(target: str, result: torchshear.PruneResult, files: Mapping[str, OnnxFile]) -> dict[str, Any]:
    """Everything about a pruning as plain data."""
    return {
        "torchshear": version("torchshear"),
        "target": target,
        "request": dict(result.plan.request),
        "report": result.report.to_dict(),
        "verification": asdict(result.verification) | {"dtype": str(result.verification.dtype)},
        "onnx": {name: asdict(file) | {"path": file.path.name} for name, file in files.items()},
        "latency": None,
    }


def _groups_document(groups: ChannelGroups) -> dict[str, Any]:
    fields = ("name", "role", "width", "is_prunable", "reason", "n_blocks", "is_mixed", "where")
    rows = [{field: getattr(group, field) for field in fields} for group in groups]
    for row, group in zip(rows, groups, strict=True):
        row["members"] = [{"name": m.name, "dim": m.dim, "roles": sorted(m.roles)} for m in group.members]
    fixed = [asdict(dimension) for dimension in groups.fixed]
    return {"model": groups.graph.model_type, **asdict(dense_cost(groups.graph)), "groups": rows, "fixed": fixed}


def _groups_table(groups: ChannelGroups) -> Table:
    table = Table(title=f"Channel groups of {groups.graph.model_type.rpartition('.')[2]}", title_justify="left")
    table.add_column("group", overflow="fold", ratio=3)
    table.add_column("width\nrole", justify="right")
    table.add_column("members", overflow="fold", ratio=3)
    table.add_column("constraints", ratio=2)
    table.add_column("where", overflow="fold", ratio=3)
    for group in groups:
        table.add_row(group.name, f"{group.width}\n{group.role}", _members(group), _constraints(group), _where(group))
    return table


def _members(group: ChannelGroup) -> str:
    """Number of parameter dimensions, and the modules that hold them."""
    modules = list(dict.fromkeys(member.name.rpartition(".")[0] or member.name for member in group.members))
    more = f", +{len(modules) - 3}" if len(modules) > 3 else ""
    return f"{len(group.members)} in {', '.join(modules[:3])}{more}"


def _constraints(group: ChannelGroup) -> str:
    balanced = f"{group.n_blocks} equal blocks" if group.balance is not None else ""
    parts = (balanced, "mixed" if group.is_mixed else "", group.reason or "")
    return ", ".join(part for part in parts if part)


def _where(group: ChannelGroup) -> str:
    """The first operator that uses a group, without what is the same for all."""
    return _WHERE.sub(lambda found: " ".join(filter(None, found.groups())), group.where[0]) if group.where else ""


def _print_fixed(console: Console, groups: ChannelGroups) -> None:
    """Print dimensions that cannot shrink, those of one reason together."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for fixed in groups.fixed:
        by_reason[fixed.reason].append(f"{fixed.name}[{fixed.dim}]")
    if by_reason:
        console.print(f"\nFixed ({len(groups.fixed)} parameter dimensions):")
    for reason, names in by_reason.items():
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        _print_lines(console, f"  {', '.join(names[:6])}{more}: {reason}", indent=4)


def _measure(models: Mapping[str, Path], threads: int = 1, rounds: int = 50, batch: int = 1) -> LatencyComparison:
    """Compare with a bar on the terminal."""
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)
    with bar:  # drawn between rounds only: a thread that draws would disturb the times
        task = bar.add_task("measuring", total=rounds)
        advance = partial(bar.update, task, advance=1, refresh=True)
        return torchshear.compare_latency(
            models, threads=threads, rounds=rounds, batch=batch, progress=lambda *_: advance()
        )


def _print_latency(console: Console, comparison: LatencyComparison) -> None:
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


def _console() -> Console:
    return Console(highlight=False, markup=False)


def _print_lines(console: Console, text: str, indent: int = 12) -> None:
    """Print text, with lines that are too long broken at words and continued further in."""
    for line in text.splitlines():
        for part in textwrap.wrap(line, console.width, subsequent_indent=" " * indent, break_on_hyphens=False) or [""]:
            console.print(part)


@contextmanager
def _status(text: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being done; gives a function that changes the text."""
    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else nullcontext() as status:
        yield lambda now: status.update(now) if status else None


def main() -> None:
    """The console entry point."""
    app()


if __name__ == "__main__":
    main()
