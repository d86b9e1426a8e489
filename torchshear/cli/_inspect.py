"""`torchshear inspect`: what can shrink, what must shrink with it, and what is fixed and why."""

import json
import re
from collections import defaultdict
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

import torchshear
from torchshear.cli._example import Target, load_example
from torchshear.cli._terminal import print_lines, status, stdout_console
from torchshear.dependency import ChannelGroup, ChannelGroups, dense_cost

_WHERE: Final = re.compile(r"^aten\.(\w+)\.\w+(?: in module '(.*?)')?")


def inspect(
    target: Target,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every member and source line.")] = False,
) -> None:
    """Show the channel groups of a model: what can shrink, what must shrink with it, and what is fixed and why."""
    model, args, kwargs = load_example(target)
    with status("tracing and analysing"):
        groups = torchshear.analyze(torchshear.trace(model, args, kwargs))
    if as_json:
        typer.echo(json.dumps(_groups_document(groups), indent=2))
        return
    console = stdout_console()
    console.print(_groups_table(groups))
    cost = dense_cost(groups.graph)
    console.print(f"{len(groups.prunable)} of {len(groups)} can shrink.")
    console.print(f"{cost.n_params:,} parameters, {cost.macs:,} MACs per sample.")
    _print_fixed(console, groups)


def _groups_document(groups: ChannelGroups) -> dict[str, Any]:
    fields = ("name", "width", "is_prunable", "reason", "n_blocks", "is_mixed", "where")
    rows = [{field: getattr(group, field) for field in fields} for group in groups]
    for row, group in zip(rows, groups, strict=True):
        row["members"] = [{"name": m.name, "dim": m.dim, "roles": sorted(m.roles)} for m in group.members]
    fixed = [asdict(dimension) for dimension in groups.fixed]
    return {"model": groups.graph.model_type, **asdict(dense_cost(groups.graph)), "groups": rows, "fixed": fixed}


def _groups_table(groups: ChannelGroups) -> Table:
    table = Table(title=f"Channel groups of {groups.graph.model_type.rpartition('.')[2]}", title_justify="left")
    table.add_column("group", overflow="fold", ratio=3)
    table.add_column("width", justify="right")
    table.add_column("members", overflow="fold", ratio=3)
    table.add_column("constraints", ratio=2)
    table.add_column("where", overflow="fold", ratio=3)
    for group in groups:
        table.add_row(group.name, str(group.width), _members(group), _constraints(group), _where(group))
    return table


def _members(group: ChannelGroup) -> str:
    """Number of parameter dimensions, and the modules that hold them."""
    modules = list(dict.fromkeys(member.name.rpartition(".")[0] or member.name for member in group.members))
    more = f", +{len(modules) - 3}" if len(modules) > 3 else ""
    return f"{len(group.members)} in {', '.join(modules[:3])}{more}"


def _constraints(group: ChannelGroup) -> str:
    balanced = f"{group.n_blocks} equal blocks" if group.balance is not None else ""
    parts = (balanced, "mixed" if group.is_mixed else "", group.reason or "")
    return ", ".join(part for part in parts if part)


def _where(group: ChannelGroup) -> str:
    """The first operator that uses a group, without what is the same for all."""
    return _WHERE.sub(lambda found: " ".join(filter(None, found.groups())), group.where[0]) if group.where else ""


def _print_fixed(console: Console, groups: ChannelGroups) -> None:
    """Print dimensions that cannot shrink, those of one reason together."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for fixed in groups.fixed:
        by_reason[fixed.reason].append(f"{fixed.name}[{fixed.dim}]")
    if by_reason:
        console.print(f"\nFixed ({len(groups.fixed)} parameter dimensions):")
    for reason, names in by_reason.items():
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        print_lines(console, f"  {', '.join(names[:6])}{more}: {reason}", indent=4)
