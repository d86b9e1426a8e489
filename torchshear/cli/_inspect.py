"""`torchshear inspect`: what can shrink, what must shrink with it, and what is fixed and why."""

import json
import re
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

import torchshear
from torchshear._tables import Cell
from torchshear.cli._example import Target, load_example
from torchshear.cli._shared_options import Submodules
from torchshear.cli._terminal import print_lines, status, stdout_console
from torchshear.dependency import ChannelGroup, ChannelGroups
from torchshear.dependency.plans._cut import dense_cost
from torchshear.inspection import GroupDetail, describe_groups, write_page
from torchshear.inspection._details import Constraint, MemberDetail, find_group
from torchshear.inspection._document import groups_document

_WHERE: Final = re.compile(r"^aten\.(\w+)\.\w+(?: in module '(.*?)')?")
_INDENT: Final = 12


def inspect(
    target: Target,
    group: Annotated[
        str | None, typer.Option(help="Show one group: its number, its name, or a parameter that lies in it.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the network and its groups as one page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every member and source line.")] = False,
    submodule: Submodules = None,
) -> None:
    """Show the channel groups of a model: what can shrink, what must shrink with it, and what is fixed and why."""
    model, args, kwargs = load_example(target)
    with status("tracing and analysing") as say:
        groups = torchshear.analyze(torchshear.trace(model, args, kwargs, submodule or None))
        number = None if group is None else find_group(groups, group)
        if html is not None:
            say("writing the page")
            write_page(groups, html)
    if as_json:
        shown = groups_document(groups) if number is None else asdict(describe_groups(groups)[number])
        typer.echo(json.dumps(shown, indent=2))
        return
    console = stdout_console()
    if number is None:
        _print_groups(console, groups)
    else:
        _print_group(console, describe_groups(groups)[number])
    if html is not None:
        anchor = "" if number is None else f"#group={number}"
        print_lines(console, f"\nwritten     {html}; open it in a browser: {html.resolve().as_uri()}{anchor}")


def _print_groups(console: Console, groups: ChannelGroups) -> None:
    console.print(_groups_table(groups))
    cost = dense_cost(groups.graph)
    console.print(f"{len(groups.prunable)} of {len(groups)} can shrink.")
    console.print(f"{cost.n_params:,} parameters, {cost.macs:,} MACs per {_unit_of_work(groups)}.")
    _print_fixed(console, groups)


def _unit_of_work(groups: ChannelGroups) -> str:
    """Name the unit that MACs are counted for: a sample, or the whole example where the batch is not free."""
    return "sample" if groups.graph.batch_hint is not None else "example"


def _groups_table(groups: ChannelGroups) -> Table:
    table = Table(title=f"Channel groups of {groups.graph.model_type.rpartition('.')[2]}", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("group\nrole", ratio=3)
    table.add_column("width", justify="right")
    table.add_column("members", ratio=3)
    table.add_column("constraints", ratio=2)
    table.add_column("where", ratio=3)
    for number, group in enumerate(groups):
        where = _short(group.where[0]) if group.where else ""
        name = f"{group.name}\n{group.role}"
        cells = (_members(group), _constraints(group), where)
        table.add_row(str(number), Cell(name), str(group.width), *map(Cell, cells))
    return table


def _members(group: ChannelGroup) -> str:
    """Number of parameter dimensions, and the modules that hold them."""
    modules = list(dict.fromkeys(member.name.rpartition(".")[0] or member.name for member in group.members))
    more = f", +{len(modules) - 3}" if len(modules) > 3 else ""
    return f"{len(group.members)} in {', '.join(modules[:3])}{more}"


def _constraints(group: ChannelGroup) -> str:
    balanced = f"{group.n_blocks} equal blocks" if group.balance is not None else ""
    parts = (balanced, "cross-channel" if group.is_cross_channel else "", group.reason or "")
    return ", ".join(part for part in parts if part)


def _short(where: str) -> str:
    """Operator, module and source line without what is the same for all."""
    return _WHERE.sub(lambda found: " ".join(filter(None, found.groups())), where)


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


def _print_group(console: Console, group: GroupDetail) -> None:
    """Print all that is known about one group."""
    print_lines(console, f"Group {group.number}: {group.name}")
    units = f"{group.width} unit{'s' * (group.width != 1)}, of which {group.max_cut} can go"
    print_lines(console, f"{'width':<{_INDENT}}{units}")
    parameters = f"{group.n_params:,} elements in its parameters; a unit takes {group.unit_params:,.0f} along"
    print_lines(console, f"{'parameters':<{_INDENT}}{parameters}")
    print_lines(console, f"{'role':<{_INDENT}}{group.role} (dimensions: {', '.join(group.purposes)})")
    for constraint in group.constraints:
        _print_constraint(console, constraint)
    console.print()
    console.print(_members_table(group.members))


def _print_constraint(console: Console, constraint: Constraint) -> None:
    print_lines(console, f"{constraint.kind:<{_INDENT}}{constraint.text}")
    for place in constraint.where:
        print_lines(console, f"{'':<{_INDENT}}- {_short(place)}", indent=_INDENT + 2)


def _members_table(members: tuple[MemberDetail, ...]) -> Table:
    table = Table(title=f"Members ({len(members)})", title_justify="left")
    table.add_column("dimension", ratio=3)
    table.add_column("purpose")
    table.add_column("positions", justify="right")
    table.add_column("of unit 0", ratio=1)
    table.add_column("read by", ratio=3)
    for member in members:
        part = "" if member.n_positions == member.size else f" of {member.size}"
        table.add_row(
            Cell(f"{member.name}[{member.dim}]"),
            "\n".join(member.purposes),
            f"{member.n_positions}{part}",
            Cell(member.first),
            Cell("\n".join(map(_short, member.where))),
        )
    return table
