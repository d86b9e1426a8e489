"""A network whose names, class and source file try to break out of wherever they are written."""

import linecache
from pathlib import Path
from typing import Any

import torch

import torchshear
from torchshear.dependency import ChannelGroups

NAMES = (
    "</script><script>window['broken']=1</script>",
    "<img src=x onerror=\"window['broken']=1\">",
    "quotes \" ' ` and \\ \\u003c",
    "line\u2028and\u2029separators\n<!--<script>",
    "umlauts äöü, 漢字, 🙂",
    "control \x01 \x1b[31m",
)

_SOURCE = """
import torch
from torch import nn


class Hostile(nn.Module):
    def __init__(self, names):
        super().__init__()
        for i, name in enumerate(names):
            self.add_module(name, nn.Linear(4 if i == 0 else 6, 6))
        self.names = names
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for name in self.names:
            x = torch.relu(getattr(self, name)(x))
        return self.head(x)
"""


def hostile_groups(folder: Path) -> ChannelGroups:
    """The channel groups of the network, whose source lies in a file of a hostile name."""
    path = folder / "<b>&lt;file.py"
    path.write_text(_SOURCE)
    linecache.checkcache(str(path))
    scope: dict[str, Any] = {"__name__": "hostile<i>module"}
    exec(compile(_SOURCE, str(path), "exec"), scope)
    scope["Hostile"].__qualname__ = "</title><script>window['broken']=1</script>"
    return torchshear.analyze(torchshear.trace(scope["Hostile"](NAMES), (torch.randn(2, 4),)))
