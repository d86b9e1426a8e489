"""One self-contained page: the network as a graph, its groups, and what is fixed and why.

Nothing of the model stands in the page's markup: it is data in a script element that browsers do not run, with every
character that could end the element written as an escape. The page forbids itself all requests by a content security
policy that allows its own script and style alone, by their hashes.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from os import PathLike
from typing import Any

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._groups import check_groups
from torchshear.dependency.groups._network import Value
from torchshear.graph.model._state import Mode
from torchshear.inspection._cards import Level, make_levels
from torchshear.inspection._document import groups_document
from torchshear.inspection._layout import lay_out
from torchshear.storage._writing import atomic_path

_SCRIPTS = ("model.js", "search.js", "scene.js", "draw.js", "panel.js", "main.js")
_WIDTH, _HEAD, _CHIP = 188, 38, 18  # of a card, its two lines of text, a line of tensors
_CHIPS_IN_LINE = 4


def write_page(groups: ChannelGroups, path: str | PathLike[str]) -> None:
    """Write the page that shows a network's channel groups; any browser opens it, without a network.

    Args:
        groups: the analysed network.
        path: the file to write, as in "groups.html".

    Raises:
        OutputError: the file cannot be written; what was there before is unchanged.
    """
    page = render_page(groups)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="ascii")


def render_page(groups: ChannelGroups) -> str:
    """Write the page as ASCII text.

    Args:
        groups: the analysed network.

    Returns:
        The content of an HTML file.
    """
    check_groups(groups)
    style = _asset("page.css")
    script = '"use strict";\n(() => {\n' + "\n".join(map(_asset, _SCRIPTS)) + "\n})();\n"
    data = json.dumps(_document(groups), separators=(",", ":"))  # ASCII: other characters become escapes
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = _asset("page.html")
    for name, text in (("style-hash", _hash(style)), ("script-hash", _hash(script))):
        page = page.replace(f"@{name}@", text)
    head, _, rest = page.partition("@style@")
    middle, _, rest = rest.partition("@data@")
    before, _, after = rest.partition("@script@")
    return "".join((head, style, middle, data, before, script, after))


def _asset(name: str) -> str:
    return files("torchshear.inspection").joinpath("assets", name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    """Return the source expression of a content security policy that allows exactly this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _document(groups: ChannelGroups) -> dict[str, Any]:
    """Everything that the page shows."""
    mode: Mode = "eval" if groups.graph.training is None else "train"
    values = groups.describe(mode)
    reasons: dict[str, int] = {"": 0}
    document = groups_document(groups)
    return document | {
        "torchshear": version("torchshear"),
        "mode": mode,
        "tensors": _tensors(document["groups"]),
        "nodes": [_node(value, reasons) for value in values],
        "reasons": list(reasons),
        "levels": [_level(level, values) for level in make_levels(values)],
    }


def _tensors(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take out of the groups what is the same for all members of one tensor, and number the tensors instead."""
    numbers: dict[str, int] = {}
    tensors: list[dict[str, Any]] = []
    for group in groups:
        short = []
        for member in group["members"]:
            if member["name"] not in numbers:
                numbers[member["name"]] = len(tensors)
                tensors.append({field: member[field] for field in ("name", "where")})
            kept = ("dim", "purposes", "size", "n_positions", "multiplicity", "first")
            short.append([numbers[member["name"]], *(member[field] for field in kept)])
        group["members"] = short
    return tensors


def _node(value: Value, reasons: dict[str, int]) -> dict[str, Any]:
    fields = asdict(value)
    fields["operands"] = len(value.operands)
    fields["tensors"] = [
        [[dim.size, dim.groups, reasons.setdefault(dim.fixed, len(reasons))] for dim in dims] for dims in value.tensors
    ]
    return fields


def _level(level: Level, values: Sequence[Value]) -> dict[str, Any]:
    sizes = [(_WIDTH, _HEAD + _CHIP * -(-len(card.chips) // _CHIPS_IN_LINE)) for card in level.cards]
    layout = lay_out(sizes, list(level.edges), [card.module for card in level.cards])
    cards = [
        {
            "x": round(x - width / 2),
            "y": round(y),
            "width": width,
            "height": height,
            "title": card.title,
            "subtitle": card.subtitle,
            "module": card.module,
            "nodes": card.nodes,
            "chips": card.chips,
        }
        for card, (x, y), (width, height) in zip(level.cards, layout.places, sizes, strict=True)
    ]
    edges = [
        [*ends, groups, [round(number) for point in layout.routes[ends] for number in point], int(ends in level.shared)]
        for ends, groups in level.edges.items()
    ]
    return {
        "depth": level.depth,
        "width": round(layout.width),
        "height": round(layout.height),
        "cards": cards,
        "edges": edges,
    }
