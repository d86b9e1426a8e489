"""Report of a pruning, group by group: the request, the result, and reasons for what stayed."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from torchshear._tables import Cell, html_lines, html_table, kind_of_reason, lines_by_reason
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut, dense_cost, part_costs
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.graph import Cost
from torchshear.pruners.selection._size import most_bytes
from torchshear.speedup import LatencyComparison, Refit
from torchshear.speedup.compensation._refit_text import REFIT_HEADINGS, refit_lines, refit_rows, refit_title
from torchshear.speedup.latency._verdict import SpeedVerdict, speed_verdict

__all__ = ["PruningReport"]

_HEADINGS = ("group", "role", "before", "after", "kept", "note")
_NUMBERS = ("before", "after", "kept", "error before", "error after")


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One channel group in a report.

    Attributes:
        name: name of the group.
        width: units before.
        kept: units after.
        is_cross_channel: whether a norm, softmax or mean runs over the units.
        members: number of parameter dimensions that shrink with it.
        note: why it kept more or other than asked, or "".
        where: operators that use it, with module and source line.
        role: what its units are for, one of `torchshear.dependency.ROLES`.
        ratio: fraction of the units that was to go; None if it was to stay whole or its units were given.
    """

    name: str
    width: int
    kept: int
    is_cross_channel: bool
    members: int
    note: str
    where: tuple[str, ...]
    role: str = "other"
    ratio: float | None = None


@dataclass(frozen=True, slots=True)
class OutputReport:
    """One output of the model that was allowed to shrink.

    Attributes:
        name: its name.
        before: sizes before, None where they follow the batch.
        after: sizes after.
        note: why nothing of it can go, or "".
    """

    name: str
    before: tuple[int | None, ...]
    after: tuple[int | None, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class PartReport:
    """One part of a model of which only parts were pruned.

    Attributes:
        name: qualified name of the module.
        n_calls: with how many signatures the model called it.
        before: parameters and MACs of the dense part; MACs of all its captured calls.
        after: the same of the pruned part.
        form: "native", "traced", or "" for a plan that was not applied yet.
    """

    name: str
    n_calls: int
    before: Cost
    after: Cost
    form: str


@dataclass(frozen=True, slots=True)
class FileSize:
    """Sizes of ONNX files, measured.

    Attributes:
        dense_bytes: the file of the dense model.
        pruned_bytes: the file of the pruned model.
        most_bytes: what that file was to have at most, and the safetensors file of the pruned model, too.
    """

    dense_bytes: int
    pruned_bytes: int
    most_bytes: int


@dataclass(frozen=True, slots=True)
class PruningReport:
    """Report of a plan: the request, and its effect on a model.

    Attributes:
        requested_ratio: fraction of units that was to go, over the groups that can and may shrink; None if units were
            given.
        achieved_ratio: fraction of units that goes, over the same groups; 0 if there are none.
        before: parameters, MACs of one sample, and bytes of the tensors of the dense model.
        after: the same of the pruned model.
        groups: all channel groups.
        refused: group or "parameter[dimension]" -> why it cannot shrink; the reasons that hold most parameters first.
        form: "native" or "traced", and why, once the model is shrunk; else "".
        outputs: the outputs that were allowed to shrink; all others keep their shapes.
        target: largest amounts that may be left, "target_macs", "target_params" and "target_size" in bytes; empty if a
            ratio was asked for.
        parts: the parts that were pruned inside the model, if it was not pruned whole; parameters in `before` and
            `after` are then those of the whole model, MACs those of the parts.
        statistics: notes on the statistics that units were scored by.
        refit: errors of layers and outputs before and after a refit; None without one.
        target_latency: latency that may be left, as it was asked for; None if it was not.
        latency: "dense_ms", "pruned_ms" and "speedup" with its interval from "speedup_low" to "speedup_high", and
            "realised_share", the speed-up by the ratio of MACs; empty where nothing was measured.
        speed: whether the result is faster, as measured, or as predicted from its widths; None for a report of no plan.
        file: sizes of ONNX files; None without a target of size, of which `target` is of tensors alone then.
    """

    requested_ratio: float | None
    achieved_ratio: float
    before: Cost
    after: Cost
    groups: tuple[GroupReport, ...]
    refused: dict[str, str]
    form: str = ""
    outputs: tuple[OutputReport, ...] = ()
    parts: tuple[PartReport, ...] = ()
    target: Mapping[str, int] = field(default_factory=dict)
    statistics: tuple[str, ...] = ()
    refit: Refit | None = None
    target_latency: float | str | None = None
    latency: Mapping[str, float] = field(default_factory=dict)
    speed: SpeedVerdict | None = None
    file: FileSize | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the report as text: its tables, and lines below them."""
        return render_report(self)

    def __repr__(self) -> str:
        return f"<PruningReport: {self.changes}>"

    def _repr_html_(self) -> str:
        rows = (_cells(group) for group in self.groups)
        shown = html_table("Channel groups", _HEADINGS, rows, _summary(self).splitlines())
        if self.refit is None:
            return shown
        if not self.refit.layers:
            return shown + html_lines(refit_lines(self.refit))
        return shown + html_table(
            refit_title(self.refit), REFIT_HEADINGS, refit_rows(self.refit), refit_lines(self.refit)
        )

    @property
    def changes(self) -> str:
        """Parameters and MACs before and after, in a line."""
        return _changes(self.before, self.after)


def make_report(
    plan: PruningPlan,
    form: str = "",
    part_forms: Mapping[str, str] | None = None,
    refit: Refit | None = None,
    latency: LatencyComparison | None = None,
    file: FileSize | None = None,
) -> PruningReport:
    """Put a report together from a plan made in this process.

    Args:
        plan: a plan with its analysis.
        form: form of the shrunk model and the reason for it.
        part_forms: form of each part, where the plan is for parts.
        refit: record of a refit of the shrunk model.
        latency: times of the dense model and of the result, as "dense" and "pruned".
        file: sizes of the files of the dense model and of the result.
    """
    groups = plan.analysis
    assert groups is not None, "a plan that was loaded has no analysis"
    cut = Cut(groups, plan.kept)
    rows = tuple(
        GroupReport(
            group.name,
            group.width,
            len(of.kept),
            group.is_cross_channel,
            len(group.members),
            of.note,
            group.where,
            group.role,
            of.ratio,
        )
        for group, of in zip(groups, plan.groups, strict=True)
    )
    # A row for each output; a single one for an output that is alike in both modes.
    outputs: dict[tuple[Any, ...], OutputReport] = {}
    for o in plan.outputs:
        name = f"{o.name} in train mode" if o.mode == "train" else o.name
        outputs.setdefault((o.name, o.shape, o.shape_after), OutputReport(name, o.shape, o.shape_after, o.note))
    requested, achieved = _ratios(groups, plan)
    before, after = dense_cost(groups.graph), cut.cost()
    widths = {group.name: len(of.kept) for group, of in zip(groups, plan.groups, strict=True)}
    # Targets as numbers of MACs, parameters and bytes.
    whole = {"target_macs": before.macs, "target_params": before.n_params}
    targets = {name: plan.request[name] for name in whole if plan.request.get(name) is not None}
    target = {name: int(share * whole[name]) if share <= 1 else int(share) for name, share in targets.items()}
    size = plan.request.get("target_size")
    if size is not None:
        target["target_size"] = int(most_bytes(size, before.size_bytes)) if file is None else file.most_bytes
    return PruningReport(
        requested_ratio=requested,
        achieved_ratio=achieved,
        before=before,
        after=after,
        groups=rows,
        refused=_by_weight(plan.refused, groups),
        form=form,
        outputs=tuple(outputs.values()),
        parts=tuple(
            PartReport(name, groups.graph.parts.calls.count(name), before, after, (part_forms or {}).get(name, ""))
            for name, (before, after) in part_costs(cut).items()
            if groups.graph.parts is not None
        ),
        target=target,
        statistics=tuple(plan.request.get("statistics", ())),
        refit=refit,
        target_latency=plan.request.get("target_latency"),
        latency={} if latency is None else _speed(latency, before.macs / max(after.macs, 1)),
        speed=speed_verdict(groups, widths, str(plan.request.get("alignment", "")), latency),
        file=file,
    )


def _speed(latency: LatencyComparison, macs_ratio: float) -> dict[str, float]:
    low, high = latency.speedup_interval("pruned")
    times = {f"{name}_ms": latency[name].median_ms for name in ("dense", "pruned")}
    speedup = latency.speedup("pruned")
    realised = {"realised_share": speedup / macs_ratio} if macs_ratio else {}
    return times | {"speedup": speedup, "speedup_low": low, "speedup_high": high} | realised


def _by_weight(refused: Mapping[str, str], groups: ChannelGroups) -> dict[str, str]:
    """Sort refused names by the number of parameters that each kind of reason concerns, most first."""
    of_kind: dict[str, dict[str, int]] = {}
    for name, reason in refused.items():
        tensor = name.rpartition("[")[0]
        entry = groups.graph.state.get(groups.graph.aliases.get(tensor, tensor))
        of_kind.setdefault(kind_of_reason(reason), {})[tensor] = 0 if entry is None else entry.tensor.numel()
    weights = {kind: sum(tensors.values()) for kind, tensors in of_kind.items()}
    return dict(sorted(refused.items(), key=lambda item: -weights[kind_of_reason(item[1])]))


def _ratios(groups: ChannelGroups, plan: PruningPlan) -> tuple[float | None, float]:
    """Fraction of the units that was to go, and that goes, over the groups that can and may shrink."""
    prunable = [of for group, of in zip(groups, plan.groups, strict=True) if group.is_prunable]
    asked = [(of, of.ratio) for of in prunable if of.ratio is not None]
    chosen = [of for of, _ in asked] or prunable
    total = sum(of.width for of in chosen)
    achieved = sum(of.width - len(of.kept) for of in chosen) / total if total else 0.0
    if not asked:
        ratio = plan.request.get("ratio")  # nothing can shrink, or units were given
        return (float(ratio) if isinstance(ratio, int | float) else None), achieved
    ratios = {ratio for _, ratio in asked}
    mean = sum(ratio * of.width for of, ratio in asked) / total
    return (ratios.pop() if len(ratios) == 1 else mean), achieved


def render_report(report: PruningReport, width: int = 120) -> str:
    """Write a report as text.

    Args:
        report: the report.
        width: columns of the terminal.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False)
    if all(group.kept == group.width for group in report.groups):
        console.print(_nothing_shrank(report), soft_wrap=True)
    console.print(_table("Channel groups", _HEADINGS, map(_cells, report.groups)))
    console.print(_summary(report), soft_wrap=True)
    if report.refit is not None:
        console.print()
        if report.refit.layers:
            console.print(_table(refit_title(report.refit), REFIT_HEADINGS, refit_rows(report.refit)))
        for line in refit_lines(report.refit):
            console.print(line, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Make a table whose numbers stand on the right."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left")
    for row in rows:
        table.add_row(*map(Cell, row))
    return table


def _cells(group: GroupReport) -> tuple[str, ...]:
    """Return the cells of a group, one for each heading."""
    note = group.note or ("norm, softmax or mean over it" if group.is_cross_channel else "")
    kept = f"{group.kept / group.width:.0%}"
    return group.name, group.role, str(group.width), str(group.kept), kept, note


def _nothing_shrank(report: PruningReport) -> str:
    """Write the first line of a report whose model kept every channel, with the main reason."""
    notes = [group.note for group in report.groups if group.note]
    why = next(iter((*report.refused.values(), *notes)), "the model has no parameters")
    return f"Nothing shrank: the result keeps every channel, first of all because: {why}."


def _summary(report: PruningReport) -> str:
    asked = "given units" if report.requested_ratio is None else f"{report.requested_ratio:.1%} requested"
    asked = "by a target" if report.target or report.target_latency is not None else asked
    lines = [
        f"channels    {report.achieved_ratio:.1%} removed ({asked})",
        _line("parameters", report.before.n_params, report.after.n_params, report.target.get("target_params")),
        _line("MACs", report.before.macs, report.after.macs, report.target.get("target_macs")),
    ]
    most = report.target.get("target_size")
    if report.file is not None:
        lines.append(_line("bytes", report.file.dense_bytes, report.file.pruned_bytes, most) + ", of the ONNX file")
    elif most is not None:
        lines.append(_line("bytes", report.before.size_bytes, report.after.size_bytes, most) + ", of tensors alone")
    if report.latency:
        lines.append(_latency_line(report))
    if report.speed is not None:
        lines.append(f"speed       {report.speed.text}")
    lines += [
        f"part        {part.name}: {_changes(part.before, part.after)}{f', {part.form}' if part.form else ''}"
        for part in report.parts
    ]
    lines += [f"statistics  {note}" for note in report.statistics]
    if report.form:
        lines.append(f"form        {report.form}".replace("; ", "\n            "))
    lines += [f"output      {_output_line(output)}" for output in report.outputs]
    if report.refused:
        lines += lines_by_reason("cannot shrink", report.refused.items(), ".refused")
    return "\n".join(lines)


def _latency_line(report: PruningReport) -> str:
    """Write both times, and what share of the saved operations became speed."""
    found = report.latency
    realised = found.get("realised_share")
    share = "" if realised is None else f", realised share of the MACs ratio {realised:.2f}"
    asked = "" if report.target_latency is None else f", at most {report.target_latency} requested"
    times = f"{found['dense_ms']:.3f} -> {found['pruned_ms']:.3f} ms"
    return f"latency     {times}{asked}{share}"


def _output_line(output: OutputReport) -> str:
    before, after = (
        f"({', '.join('batch' if size is None else str(size) for size in shape)})"
        for shape in (output.before, output.after)
    )
    if before != after:
        return f"{output.name} {before} -> {after}"
    return f"{output.name} {before} unchanged{': ' if output.note else ''}{output.note}"


def _line(label: str, before: int, after: int, asked: int | None) -> str:
    target = "" if asked is None else f", at most {asked:,} requested ({asked / before:.1%})"
    return _change(f"{label:<11}", before, after) + target


def _changes(before: Cost, after: Cost) -> str:
    parameters = _change("parameters", before.n_params, after.n_params)
    return f"{parameters}, {_change('MACs', before.macs, after.macs)}"


def _change(label: str, before: int, after: int) -> str:
    share = f" ({after / before:.1%} left)" if before else ""
    return f"{label} {before:,} -> {after:,}{share}"
