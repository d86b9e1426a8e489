"""The command line: inspect channel groups, prune, compare criteria, search widths, shrink checkpoints, time files."""

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from torchshear.cli._bench import bench
from torchshear.cli._compare import compare
from torchshear.cli._example import load_example
from torchshear.cli._family import family
from torchshear.cli._inspect import inspect
from torchshear.cli._prune import prune
from torchshear.cli._search import search, search_worker
from torchshear.cli._shared_options import name_flags
from torchshear.cli._shrink import shrink
from torchshear.errors import TorchshearError

__all__ = ["app", "load_example", "main"]


class _Commands(TyperGroup):
    """Commands whose failures end as one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; print an error of the library, without traceback."""
        try:
            return super().invoke(ctx)
        except TorchshearError as error:
            typer.echo(f"error: {name_flags(' '.join(str(error).split()))}", err=True)
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


app.command()(inspect)
app.command()(prune)
app.command()(family)
app.command()(compare)
app.command()(search)
app.command("search-worker")(search_worker)
app.command()(shrink)
app.command()(bench)


def main() -> None:
    """Run the command line."""
    app()
