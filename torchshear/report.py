"""The report of a pruning: what was asked, what was done, group by group, and what could not be done and why."""

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from torchshear.dependency import ChannelGroup, Cut, PruningPlan, dense_cost
from torchshear.graph import Cost


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One channel group in a report.

    Attributes:
        name: name of the group.
        width: units before.
        kept: units after.
        is_mixed: whether a norm, softmax or mean runs over the units.
        members: number of parameter dimensions that shrink with it.
        note: why it kept more or other than asked, or "".
        where: operators that use it, with module and source line.
    """

    name: str
    width: int
    kept: int
    is_mixed: bool
    members: int
    note: str
    where: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PruningReport:
    """What a plan asks of a model and what it does to it.

    Attributes:
        requested_ratio: fraction of units that was to go, or None if units were given.
        achieved_ratio: fraction of units that goes, over the groups that can shrink; 0 if there are none.
        before: parameters and MACs of one sample of the dense model.
        after: the same of the pruned model.
        groups: all channel groups.
        refused: group or "parameter[dimension]" -> why it cannot shrink.
        form: "native" or "traced", and why, once the model is shrunk; else "".
    """

    requested_ratio: float | None
    achieved_ratio: float
    before: Cost
    after: Cost
    groups: tuple[GroupReport, ...]
    refused: dict[str, str]
    form: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table for people."""
        return render_report(self)


def make_report(plan: PruningPlan, form: str = "") -> PruningReport:
    """Put a report together from a plan made in this process.

    Args:
        plan: a plan with its analysis.
        form: form of the shrunk model and the reason for it.
    """
    groups = plan.analysis
    assert groups is not None, "a plan that was loaded has no analysis"
    cut = Cut(groups, plan.kept)
    rows = tuple(
        _row(group, plan_of.kept.size, plan_of.note) for group, plan_of in zip(groups, plan.groups, strict=True)
    )
    total = sum(group.width for group in groups.prunable)
    ratio = plan.request.get("ratio")
    return PruningReport(
        requested_ratio=float(ratio) if ratio is not None else None,
        achieved_ratio=plan.n_cut / total if total else 0.0,
        before=dense_cost(groups.graph),
        after=cut.cost(),
        groups=rows,
        refused=dict(plan.refused),
        form=form,
    )


def _row(group: ChannelGroup, kept: int, note: str) -> GroupReport:
    return GroupReport(group.name, group.width, kept, group.is_mixed, len(group.members), note, group.where)


def render_report(report: PruningReport, width: int = 120) -> str:
    """A report as text.

    Args:
        report: the report.
        width: columns of the terminal.
    """
    table = Table(title="Channel groups", title_justify="left")
    for heading, justify in (
        ("group", "left"),
        ("before", "right"),
        ("after", "right"),
        ("kept", "right"),
        ("note", "left"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for group in report.groups:
        note = group.note or ("norm, softmax or mean over it" if group.is_mixed else "")
        table.add_row(group.name, str(group.width), str(group.kept), f"{group.kept / group.width:.0%}", note)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    console.print(_summary(report), highlight=False, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _summary(report: PruningReport) -> str:
    asked = "given units" if report.requested_ratio is None else f"{report.requested_ratio:.1%} requested"
    lines = [
        f"channels    {report.achieved_ratio:.1%} removed ({asked})",
        _line("parameters", report.before.n_params, report.after.n_params),
        _line("MACs", report.before.macs, report.after.macs),
    ]
    if report.form:
        lines.append(f"form        {report.form}")
    if report.refused:
        lines.append(f"cannot shrink ({len(report.refused)}):")
        lines += [f"  {name}: {reason}" for name, reason in list(report.refused.items())[:12]]
        if len(report.refused) > 12:
            lines.append(f"  ... and {len(report.refused) - 12} more, in .refused")
    return "\n".join(lines)


def _line(label: str, before: int, after: int) -> str:
    share = f" ({after / before:.1%} left)" if before else ""
    return f"{label:<11} {before:,} -> {after:,}{share}"
