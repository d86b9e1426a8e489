"""`torchshear family`: prune a model for several latencies into a folder."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import torchshear
from torchshear._pictures import has_matplotlib
from torchshear.cli._example import Target, find_object, load_example
from torchshear.cli._folder import Force, folder_name, output_folder
from torchshear.cli._shared_options import CRITERIA, EVERY, Provider, Runtime, parse_align, takes_choice
from torchshear.cli._terminal import print_lines, status, stdout_console
from torchshear.errors import ArgumentError
from torchshear.family._files import write_onnx
from torchshear.family._record import render_family
from torchshear.speedup.latency import Device
from torchshear.speedup.latency._device import ONNXRUNTIME
from torchshear.speedup.onnx._session import CPU

_OTHERS: Final = ("scope", "normalize", "target_latency")
_CHOICE: Final = tuple(name for name in EVERY if name not in _OTHERS)
_EVALUATE: Final = "a function of a model that gives a number, the higher the better"


@takes_choice(*_CHOICE)
def family(  # noqa: PLR0913 - options of the command line, given by name
    target: Target,
    targets: Annotated[
        list[str],
        typer.Option(
            metavar="AMOUNT[,AMOUNT...]",
            help="Latencies that may be left: shares of the dense model's, or milliseconds, as 0.7,0.5,3.5ms; once or "
            "more. Measured on this machine, with --threads and --batch.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            parser=folder_name, metavar="FOLDER", help="Folder for the results: new, empty, or of an earlier run."
        ),
    ],
    evaluate: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FUNCTION", help=f"Scores the members: {_EVALUATE}."),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"How channels are scored: {CRITERIA}. Default: reconstruction with --compensate refit; else l1.",
        ),
    ] = None,
    align: Annotated[
        str, typer.Option(help="Widths that the device runs well: auto (this CPU), a profile, a number, or none.")
    ] = "auto",
    min_width: Annotated[int, typer.Option(help="Fewest channels to keep in a group.")] = 1,
    runtime: Runtime = ONNXRUNTIME,
    provider: Provider = CPU,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    batch: Annotated[int, typer.Option(help="Samples of one inference.")] = 1,
    force: Force = False,
    *,
    choice: dict[str, Any],
) -> None:
    """Prune a model for several latencies: one table, one set of scores, one member for each target.

    Writes family.json, family.txt, dense.onnx and, if matplotlib is installed, family.png; and for each member, by its
    target, plan-0.5.json, model-0.5.safetensors and pruned-0.5.onnx. Models that cannot be exported have no ONNX file,
    which needs --runtime torch. A folder that holds anything else is refused.
    """
    device = Device(threads=threads, batch=batch, runtime=runtime, provider=provider)
    model, args, kwargs = load_example(target)
    asked = [_number(text) for texts in targets for text in texts.split(",") if text.strip()]
    score = None if evaluate is None else _load_evaluate(evaluate)
    with output_folder(output, "family", force) as draft, status("tracing") as say:
        if "data" in choice:
            choice["data"].say = say
        found = torchshear.prune_family(
            model,
            args,
            kwargs,
            targets=asked,
            evaluate=score,
            criterion=criterion,
            align=parse_align(align),
            min_width=min_width,
            device=device,
            progress=lambda done, total, what: say(f"{what} ({done} of {total} done)"),
            **choice,
        )
        say("writing")
        found.save(draft)
        write_onnx(model, draft / "dense.onnx", args, kwargs, device)
        document = {"torchshear": version("torchshear"), "target": target} | found.to_dict()
        (draft / "family.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console = stdout_console()
    console.print(render_family(found, console.width), soft_wrap=True)
    names = " and ".join(filter(None, ("family.json, family.txt", "family.png" if has_matplotlib() else "")))
    print_lines(console, f"\nwritten     in {output}: {names}, dense.onnx; plan, model and ONNX file of each member")
    if not has_matplotlib():
        print_lines(console, "no picture  matplotlib is not installed; install torchshear[demo]")


def _number(text: str) -> float | str:
    """Return a share as a number, and anything else as it stands."""
    try:
        return float(text)
    except ValueError:
        return text.strip()


def _load_evaluate(name: str) -> Any:
    found = find_object(name, "function", _EVALUATE)
    if not callable(found):
        raise ArgumentError(f"{name} is of type {type(found).__name__}. Expected {_EVALUATE}.")
    return found
