"""Result of a comparison of criteria: plain data, a table and a picture."""

import io
import math
import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from torchshear._arguments import check_one_of
from torchshear._tables import Cell, html_lines, html_table
from torchshear.comparison._picture import draw_panels
from torchshear.comparison._row import Row, of_other_size
from torchshear.options import Compensation

_NONE = "-"
_SHORT, _WIDE = 12, 96  # characters of a cell, columns of a terminal: two longer cells fit wider ones only
_PLAIN = 5  # headings of a table without a compensation


@dataclass(frozen=True, slots=True)
class Comparison:
    """Criteria side by side.

    Attributes:
        model: name of the model's class.
        before: score of the dense model.
        budgets: what was to be left, in words, in the order asked.
        rows: a row for each criterion and control at each budget.
        seeds: seeds of the random control.
        n_batches: batches that statistics were collected on; 0 without data.
        seconds_collecting: time that this took, once for all criteria.
        left_out: criterion that was not compared -> what it lacks.
        compensation: the compensation after which models were scored once more, or "none".
    """

    model: str
    before: float
    budgets: tuple[str, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    n_batches: int = 0
    seconds_collecting: float = 0.0
    left_out: Mapping[str, str] = field(default_factory=dict)
    compensation: Compensation = "none"

    def ranked(self, budget: str) -> tuple[Row, ...]:
        """Return the rows of a budget, best score first, those without a score last.

        Raises:
            ArgumentError: `budget` is none of `budgets`.
        """
        check_one_of("budget", budget, self.budgets)
        rows = [row for row in self.rows if row.budget == budget]
        return tuple(sorted(rows, key=lambda row: (row.score is None, -(row.score or 0.0))))

    def row(self, criterion: str, budget: str) -> Row:
        """Return the row of a criterion or control.

        Raises:
            ArgumentError: there is none.
        """
        rows = {row.criterion: row for row in self.ranked(budget)}
        check_one_of("criterion", criterion, rows)
        return rows[criterion]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data for JSON."""
        return asdict(self)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw it: a panel for each budget, a line for each criterion, best first.

        Marks are scores after the cut, and after the compensation where there is one; whiskers go over the seeds of
        random channels, as does the band behind all criteria. A dashed line is the dense model.

        Args:
            path: the file to write, of the kind that its name ends in: .png, .svg or .pdf.

        Raises:
            ArgumentError: matplotlib is not installed, or the name ends otherwise.
            OutputError: the file cannot be written; what was there before is unchanged.
        """
        title = f"{self.model}: score by criterion, higher is better"
        panels = {budget: self.ranked(budget) for budget in self.budgets}
        draw_panels(title, self.before, panels, path, self.compensation)

    def __str__(self) -> str:
        """Return the comparison as text, a table for each budget."""
        return render_comparison(self)

    def __repr__(self) -> str:
        return f"<Comparison of {len(self.rows)} rows on {self.model}: {'; '.join(self.budgets)}>"

    def _repr_html_(self) -> str:
        tables = []
        for budget in self.budgets:
            headings, rows = _cells(self, budget)
            tables.append(html_table(f"{self.model}, {budget}", headings, rows, _notes(self, budget)))
        return "".join(tables) + html_lines(_summary(self))


def render_comparison(comparison: Comparison, width: int = 120) -> str:
    """Write a comparison as text: a table for each budget, with notes on its rows below.

    Args:
        comparison: the comparison.
        width: columns of the terminal.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, highlight=False)
    for budget in comparison.budgets:
        console.print(_table(comparison, budget, width))
        for line in _notes(comparison, budget):
            _print(console, line)
        console.print()
    for line in _summary(comparison):
        _print(console, line)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def _print(console: Console, line: str) -> None:
    for part in textwrap.wrap(line, console.width, subsequent_indent="  ", break_on_hyphens=False):
        console.print(part)


def _table(comparison: Comparison, budget: str, width: int) -> Table:
    headings, rows = _cells(comparison, budget)
    longest = max(len(text) for row in rows for text in row[3:-1])
    if len(headings) > _PLAIN and longest > _SHORT and width < _WIDE:
        rows = [tuple(text.replace(" ±", "\n±") for text in row) for row in rows]
    table = Table(title=f"{comparison.model}, {budget}", title_justify="left")
    table.add_column(headings[0])
    for heading in headings[1:]:
        is_long = len(heading) > _SHORT and width < _WIDE
        table.add_column(heading.replace(" ", "\n") if is_long else heading, justify="right", no_wrap=True)
    for number, (name, *texts) in enumerate(rows):
        table.add_row(Cell(name), *texts, end_section=number == 0)
    return table


def _cells(comparison: Comparison, budget: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headings of a budget's table, and its rows: the dense model, then each criterion."""
    found = comparison.ranked(budget)
    is_compensated = any(row.compensated for row in found)
    digits = _digits(comparison)
    second = [f"after {comparison.compensation}"] if is_compensated else []
    headings = ("criterion", "MACs", "params", "after cut", *second, "s")
    dense = [_number(comparison.before, digits)] * (1 + is_compensated)
    rows: list[tuple[str, ...]] = [("(before)", "100.0%", "100.0%", *dense, "")]
    for row in found:
        scores = [row.scores, row.compensated] if is_compensated else [row.scores]
        rows.append(
            (
                f"control: {row.criterion}" if row.is_control else row.criterion,
                _NONE if row.macs_share is None else f"{row.macs_share:.1%}",
                _NONE if row.params_share is None else f"{row.params_share:.1%}",
                *(_score(one, digits) for one in scores),
                _NONE if row.seconds is None else f"{row.seconds:.2f}",
            )
        )
    return headings, rows


def _digits(comparison: Comparison) -> int:
    """Decimals that show three digits of what scores differ by."""
    scores = [comparison.before, *(score for row in comparison.rows for score in (*row.scores, *row.compensated))]
    size = max(scores) - min(scores) or abs(scores[0])
    return min(8, max(0, 2 - math.floor(math.log10(size)))) if size else 0


def _number(score: float, digits: int) -> str:
    return f"{round(score, digits) + 0.0:.{digits}f}"  # no minus before a zero


def _score(scores: tuple[float, ...], digits: int) -> str:
    if not scores:
        return _NONE
    spread = f" ±{_number(stdev(scores), digits)}" if len(scores) > 1 else ""
    return f"{_number(fmean(scores), digits)}{spread}"


def _notes(comparison: Comparison, budget: str) -> Iterator[str]:
    rows = comparison.ranked(budget)
    digits = _digits(comparison)
    for row in rows:
        if row.reason:
            yield f"{row.criterion}: {row.reason}"
        elif row.note:
            yield f"{row.criterion}: {row.note}"
        if len(row.final) > 1:
            seeds = ", ".join(map(str, comparison.seeds))
            low, high = (_number(value, digits) for value in (min(row.final), max(row.final)))
            step = f"scores after {comparison.compensation}" if row.compensated else "scores"
            yield f"{row.criterion}: mean and standard deviation over seeds {seeds}; {step} from {low} to {high}"
    random = next((row.score for row in rows if row.criterion == "random"), None)
    worse = [row.criterion for row in rows if None not in (random, row.score) and not row.is_control]
    worse = [name for name in worse if (comparison.row(name, budget).score or 0.0) <= (random or 0.0)]
    other = [row.criterion for row in of_other_size(rows)]
    if other:
        yield f"not of the same size as the uniform network, and so not comparable with it: {', '.join(other)}"
    if worse:
        yield f"no better than random channels: {', '.join(worse)}"


def _summary(comparison: Comparison) -> Iterator[str]:
    yield (
        "Higher scores are better. Controls: random keeps channels drawn from a seed, uniform the first channels of "
        "each group, all groups narrower by the same share."
    )
    if comparison.n_batches:
        yield (
            f"Statistics of {comparison.n_batches} batches were collected once for all criteria, in "
            f"{comparison.seconds_collecting:.2f} s, which the times of rows leave out."
        )
    for reason in dict.fromkeys(comparison.left_out.values()):
        names = [name for name, why in comparison.left_out.items() if why == reason]
        yield f"Not compared: {', '.join(names)}: {reason}"
