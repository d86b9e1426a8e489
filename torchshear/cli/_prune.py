"""`torchshear prune`: prune a model into a folder, prove it, export it and measure it.

Options that other commands have as well are in `_shared_options.py`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from safetensors.torch import save_model
from torch import nn

import torchshear
from torchshear.cli._bench import print_latency
from torchshear.cli._example import Target, load_example
from torchshear.cli._folder import Force, folder_name, output_folder
from torchshear.cli._shared_options import CRITERIA, EVERY, Provider, Runtime, parse_align, takes_choice
from torchshear.cli._terminal import print_lines, status, stdout_console
from torchshear.configs._resolved import render_config
from torchshear.family._files import write_onnx
from torchshear.report import render_report
from torchshear.speedup import OnnxFile, Verification
from torchshear.speedup.latency import Device
from torchshear.speedup.latency._device import ONNXRUNTIME
from torchshear.speedup.onnx._session import CPU
from torchshear.storage._writing import atomic_path

Exported = tuple[nn.Module, nn.Module, tuple[Any, ...], Mapping[str, Any]]  # dense, pruned, arguments of a call of them


@takes_choice(*EVERY)
def prune(  # noqa: PLR0913 - options of the command line, given by name
    target: Target,
    output: Annotated[
        Path,
        typer.Option(
            parser=folder_name, metavar="FOLDER", help="Folder for the results: new, empty, or of an earlier run."
        ),
    ],
    criterion: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"How channels are scored: {CRITERIA}. Default: what a config says; reconstruction with --compensate "
            "refit; else l1.",
        ),
    ] = None,
    align: Annotated[
        str, typer.Option(help="Widths that the device runs well: auto (this CPU), a profile, a number, or none.")
    ] = "auto",
    min_width: Annotated[int, typer.Option(help="Fewest channels to keep in a group.")] = 1,
    runtime: Runtime = ONNXRUNTIME,
    provider: Provider = CPU,
    threads: Annotated[int, typer.Option(help="Threads of the runtime where latency is measured.")] = 1,
    batch: Annotated[int, typer.Option(help="Samples of one inference where latency is measured.")] = 1,
    bench: Annotated[bool, typer.Option(help="Measure both ONNX files, or with --runtime torch both modules.")] = True,
    force: Force = False,
    *,
    choice: dict[str, Any],
) -> None:
    """Prune a model, prove it equal to the masked one, write it with its plan and as ONNX, and measure it.

    Writes plan.json, model.safetensors, dense.onnx, pruned.onnx and report.json, and a record of them, by which a later
    run knows what it may replace; a folder that holds anything else is refused. The pruned model in Python:
    small = torchshear.shrink(Model(), PruningPlan.load("plan.json")), then
    safetensors.torch.load_model(small, "model.safetensors").

    With --runtime torch or torch.compile both modules are measured in place of files, and a model that cannot be
    exported has no ONNX file. With --submodule, only these modules are pruned inside the model, and the ONNX files are
    theirs: dense-NAME.onnx and pruned-NAME.onnx.
    """
    device = Device(threads=threads, batch=batch, runtime=runtime, provider=provider)
    measures_modules = bench and runtime != ONNXRUNTIME
    model, args, kwargs = load_example(target)
    with output_folder(output, "prune", force) as draft, status("pruning and verifying") as say:
        if "data" in choice:
            choice["data"].say = say
        if "target_latency" in choice or choice.get("must_be_faster") or measures_modules:
            choice["device"] = device
        result = torchshear.prune(
            model,
            args,
            kwargs,
            criterion=criterion,
            align=parse_align(align),
            min_width=min_width,
            progress=lambda done, total, what: say(f"{what} ({done} of {total} done)"),
            **choice,
        )
        pairs = _pairs(model, result, args, kwargs)
        files, missing = _write(draft, result, pairs, device, say)
        document = _report_document(target, result, files)
        (draft / "report.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    console = stdout_console()
    _print_result(console, result)
    if missing:
        print_lines(console, f"no ONNX     {missing}")
    if bench:
        document["latency"] = _measure(console, output, result, list(pairs), device)
        with output_folder(output, "prune", force, adds=True) as draft:
            (draft / "report.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    written = ", ".join(["plan.json", "model.safetensors", *(file.path.name for file in files.values()), "report.json"])
    print_lines(console, f"written     in {output}: {written}")


def _write(
    draft: Path,
    result: torchshear.PruneResult,
    pairs: Mapping[str, Exported],
    device: Device,
    say: Callable[[str], None],
) -> tuple[dict[str, OnnxFile], str]:
    """Write the plan, the weights and the ONNX files.

    Returns:
        Name of an ONNX file, without its suffix -> what was written; and why one is missing, or "".
    """
    say("writing the plan and the weights")
    result.plan.save(draft / "plan.json")
    with atomic_path(draft / "model.safetensors") as temporary:
        save_model(result.model, str(temporary))  # tied tensors once, their other names in the metadata
    say("exporting ONNX")
    written = {
        f"{kind}{suffix}": write_onnx(one, draft / f"{kind}{suffix}.onnx", inputs, options, device)
        for suffix, (dense, small, inputs, options) in pairs.items()
        for kind, one in (("dense", dense), ("pruned", small))
    }
    files = {name: found for name, found in written.items() if isinstance(found, OnnxFile)}
    return files, next((found for found in written.values() if isinstance(found, str)), "")


def _print_result(console: Console, result: torchshear.PruneResult) -> None:
    """Print the report and the proof of a result."""
    if result.config is not None:
        print_lines(console, render_config(result.config, console.width))
    print_lines(console, render_report(result.report, console.width))
    proof = _proof(result)
    error = f"error {proof.max_error:.1e} in {str(proof.dtype).removeprefix('torch.')}"
    print_lines(console, f"verified    equal to the original ({proof.reference}): {error}")
    for line in _steps_after(result):
        print_lines(console, line)


def _proof(result: torchshear.PruneResult) -> Verification:
    assert result.verification is not None, "weights that were just written are not on the meta device"
    return result.verification


def _measure(
    console: Console, output: Path, result: torchshear.PruneResult, suffixes: list[str], device: Device
) -> dict[str, Any]:
    """Latency, printed: of both modules if they were measured in torch, else of each pair of ONNX files.

    The latter is that of the whole model, or by the name of the part.
    """
    if device.runtime != ONNXRUNTIME:
        assert result.latency is not None, "the device was given"
        print_latency(console, result.latency)
        return result.latency.to_dict()
    kinds = ("dense", "pruned")
    files = {suffix: {f"{kind}{suffix}": output / f"{kind}{suffix}.onnx" for kind in kinds} for suffix in suffixes}
    comparisons = {
        suffix: torchshear.compare_latency(pair, threads=device.threads, batch=device.batch, provider=device.provider)
        for suffix, pair in files.items()
    }
    for comparison in comparisons.values():
        print_latency(console, comparison)
    times = {suffix.removeprefix("-"): comparison.to_dict() for suffix, comparison in comparisons.items()}
    return times.get("", times)


def _steps_after(result: torchshear.PruneResult) -> Iterator[str]:
    """Name the steps after the proof."""
    if result.allocation is not None:
        yield from str(result.allocation).splitlines()
    if result.fold is not None:
        n_folded, n_skipped = (
            sum(o.n_channels for o in places) for places in (result.fold.folded, result.fold.skipped)
        )
        error = f"error {result.fold.max_error:.1e} in {str(result.fold.dtype).removeprefix('torch.')}"
        yield f"folded      {result.fold.kind} of {n_folded} channels, {n_skipped} left at zero: {error}"
    if result.compensation == "statistics":
        yield "statistics  of batch norms estimated anew on the data, after the proof"
    if result.refit is not None and result.refit.is_kept:
        n_fitted = sum(bool(layer.method) for layer in result.refit.layers)
        yield f"refitted    {n_fitted} of {len(result.refit.layers)} layers on the data, after the proof"


def _pairs(
    model: nn.Module, result: torchshear.PruneResult, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Exported]:
    """Suffix of files -> what is exported: both forms of the model, or of each part, with inputs of its first call."""
    assert result.plan.analysis is not None, "a plan that was just made has its analysis"
    graph = result.plan.analysis.graph
    if graph.parts is None:
        return {"": (model, result.model, args, kwargs)}
    first = dict(reversed(list(zip(graph.parts.calls, graph.inputs.args, strict=True))))
    return {
        f"-{name}": (model.get_submodule(name), result.model.get_submodule(name), *first[name])
        for name in graph.parts.names
    }


def _report_document(target: str, result: torchshear.PruneResult, files: Mapping[str, OnnxFile]) -> dict[str, Any]:
    """Everything about a pruning as plain data."""
    return {
        "torchshear": version("torchshear"),
        "target": target,
        "request": dict(result.plan.request),
        "report": result.report.to_dict(),
        "verification": asdict(_proof(result)) | {"dtype": str(_proof(result).dtype)},
        "fold": None if result.fold is None else asdict(result.fold) | {"dtype": str(result.fold.dtype)},
        "compensation": result.compensation,
        "onnx": {name: asdict(file) | {"path": file.path.name} for name, file in files.items()},
        "allocation": None if result.allocation is None else result.allocation.to_dict(),
        "latency": None,
    }
