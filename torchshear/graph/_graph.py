"""The captured graph: operators, shapes and the tensors of the model by name. Read only after capture."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.graph._follow import Follows, Place, SecondShapes
from torchshear.graph._function_call import FunctionCall
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._operator import operator_of
from torchshear.graph._parts import Parts
from torchshear.graph.model._state import Mode

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor that the model owns.

    Attributes:
        name: canonical qualified name; tied tensors have one.
        kind: "parameter", "buffer", or "constant" (a plain tensor attribute or a literal in the source).
        tensor: the model's own tensor, never written to by torchshear.
        is_saved: whether the model's `state_dict` holds it.
    """

    name: str
    kind: Literal["parameter", "buffer", "constant"]
    tensor: Tensor
    is_saved: bool = True

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
        batch_hint: size of the free batch dimension during capture; None if the batch is static.
        second: which sizes follow the batch, as a second capture tells; None if the batch is static.
        training: the same model captured in train mode, if that reads parameters or buffers which the eval graph leaves
            unread, as auxiliary heads are, or gives other outputs, as raw maps for a loss are; else None.
        omitted_outputs: outputs that are not captured, with their types: objects that torch.export does not know, such
            as a cache of keys and values.
        has_assumed_branches: whether every `if` on a value of a tensor was answered with no during capture, since
            torch.export could not capture both branches. Such a graph says what depends on what, and is not to be run.
        parts: where only some modules of the model were captured, which ones; the graph then holds all of their calls,
            one after another, its inputs are `(args, kwargs)` of each call, and its outputs the results of all. None
            where the model was captured whole.
        functions: calls of functions that define their own backward (`torch.autograd.Function`), of which the graph
            holds the operators only.
    """

    fx_graph: fx.Graph
    state: Mapping[str, StateTensor]
    aliases: Mapping[str, str]
    inputs: ExampleInputs
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    model_type: str
    mode: Mode
    batch_hint: int | None
    second: SecondShapes | None = None
    training: "Graph | None" = None
    omitted_outputs: tuple[str, ...] = ()
    has_assumed_branches: bool = False
    parts: Parts | None = None
    functions: tuple[FunctionCall, ...] = ()

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self.fx_graph.nodes)

    def __len__(self) -> int:
        return len(self.fx_graph.nodes)

    def __repr__(self) -> str:
        name = self.model_type.rpartition(".")[2]
        return f"<Graph of {name} in {self.mode} mode: {len(self)} nodes, {len(self.state)} tensors>"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over operators, arguments and shapes: equal for two models that are the same network.

        On which device they are and in which type makes no difference: devices and types are left out, and so are
        calls that hand their operand on in another type or layout, which torch.export keeps or drops by the device.
        """
        digest = hashlib.sha256()
        labels: dict[fx.Node, str] = {}
        for number, node in enumerate(n for n in self.fx_graph.nodes if not operator_of(n).keeps_positions):
            labels[node] = f"%{number}"
            target = "" if node.op == "placeholder" else node.target
            digest.update(f"{node.op}|{target}|{format_arguments((node.args, node.kwargs), labels)}\n".encode())
        for name, entry in sorted(self.state.items()):
            digest.update(f"{name}|{entry.shape}\n".encode())
        return digest.hexdigest()

    def is_dynamic(self, node: fx.Node, place: Place) -> bool:
        """Whether the size of a dimension of a node's value, or of one of its values, follows the batch, or data."""
        size = _size_at(node, place)
        if isinstance(size, torch.SymInt):
            return True
        second = self.second.size(node.name, place) if self.second is not None and size is not None else None
        return second is not None and second != size

    def batch_formula(self, node: fx.Node, place: Place) -> Follows | None:
        """How a size that is free follows the batch; None if it does in no simple way, or follows data."""
        size = _size_at(node, place)
        second = self.second.size(node.name, place) if self.second is not None else None
        if self.second is None or second is None or size is None or isinstance(size, torch.SymInt):
            return None
        return self.second.batches.follow(size, second)

    @property
    def lost_backwards(self) -> tuple[FunctionCall, ...]:
        """Calls of functions whose gradients are others than those of the operators in the graph."""
        return tuple(call for call in self.functions if call.has_own_backward)

    def describe_inputs(self) -> dict[str, str]:
        """What the inputs are called in messages: name of a node -> a phrase."""
        nodes = [node for node in self.fx_graph.nodes if node.op == "placeholder"]
        owners = self._owners([len(pytree.tree_leaves(given)) for given in self.inputs.args])
        return {
            node.name: f"input of part {owners[number]!r}" if owners else f"model input {node.name!r}"
            for number, node in enumerate(nodes)
        }

    def output_parts(self) -> list[str]:
        """Part that gives each of the flat outputs; empty where the model was captured whole."""
        return self._owners([spec.num_leaves for spec in self.out_spec.children()])

    def _owners(self, counts: list[int]) -> list[str]:
        """Part of each of the flat inputs or outputs, of which each call has so many."""
        calls = self.parts.calls if self.parts is not None else ()
        return [part for part, count in zip(calls, counts, strict=False) for _ in range(count)]

    def n_params(self) -> int:
        """Number of parameter elements, tied parameters counted once."""
        return sum(entry.tensor.numel() for entry in self.state.values() if entry.kind == "parameter")


def format_arguments(value: Any, labels: Mapping[fx.Node, str]) -> str:
    """Arguments of a call as text, nodes by their labels, without devices and types."""
    if isinstance(value, fx.Node):
        return format_arguments(value.args[0], labels) if operator_of(value).keeps_positions else labels[value]
    if isinstance(value, torch.device | torch.dtype):
        return ""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={format_arguments(item, labels)}" for key, item in value.items())
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, list | tuple):
        return "(" + ",".join(format_arguments(item, labels) for item in value) + ")"
    return str(value)


def _size_at(node: fx.Node, place: Place) -> int | torch.SymInt | None:
    """A size of a node's value; None where it is no tensor."""
    value = node.meta.get("val")
    if not isinstance(place, int):
        item, place = place
        value = value[item] if isinstance(value, list | tuple) else None
    return value.shape[place] if isinstance(value, Tensor) else None


def shape_of(node: fx.Node) -> Any:
    """Shape of a node's value in the capture: a tuple of ints, of shapes for several values, None for no tensor."""
    return _shape(node.meta.get("val"))


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(_size(size) for size in value.shape)
    if isinstance(value, list | tuple):
        return tuple(_shape(item) for item in value)
    return None


def _size(size: Any) -> int:
    """A size as a number; 0 for one that depends on data."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.hint is not None else 0
    return int(size)


def is_data_dependent(size: Any) -> bool:
    """Whether a size is known only when the model runs, as where a mask picks positions."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


def has_data_dependent_shape(node: fx.Node) -> bool:
    """Whether a size of a node's value is known only when it runs."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(map(is_data_dependent, value.shape))


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Operands of a call that are tensors, in order, each as often as it is given."""
    found: list[fx.Node] = []

    def collect(operand: fx.Node) -> fx.Node:
        if isinstance(operand.meta.get("val"), Tensor):
            found.append(operand)
        return operand

    fx.map_arg((node.args, node.kwargs), collect)
    return found
