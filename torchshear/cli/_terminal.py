"""Printing on the terminal: lines that fit it, and a line on the current step."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console


def stdout_console() -> Console:
    """Standard output, printed to as it stands: nothing of a name is taken for markup."""
    return Console(highlight=False, markup=False)


def print_lines(console: Console, text: str, indent: int = 12) -> None:
    """Print text, with lines that are too long broken at words and continued further in."""
    for line in text.splitlines():
        for part in textwrap.wrap(line, console.width, subsequent_indent=" " * indent, break_on_hyphens=False) or [""]:
            console.print(part)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being done; gives a function that changes the text."""
    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else nullcontext() as status:
        yield lambda now: status.update(now) if status else None
