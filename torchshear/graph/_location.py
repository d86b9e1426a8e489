"""Where a graph node comes from: the module that called it and the line of source that did."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_TORCH = str(Path(torch.__file__).parent) + os.sep  # with the separator, or torchvision would be taken for torch


@dataclass(frozen=True, slots=True)
class Location:
    """The origin of a graph node.

    Attributes:
        module: qualified name of the module whose forward made the call; "" is the model itself.
        source: "file.py:12" of the innermost line outside torch, or "" when torch kept none.
        operator: name of the operator, as in "aten.conv2d.default".
    """

    module: str
    source: str
    operator: str

    def __str__(self) -> str:
        """Describe the location in a phrase, for messages and reports."""
        where = f"in module {self.module!r}" if self.module else "in the model's forward"
        return f"{self.operator} {where}" + (f" ({self.source})" if self.source else "")


def locate(node: fx.Node) -> Location:
    """Find where a node of a captured graph comes from."""
    return Location(_module_name(node), _source_line(node), _operator_name(node))


def _operator_name(node: fx.Node) -> str:
    """Name of what a node calls: "aten.conv2d.default" for an operator of torch, "getitem" for a plain function."""
    if node.op == "call_function" and not isinstance(node.target, torch._ops.OperatorBase):
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)


def enclosing_modules(node: fx.Node) -> tuple[str, ...]:
    """Names of the modules in whose forward a node was called, outermost first."""
    return tuple(path for _, path in _calls_around(node))


def _calls_around(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """Calls of modules in which a node was called, outermost first: a key for each call, and the module's name."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((key, path) for key, (path, _) in stack.items() if not path.startswith("_empty_nn_module"))


def module_outputs(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Nodes whose value is the one tensor that a call of a module hands out, with the module's name.

    Where modules hand on what a module inside them gives, the outermost is named; never the model itself.
    """
    leaving: dict[tuple[tuple[str, str], ...], list[fx.Node]] = defaultdict(list)
    for node in nodes:
        around = _calls_around(node)
        shared = min((_n_shared(around, _calls_around(user)) for user in node.users), default=len(around))
        for depth in range(shared + 1, len(around) + 1):  # it leaves these
            leaving[around[:depth]].append(node)
    found: dict[fx.Node, str] = {}
    for calls, given in sorted(leaving.items(), key=lambda item: len(item[0])):
        if len(given) == 1 and isinstance(given[0].meta.get("val"), Tensor) and calls[-1][1]:
            found.setdefault(given[0], calls[-1][1])
    return found


def _n_shared(one: tuple[tuple[str, str], ...], other: tuple[tuple[str, str], ...]) -> int:
    """How many calls two nodes have around them in common."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def canonical_module_names(model: nn.Module) -> dict[str, str]:
    """Every name of every module -> the first one, which is the one that `named_modules` gives.

    A module that others share is called by the name of whoever calls it.
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(module), name) for name, module in model.named_modules(remove_duplicate=False)}


def _module_name(node: fx.Node) -> str:
    names = enclosing_modules(node)
    return names[-1] if names else ""


def _source_line(node: fx.Node) -> str:
    """Innermost user line: torch.nn's own layers are skipped, so that the caller of a layer is named."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    for frame in reversed(frames):
        if not frame["file"].startswith(_TORCH):
            return f"{Path(frame['file']).name}:{frame['line']}"
    return f"{Path(frames[-1]['file']).name}:{frames[-1]['line']}" if frames else ""
