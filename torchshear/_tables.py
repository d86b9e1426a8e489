"""Cells of tables for the terminal."""

import re
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.text import Text

_BREAKS = re.compile(r"(?<=[\s./])")


class Cell:
    """Text that is wrapped at spaces, and in names and paths after a dot or slash; words are broken only at need."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        pieces = [piece.strip() for piece in _BREAKS.split(self.text)]
        longest = max(map(len, pieces))
        return Measurement(longest, max(map(len, self.text.splitlines()), default=0)).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        lines = [line for whole in self.text.splitlines() for line in _wrapped(whole, options.max_width)]
        yield Text("\n".join(lines), overflow="fold")


def _wrapped(line: str, width: int) -> Iterator[str]:
    """The lines into which one goes."""
    taken = ""
    for piece in _BREAKS.split(line):
        if taken and len(taken) + len(piece.rstrip()) > width:
            yield taken.rstrip()
            taken = ""
        taken += piece
    yield taken.rstrip()
