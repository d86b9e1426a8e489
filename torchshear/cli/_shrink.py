"""`torchshear shrink`: apply a plan to a checkpoint on disk."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import torchshear
from torchshear.cli._folder import folder_name
from torchshear.cli._terminal import print_lines, stdout_console


class _Unknown(StrEnum):
    refuse = "refuse"
    copy = "copy"
    drop = "drop"


def shrink(
    plan: Annotated[Path, typer.Argument(help="The plan, as saved by PruningPlan.save or `torchshear prune`.")],
    source: Annotated[Path, typer.Argument(help="Folder of the unpruned checkpoint, in safetensors.")],
    destination: Annotated[
        Path, typer.Argument(parser=folder_name, help="Folder for the result; new, empty, or of a run cut short.")
    ],
    unknown: Annotated[
        _Unknown, typer.Option(help="What to do with tensors that the plan does not know.")
    ] = _Unknown.refuse,
) -> None:
    """Apply a plan to a checkpoint, tensor by tensor, without holding the model. Call again after an interruption.

    Writes shards with the names of the source's, their index, plan.json, and copies of the small text files;
    config.json stays that of the unpruned model. In Python: small = torchshear.shrink(Model(config),
    PruningPlan.load("plan.json")), which may be on the meta device, then small.load_state_dict(..., assign=True).
    """
    result = torchshear.shrink_checkpoint(plan, source, destination, unknown.value)
    console = stdout_console()
    before, after = result.n_params
    print_lines(console, f"parameters  {before:,} -> {after:,} ({after / before:.1%} left)")
    found = f", of which {len(result.resumed)} were finished already" if result.resumed else ""
    print_lines(console, f"written     in {result.folder}: {len(result.shards)} files of tensors{found}")
    for what, names in (("unknown", result.unknown), ("missing", result.missing)):
        if names:
            print_lines(console, f"{what:<12}{', '.join(names)}")
