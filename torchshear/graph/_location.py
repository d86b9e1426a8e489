"""Origin of a graph node: the module that called it and the line of source that did."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
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
    """Return the origin of a node of a captured graph."""
    operator = str(node.target)
    if node.op == "call_function" and not isinstance(node.target, torch._ops.OperatorBase):
        operator = getattr(node.target, "__name__", operator)  # a plain function, as "getitem"
    # Lines of torch's own layers are skipped, so that the caller of a layer is named.
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    outside = [frame for frame in frames if not frame["file"].startswith(_TORCH)]
    frame = next(reversed(outside or frames), None)
    source = f"{Path(frame['file']).name}:{frame['line']}" if frame is not None else ""
    modules = enclosing_modules(node)
    return Location(modules[-1] if modules else "", source, operator)


def enclosing_modules(node: fx.Node) -> tuple[str, ...]:
    """Return the names of the modules in whose forward a node was called, outermost first."""
    return tuple(path for _, path in _enclosing_calls(node))


def _enclosing_calls(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """Return a key and the module's name for each call of a module around a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((key, path) for key, (path, _) in stack.items() if not path.startswith("_empty_nn_module"))


def module_outputs(nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Return the nodes whose value is the one tensor that a call of a module returns, with the module's name.

    Of modules that return the value of a module inside them, the outermost is named; never the model itself.
    """
    leaving: dict[tuple[tuple[str, str], ...], list[fx.Node]] = defaultdict(list)  # by the calls that a value leaves
    for node in nodes:
        calls = _enclosing_calls(node)
        # A value leaves the calls that it does not share with one of its users.
        n_shared = [
            len(list(takewhile(lambda pair: pair[0] == pair[1], zip(calls, _enclosing_calls(user), strict=False))))
            for user in node.users
        ]
        for depth in range(min(n_shared, default=len(calls)) + 1, len(calls) + 1):
            leaving[calls[:depth]].append(node)
    names: dict[fx.Node, str] = {}
    for calls, values in sorted(leaving.items(), key=lambda item: len(item[0])):
        if len(values) == 1 and isinstance(values[0].meta.get("val"), Tensor) and calls[-1][1]:
            names.setdefault(values[0], calls[-1][1])
    return names


def canonical_module_names(model: nn.Module) -> dict[str, str]:
    """Return every name of every module -> its first name, which `named_modules` gives.

    A module that several others hold has several names, and a node has the name of the holder that calls it.
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(module), name) for name, module in model.named_modules(remove_duplicate=False)}
