"""Where a graph node comes from: the module that called it and the line of source that did."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn

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
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(path for path, _ in stack.values() if not path.startswith("_empty_nn_module"))


def first_names(model: nn.Module) -> dict[str, str]:
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
