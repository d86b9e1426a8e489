"""`torchshear search` and `search-worker`: widths found by trying, by any number of processes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from safetensors.torch import save_model
from torch import nn

import torchshear
from torchshear.cli._example import EvaluatedTarget, find_object, kind_of, load_evaluated
from torchshear.cli._folder import Force, folder_name, output_folder
from torchshear.cli._shared_options import CRITERIA, parse_align, read_choice, takes_choice
from torchshear.cli._terminal import print_lines, status, stdout_console
from torchshear.errors import ArgumentError
from torchshear.report import render_report
from torchshear.searching._early_stopping import EARLY
from torchshear.searching._picture import has_matplotlib
from torchshear.searching._request import SearchRequest, find_method
from torchshear.searching._search import start_search
from torchshear.searching._storage import open_study
from torchshear.searching.methods import METHODS
from torchshear.storage._writing import atomic_path

_ASKED: Final = (
    *("ratio", "target_macs", "target_params", "target_latency", "min_ratio", "max_ratio", "group_reduction", "roles"),
    *("exclude", "prunable_outputs", "submodules", "data", "loss_fn", "batches", "compensate", "memory", "form"),
)
_COMMAND: Final = "command"  # attribute of the study
_STORAGE_HELP: Final = "journal://FILE, the URL of a database, as sqlite:///search.db, or grpc://HOST:PORT"


@dataclass(frozen=True, slots=True)
class _Named:
    """Options of a search as they are written, from which a worker makes the same search."""

    target: str
    method: str
    finetune: str | None
    finetune_best: str | None
    stop_early: str | None
    reuse_activations: bool
    criterion: str | None
    align: str
    min_width: int
    trials: int | None
    seed: int
    said: Mapping[str, Any]

    @classmethod
    def of(cls, attribute: Any) -> "_Named":
        """Read what a storage names.

        Raises:
            ArgumentError: it names no search of the command line.
        """
        try:
            return cls(**attribute)
        except TypeError as error:
            raise ArgumentError(
                "the storage was not started by torchshear search, so that it names no model; run the Python program "
                "that started it once more instead, which joins its search."
            ) from error

    def load(self) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any], dict[str, Any]]:
        """Import what is named; gives the model, its example and the keywords of `torchshear.search`."""
        (model, args, kwargs), evaluate = load_evaluated(self.target)
        words: dict[str, Any] = {"evaluate": evaluate, "method": self.method, "seed": self.seed}
        expected = "a function that trains a model in place, or returns the trained one"
        for word, named in (("finetune", self.finetune), ("finetune_best", self.finetune_best)):
            if named is not None:
                words[word] = find_object(named, "function", expected)
                if not callable(words[word]):
                    raise ArgumentError(f"{named} is {kind_of(words[word])}. Expected {expected}.")
        words |= {
            "stop_early": self.stop_early,
            "reuse_activations": self.reuse_activations,
            "criterion": self.criterion,
            "align": parse_align(self.align),
            "min_width": self.min_width,
        }
        return model, args, kwargs, words | {"trials": self.trials} | read_choice(self.said)


@takes_choice(*_ASKED)
def search(  # noqa: PLR0913 - options of the command line, given by name
    target: EvaluatedTarget,
    method: Annotated[str, typer.Option(metavar="NAME", help=f"How widths are sought: {', '.join(METHODS)}.")] = (
        "netadapt"
    ),
    finetune: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FUNCTION",
            help="Function that trains a candidate before it is scored. Default: none.",
        ),
    ] = None,
    finetune_best: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FUNCTION",
            help="Function that trains the best candidate on when the search is over. Default: none.",
        ),
    ] = None,
    stop_early: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Give candidates up by the scores that they yield on the way: {', '.join(EARLY)}. Default: none is.",
        ),
    ] = None,
    reuse_activations: Annotated[
        bool, typer.Option(help="Compute activations once that candidates have in common; they must only be run.")
    ] = False,
    criterion: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"How channels of a group are chosen: {CRITERIA}.")
    ] = None,
    align: Annotated[
        str, typer.Option(help="Widths that the device runs well: auto (this CPU), a profile, a number, or none.")
    ] = "none",
    min_width: Annotated[int, typer.Option(help="Fewest channels to keep in a group.")] = 1,
    trials: Annotated[
        int | None, typer.Option(metavar="N", help="Candidates that may be evaluated. Default: what the method needs.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the method.")] = 0,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help=f"Where trials are kept, and workers find them: {_STORAGE_HELP}."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=folder_name, metavar="FOLDER", help="Folder for the results: new, empty, or of an earlier run."
        ),
    ] = None,
    force: Force = False,
    *,
    choice: dict[str, Any],
    said: dict[str, Any],
) -> None:
    """Search the width of every channel group within a budget, by trying: prune, evaluate, learn.

    With --storage it goes on where it was stopped, and other processes share the work: torchshear search-worker URL.
    With --output, writes plan.json, model.safetensors, search.json, search.txt and, if matplotlib is installed,
    search.png. The result in Python: small = torchshear.shrink(Model(), PruningPlan.load("plan.json")), then
    safetensors.torch.load_model(small, "model.safetensors").
    """
    del choice  # read from what was said, as a worker does
    named = _Named(
        target, method, finetune, finetune_best, stop_early, reuse_activations, criterion, align, min_width, trials,
        seed, said,
    )  # fmt: skip
    find_method(method)
    model, args, kwargs, words = named.load()
    if storage is not None:
        study = open_study(storage)
        if _COMMAND not in study.user_attrs:
            study.set_user_attr(_COMMAND, {name: getattr(named, name) for name in named.__slots__})
    with status("searching") as say:
        found = torchshear.search(model, args, kwargs, storage=storage, progress=_progress(say), **words)
    console = stdout_console()
    console.print(str(found), soft_wrap=True)
    print_lines(console, "")
    print_lines(console, render_report(found.result.report, console.width))
    if output is None:
        return
    with output_folder(output, "search", force) as draft:
        found.result.plan.save(draft / "plan.json")
        with atomic_path(draft / "model.safetensors") as temporary:
            save_model(found.result.model, str(temporary))
        document = {"torchshear": version("torchshear"), "target": target} | found.to_dict()
        (draft / "search.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        (draft / "search.txt").write_text(f"{found}\n", encoding="utf-8")
        if has_matplotlib():
            found.draw(draft / "search.png")
        names = ", ".join(sorted(file.name for file in draft.iterdir()))
    print_lines(console, f"\nwritten     in {output}: {names}")


def search_worker(
    storage: Annotated[str, typer.Argument(metavar="URL", help=f"Storage of a search: {_STORAGE_HELP}.")],
) -> None:
    """Share the work of a search that torchshear search has started with a storage, until it ends.

    The model is imported by the name that the storage holds, with the current folder importable: use storages of your
    own. A worker may be ended at any time; what it was at is done by another.
    """
    study = open_study(storage, must_exist=True)
    model, args, kwargs, words = _Named.of(study.user_attrs.get(_COMMAND)).load()
    request = SearchRequest(storage=storage, **words)
    with status("working") as say:
        running = start_search(request, model, args, kwargs, _progress(say))
        running.run(find_method(request.method), request.seed)
    print_lines(
        stdout_console(), f"done        {running.store.n_scored} of {len(running.trials)} trials were scored here"
    )


def _progress(say: Callable[[str], None]) -> Callable[[int, int, str], None]:
    return lambda done, total, what: say(f"{what} ({done} of {total} trials)" if total > done else f"{what} ({done})")
