"""The captured graph: operators, shapes and the tensors of the model by name. Read only after capture."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.graph._inputs import ExampleInputs

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor that the model owns.

    Attributes:
        name: canonical qualified name; tied tensors have one.
        kind: "parameter", "buffer", or "constant" (a plain tensor attribute or a literal in the source).
        tensor: the model's own tensor, never written to by torchshear.
    """

    name: str
    kind: Literal["parameter", "buffer", "constant"]
    tensor: Tensor

    @property
    def shape(self) -> Shape:
        """Sizes of the dimensions."""
        return tuple(self.tensor.shape)


@dataclass(frozen=True, slots=True)
class Graph:
    """A model captured at ATen level.

    Attributes:
        fx_graph: nodes in execution order; `get_attr` targets are keys of `state`. Not to be changed.
        state: canonical name -> tensor of the model.
        aliases: every qualified name of a parameter or buffer -> its canonical name (tied tensors share one).
        inputs: the example inputs, as the user gave them.
        in_spec: tree structure of `(args, kwargs)`.
        out_spec: tree structure of the outputs.
        model_type: qualified class name of the model.
        mode: "eval" or "train", the mode in which the model was captured.
        batch_hint: size of the free batch dimension during capture, or None if the batch is static.
        training: the same model captured in train mode, if that reads parameters or buffers which the eval graph leaves
            unread, as auxiliary heads are; else None.
    """

    fx_graph: fx.Graph
    state: Mapping[str, StateTensor]
    aliases: Mapping[str, str]
    inputs: ExampleInputs
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    model_type: str
    mode: Literal["eval", "train"]
    batch_hint: int | None
    training: "Graph | None" = None

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self.fx_graph.nodes)

    def __len__(self) -> int:
        return len(self.fx_graph.nodes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over operators, arguments and shapes: equal for two models that are the same network."""
        digest = hashlib.sha256()
        for node in self.fx_graph.nodes:
            digest.update(f"{node.op}|{node.name}|{node.target}|{node.args}|{node.kwargs}\n".encode())
        for name, entry in sorted(self.state.items()):
            digest.update(f"{name}|{entry.shape}\n".encode())
        return digest.hexdigest()

    def n_params(self) -> int:
        """Number of parameter elements, tied parameters counted once."""
        return sum(entry.tensor.numel() for entry in self.state.values() if entry.kind == "parameter")


def shape_of(node: fx.Node) -> Any:
    """Concrete shape of a node's value: a tuple of ints, a tuple of shapes for several values, None for no tensor.

    Symbolic sizes are replaced by the size that they had in the capture.
    """
    return _shape(node.meta.get("val"))


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(concrete(size) for size in value.shape)
    if isinstance(value, list | tuple):
        return tuple(_shape(item) for item in value)
    return None


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Operands of a call that are tensors, in order, each as often as it is given."""
    found: list[fx.Node] = []

    def collect(operand: fx.Node) -> fx.Node:
        if isinstance(operand.meta.get("val"), Tensor):
            found.append(operand)
        return operand

    fx.map_arg((node.args, node.kwargs), collect)
    return found


def concrete(size: Any) -> Any:
    """The value of a size during capture: ints as they are, symbolic ints by their hint."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.hint is not None else 0
    return size


def is_symbolic(node: fx.Node, dim: int) -> bool:
    """Whether a dimension of a node's value is free, as the batch is."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and isinstance(value.shape[dim], torch.SymInt)
