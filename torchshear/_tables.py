"""Tables and lists for the terminal and for notebooks."""

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.text import Text

_BREAKS = re.compile(r"(?<=[\s./])")
_MOST_REASONS = 12
_MOST_NAMES = 4


class Cell:
    """Text that is wrapped at spaces, and in names and paths after a dot or slash; words are broken only at need."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        pieces = [piece.strip() for piece in _BREAKS.split(self.text)]
        longest = max(map(len, pieces))
        return Measurement(longest, max(map(len, self.text.splitlines()), default=0)).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        lines = [line for whole in self.text.splitlines() for line in _wrap(whole, options.max_width)]
        yield Text("\n".join(lines), overflow="fold")


def _wrap(line: str, width: int) -> Iterator[str]:
    """Wrap a line to a width."""
    taken = ""
    for piece in _BREAKS.split(line):
        if taken and len(taken) + len(piece.rstrip()) > width:
            yield taken.rstrip()
            taken = ""
        taken += piece
    yield taken.rstrip()


def html_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]], lines: Iterable[str] = ()) -> str:
    """Return a table as HTML for a notebook; all text in it is escaped.

    Args:
        title: caption of the table.
        headings: heading of each column.
        rows: cells of each row; numbers stand on the right.
        lines: lines of text below the table.
    """

    def cell(value: object) -> str:
        is_number = str(value)[:1].isdigit() or str(value)[:1] == "-"
        side = "right" if is_number else "left"
        return f'<td style="text-align: {side}">{escape(str(value))}</td>'

    head = "".join(f'<th style="text-align: left">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    caption = f'<caption style="text-align: left"><b>{escape(title)}</b></caption>'
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{html_lines(lines)}"


def html_lines(lines: Iterable[str]) -> str:
    """Return lines of text as HTML in which columns stay below one another."""
    return "".join(f'<pre style="white-space: pre-wrap; margin: 0">{escape(line)}</pre>' for line in lines)


def kind_of_reason(reason: str) -> str:
    """Strip from a reason the operator and the line that it ends with."""
    return reason.partition(": ")[0]


def lines_by_reason(heading: str, reasons: Iterable[tuple[str, str]], where: str) -> list[str]:
    """List names by reason, with how many there are of each.

    Args:
        heading: line above, without the count.
        reasons: pairs (name, reason).
        where: attribute that has all of them.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for name, reason in reasons:
        found.setdefault(kind_of_reason(reason), []).append((name, reason))
    lines = [f"{heading} ({sum(map(len, found.values()))}):"]
    for alike in list(found.values())[:_MOST_REASONS]:
        more = f" and {len(alike) - _MOST_NAMES} more" if len(alike) > _MOST_NAMES else ""
        lines.append(f"  {len(alike)} x {alike[0][1]}")
        lines.append(f"      {', '.join(name for name, _ in alike[:_MOST_NAMES])}{more}")
    if len(found) > _MOST_REASONS:
        lines.append(f"  ... and {len(found) - _MOST_REASONS} more reasons, in {where}")
    return lines
