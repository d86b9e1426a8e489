"""Record of a search: every trial, the best result, a table and a picture."""

import io
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from torchshear._making import PruneResult
from torchshear._tables import Cell, html_lines, html_table
from torchshear.searching._picture import draw_trials
from torchshear.searching._trial import SearchTrial

_MOST_ROWS = 30
_WORDS = {"macs": "MACs", "params": "parameters"}
_HEADINGS = ("trial", "score", "budget", "s", "what")


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """Result of a search.

    Attributes:
        result: the pruned model of the best trial within the budget, proved, with its plan and report.
        trials: every candidate that was evaluated, in the order of the search.
        best: the trial of the result.
        method: name of the method.
        targets: what may be left of each bounded resource, as a share of the dense model's.
        seed: seed of the search.
        final_score: score of the result after `finetune_best`; None without.
        n_reused: proposals whose score was known from a trial of equal widths.
        seconds: how long the search took, in this process.
        notes: remarks, one sentence each.
    """

    result: PruneResult
    trials: tuple[SearchTrial, ...]
    best: SearchTrial
    method: str
    targets: Mapping[str, float]
    seed: int
    final_score: float | None = None
    n_reused: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all but the model as plain data for JSON."""
        trials = [asdict(one) | {"widths": dict(one.widths), "budget": dict(one.budget)} for one in self.trials]
        return {
            "method": self.method,
            "targets": dict(self.targets),
            "seed": self.seed,
            "best": self.best.number,
            "final_score": self.final_score,
            "trials": trials,
            "n_reused": self.n_reused,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the scores of all trials in their order, and the best within the budget so far.

        Args:
            path: the file to write, of the kind that its name ends in: .png, .svg or .pdf.

        Raises:
            ArgumentError: matplotlib is not installed, or the name ends otherwise.
            OutputError: the file cannot be written; what was there before is unchanged.
        """
        draw_trials(self.title, self.trials, path)

    @property
    def title(self) -> str:
        """Heading of the table and the picture."""
        asked = ", ".join(f"{share:.1%} of the {_WORDS.get(name, name)}" for name, share in self.targets.items())
        return f"Search by {self.method} for at most {asked}"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None, markup=False, highlight=False)
        table = Table(title=self.title, title_justify="left")
        for heading in _HEADINGS:
            table.add_column(heading, justify="left" if heading == "what" else "right")
        for row in self._rows():
            table.add_row(*map(Cell, row))
        console.print(table)
        for line in self._lines():
            console.print(line, soft_wrap=True)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())

    def __repr__(self) -> str:
        return f"<SearchResult by {self.method}: {len(self.trials)} trials, best score {self.best.score:.6g}>"

    def _repr_html_(self) -> str:
        return html_table(self.title, _HEADINGS, self._rows()) + html_lines(self._lines())

    def _rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the best trials and of the last ones, in the order of the search."""
        best = sorted(self.trials, key=lambda one: (not one.is_within, one.state != "complete", -(one.score or 0.0)))
        shown = {one.number for one in (*best[: _MOST_ROWS // 2], *self.trials[-_MOST_ROWS // 2 :])} | {
            self.best.number
        }
        return [_row(one, one.number == self.best.number) for one in self.trials if one.number in shown]

    def _lines(self) -> list[str]:
        counts = {word: sum(one.state == word for one in self.trials) for word in ("failed", "stopped")}
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        failed += f", {counts['stopped']} given up early" if counts["stopped"] else ""
        reused = f"; {self.n_reused} more were known by their widths" if self.n_reused else ""
        before, after = self.result.report.before, self.result.report.after
        return [
            f"{len(self.trials)} trials{failed}{reused}; {self.seconds:.1f} s",
            f"best: trial {self.best.number} with a score of {self.best.score:.6g}; parameters {before.n_params:,} -> "
            f"{after.n_params:,}, MACs {before.macs:,} -> {after.macs:,}",
            *([] if self.final_score is None else [f"trained on, it has a score of {self.final_score:.6g}"]),
            *self.notes,
        ]


def _row(trial: SearchTrial, is_best: bool) -> tuple[str, ...]:
    score = "failed" if trial.score is None else f"{trial.score:.5g}"
    score = f"({score})" if trial.state == "stopped" else score
    budget = ", ".join(f"{share:.1%}" for share in trial.budget.values())
    said = f"{trial.label}: {trial.error}" if trial.error else trial.label
    return (
        f"{trial.number}{' *' if is_best else ''}",
        score,
        budget if trial.is_within else f"({budget})",
        f"{trial.seconds:.2f}",
        said,
    )
