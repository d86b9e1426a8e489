"""Result of `prune_family`: members, their times, a table and a picture."""

import io
import json
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from torchshear._arguments import quote
from torchshear._making import PruneResult
from torchshear._pictures import has_matplotlib, picture_path, save_picture
from torchshear._tables import html_lines, html_table
from torchshear.errors import ArgumentError
from torchshear.family._files import write_member
from torchshear.family._picture import Mark, draw_family
from torchshear.latency_target import LatencyAllocation
from torchshear.speedup.latency import LatencyTable
from torchshear.speedup.latency._comparison import LatencyComparison
from torchshear.storage._writing import atomic_path, whole_folder

_INTERVAL: Final = "95% interval"
_HEADINGS: Final = ("target", "ms", "of dense", "speed-up", _INTERVAL, "MACs", "params", "loss")
_WIDE: Final = 96  # columns of a terminal from which on the interval has room
_DENSE: Final = "dense"


@dataclass(frozen=True, slots=True, eq=False)
class PrunedFamily:
    """One model pruned for several latencies.

    Attributes:
        model: name of the model's class.
        targets: latencies that were asked for, as they were given.
        members: a result for each target, in the same order; `family[0.5]` is that of the target 0.5.
        latency: times of the dense model ("dense") and of all members, by the names of their targets ("0.5", "3.5ms"),
            measured in the same rounds.
        table: the table that widths were chosen by; can be given as `device` to another call.
        dense_score: score of the dense model; None without `evaluate`.
        scores: scores of the members; empty without `evaluate`.
    """

    model: str
    targets: tuple[float | str, ...]
    members: tuple[PruneResult, ...]
    latency: LatencyComparison
    table: LatencyTable
    dense_score: float | None = None
    scores: tuple[float, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members, as "0.5" and "3.5ms"."""
        return tuple(name for name in self.latency.results if name != _DENSE)

    def __getitem__(self, target: float | str) -> PruneResult:
        by_target = dict(zip(self.targets, self.members, strict=True)) | dict(
            zip(self.names, self.members, strict=True)
        )
        if not isinstance(target, int | float | str) or target not in by_target:
            raise ArgumentError(f"no member for the target {quote(target)}; there are {', '.join(self.names)}.")
        return by_target[target]

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks, one sentence each: on the table, on members that missed their target or are not faster."""
        notes = list(self.table.notes)
        for name, member in zip(self.names, self.members, strict=True):
            notes += [f"{name}: {note}" for note in _allocation(member).notes if note not in self.table.notes]
            if not self.latency.is_faster(name):
                notes.append(f"{name}: not measurably faster than the dense model.")
            better = self._dominating(name)
            if better:
                notes.append(f"{name}: {better} is faster and no worse.")
        return tuple(notes)

    def _dominating(self, name: str) -> str:
        """Name a member that is faster and scores as well at least, or "" if there is none."""
        scored = dict(zip(self.names, self.scores, strict=False))
        better = (
            other
            for other, score in scored.items()
            if score >= scored[name] and self.latency[other].median_ms < self.latency[name].median_ms
        )
        return next(better, "")

    def to_dict(self) -> dict[str, Any]:
        """Return the family as plain data, without the tensors."""
        dense = self.latency[_DENSE]
        return {
            "model": self.model,
            "device": _allocation(self.members[0]).to_dict()["device"],
            "runtime": self.latency.runtime,
            "cpu": self.latency.cpu,
            "dense": {
                "latency_ms": dense.median_ms,
                "interval_ms": list(dense.interval_ms),
                "times_ms": list(dense.times_ms),
                "score": self.dense_score,
            },
            "members": [self._member(number) for number in range(len(self.members))],
            "notes": list(self.notes),
        }

    def _member(self, number: int) -> dict[str, Any]:
        name, member = self.names[number], self.members[number]
        times = self.latency[name]
        return {
            "target": self.targets[number],
            "name": name,
            "latency_ms": times.median_ms,
            "interval_ms": list(times.interval_ms),
            "times_ms": list(times.times_ms),
            "speedup": self.latency.speedup(name),
            "speedup_interval": list(self.latency.speedup_interval(name)),
            "is_faster": self.latency.is_faster(name),
            "score": self.scores[number] if self.scores else None,
            "form": member.form,
            "report": member.report.to_dict(),
            "allocation": _allocation(member).to_dict(),
        }

    def to_json(self) -> str:
        """Return `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw measured latency against what is lost, and against the scores where there are any.

        Marks are the members, with the interval of their medians, joined by a line from the dense model; faint ones are
        all other widths that were measured on the way. Dotted lines are the targets.

        Args:
            path: the file to write, of the kind that its name ends in: .png, .svg or .pdf.

        Raises:
            ArgumentError: matplotlib is not installed, or the name ends otherwise.
            OutputError: the file cannot be written; what was there before is unchanged.
        """
        place = picture_path(path)
        save_picture(self._figure(), place)

    def _figure(self) -> Any:
        dense = self.latency[_DENSE]
        marks = [Mark(_DENSE, dense.median_ms, dense.interval_ms, 1.0, 0.0, self.dense_score)]
        tried = []
        for number, (name, member) in enumerate(zip(self.names, self.members, strict=True)):
            found, times = _allocation(member), self.latency[name]
            score = self.scores[number] if self.scores else None
            marks.append(Mark(name, times.median_ms, times.interval_ms, found.target_share, found.loss, score))
            tried += [(one.measured_share * dense.median_ms, one.loss) for one in found.rounds]
        return draw_family(f"{self.model} on {self._where()}", marks, tried)

    def _where(self) -> str:
        threads = f"{self.latency.threads} thread{'s' * (self.latency.threads > 1)}"
        return f"{self.latency.runtime}, {threads}, batch {self.latency.batch}"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the family into a new or empty folder, as a whole or not at all.

        For each member NAME: plan-NAME.json, model-NAME.safetensors and pruned-NAME.onnx, which may be missing where
        the runtime is torch and the member cannot be exported; and family.json, family.txt
        and, if matplotlib is installed, family.png.

        Raises:
            OutputError: the folder holds something, or cannot be written.
            ExportError: a member cannot be exported, and the runtime is onnxruntime.
        """
        with whole_folder(folder) as draft:
            for name, member in zip(self.names, self.members, strict=True):
                write_member(member, draft, name, self.table.device)
            for name, text in (("family.json", self.to_json()), ("family.txt", str(self))):
                with atomic_path(draft / name) as temporary:
                    temporary.write_text(text + "\n", encoding="utf-8")
            if has_matplotlib():
                self.draw(draft / "family.png")

    def __str__(self) -> str:
        """Return the family as a table, with remarks below it."""
        return render_family(self)

    def __repr__(self) -> str:
        return f"<PrunedFamily of {self.model}: {', '.join(self.names)}>"

    def _repr_html_(self) -> str:
        return html_table(_title(self), _headings(self), _rows(self), ()) + html_lines(self.notes)


def _allocation(member: PruneResult) -> LatencyAllocation:
    assert member.allocation is not None, "every member has a target of latency"
    return member.allocation


def render_family(family: PrunedFamily, width: int = 100) -> str:
    """Write a family as text: a table, with remarks below it.

    Args:
        family: the family.
        width: columns of the terminal.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, highlight=False)
    table = Table(title=_title(family), title_justify="left")
    headings = _headings(family)
    shown = [number for number in range(len(headings)) if width >= _WIDE or headings[number] != _INTERVAL]
    for number in shown:
        table.add_column(headings[number], justify="right" if number else "left", no_wrap=True)
    for row_number, row in enumerate(_rows(family)):
        table.add_row(*(row[number] for number in shown), end_section=row_number == 0)
    console.print(table)
    for note in family.notes:
        for part in textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False):
            console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def _title(family: PrunedFamily) -> str:
    return f"{family.model}, {family._where()}"


def _headings(family: PrunedFamily) -> tuple[str, ...]:
    return (*_HEADINGS, "score") if family.scores else _HEADINGS


def _rows(family: PrunedFamily) -> Iterator[tuple[str, ...]]:
    """Return the cells of the dense model, then of each member."""
    dense = family.latency[_DENSE].median_ms
    score = () if family.dense_score is None else (f"{family.dense_score + 0.0:.4g}",)
    yield (_DENSE, f"{dense:.3f}", "100.0%", "1.00", "", "100.0%", "100.0%", "0", *score)
    for number, (name, member) in enumerate(zip(family.names, family.members, strict=True)):
        ms, report = family.latency[name].median_ms, member.report
        low, high = family.latency.speedup_interval(name)
        yield (
            name,
            f"{ms:.3f}",
            f"{ms / dense:.1%}",
            f"{family.latency.speedup(name):.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{report.after.macs / max(report.before.macs, 1):.1%}",
            f"{report.after.n_params / max(report.before.n_params, 1):.1%}",
            f"{_allocation(member).loss:.3g}",
            *([f"{family.scores[number] + 0.0:.4g}"] if family.scores else []),
        )
