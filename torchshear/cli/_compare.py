"""`torchshear compare`: prune a model by several criteria at the same budget, and score what comes out."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from torchshear._pictures import has_matplotlib
from torchshear.cli._example import EvaluatedTarget, load_evaluated
from torchshear.cli._folder import Force, folder_name, output_folder
from torchshear.cli._shared_options import CRITERIA, parse_align, takes_choice
from torchshear.cli._terminal import print_lines, status, stdout_console
from torchshear.comparison import compare as compare_criteria
from torchshear.comparison._record import render_comparison

_ASKED: Final = (
    "scope",
    "min_ratio",
    "max_ratio",
    "group_reduction",
    "normalize",
    "roles",
    "exclude",
    "prunable_outputs",
    "submodules",
)
_SIGHT: Final = ("data", "loss_fn", "batches", "compensate", "memory")
_Numbers = list[float] | None


@takes_choice(*_ASKED, *_SIGHT)
def compare(  # noqa: PLR0913 - options, given by name
    target: EvaluatedTarget,
    criteria: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"Criterion to compare, of {CRITERIA}; once or more. Default: all that can score."
        ),
    ] = None,
    target_macs: Annotated[
        _Numbers, typer.Option(metavar="AMOUNT", help="MACs that may be left: a share, or a number; once or more.")
    ] = None,
    target_params: Annotated[
        _Numbers, typer.Option(metavar="AMOUNT", help="Parameters that may be left, in place of MACs; likewise.")
    ] = None,
    ratio: Annotated[
        _Numbers, typer.Option(metavar="SHARE", help="Share of each group to remove, in place of MACs; likewise.")
    ] = None,
    align: Annotated[
        str, typer.Option(help="Widths that the device runs well: auto (this CPU), a profile, a number, or none.")
    ] = "none",
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", metavar="N", help="Seed of random channels; once or more: 0, 1, 2.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=folder_name, metavar="FOLDER", help="Folder for the table and a picture: new, empty, or of a run."
        ),
    ] = None,
    force: Force = False,
    *,
    choice: dict[str, Any],
) -> None:
    """Compare criteria: prune by each of them at the same budgets (half of the MACs, if none is given), and score.

    Two controls are always there: random channels, and uniformly narrower layers that keep their first channels. With
    --output, writes comparison.json, comparison.txt and, if matplotlib is installed, comparison.png.
    """
    (model, args, kwargs), evaluate = load_evaluated(target)
    budgets = {"target_macs": target_macs, "target_params": target_params, "ratio": ratio}
    words = choice | {word: values for word, values in budgets.items() if values} | {"align": parse_align(align)}
    with status("comparing") as say:
        if "data" in choice:
            choice["data"].say = say
        found = compare_criteria(
            model,
            evaluate,
            args,
            kwargs,
            criteria=criteria or None,
            seeds=seeds or (0, 1, 2),
            progress=lambda done, total, what: say(f"{what} ({done} of {total} done)"),
            **words,
        )
    console = stdout_console()
    console.print(render_comparison(found, console.width), soft_wrap=True)
    if output is None:
        return
    with output_folder(output, "compare", force) as draft:
        document = {"torchshear": version("torchshear"), "target": target} | found.to_dict()
        (draft / "comparison.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        (draft / "comparison.txt").write_text(render_comparison(found) + "\n", encoding="utf-8")
        if has_matplotlib():
            found.draw(draft / "comparison.png")
        names = ", ".join(sorted(file.name for file in draft.iterdir()))
    print_lines(console, f"\nwritten     in {output}: {names}")
    if not has_matplotlib():
        print_lines(console, "no picture  matplotlib is not installed; install torchshear[demo]")
