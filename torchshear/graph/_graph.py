"""The captured graph: operators, shapes, outputs, and the tensors of the model, or of parts of it, by name."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear._arguments import close_names, matches, parse_names
from torchshear.errors import ArgumentError
from torchshear.graph._function_call import FunctionCall
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._nodes import format_arguments, shape_of
from torchshear.graph._operator_record import operator_of
from torchshear.graph._outputs import output_names
from torchshear.graph.model._state import Mode

Shape = tuple[int, ...]
Dim = int | tuple[int, int]  # a dimension of a tensor, or the number of one of several tensors and its dimension
_ANY_CALL = inspect.signature(lambda *args, **kwargs: None)


@dataclass(frozen=True, slots=True)
class Parts:
    """The modules that are captured in place of their model.

    Attributes:
        calls: name of the part for each captured call, in the order of the run; a part that is called with several
            signatures (other shapes, other options) is listed once for each.
        pinned: canonical name of a parameter or buffer of a part -> the reason why it must stay whole: something
            outside the parts holds or reads it.
    """

    calls: tuple[str, ...]
    pinned: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, each once, in order of their first call."""
        return tuple(dict.fromkeys(self.calls))

    def of(self, name: str) -> "Parts":
        """Return one of the parts alone, with all of its calls."""
        return Parts(tuple(call for call in self.calls if call == name), self.pinned)


class PartRun(nn.Module):
    """A module that makes the captured calls of a model's parts.

    Its modules, parameters and buffers are the model's own, under their own names. Its forward takes `(args, kwargs)`
    for each captured call and returns the results of all of them.
    """

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training"):
            vars(self)[name] = getattr(model, name)
        self._origin = (model,)  # a tuple, so that it is no child: its modules have their names already
        self.parts = parts

    def forward(self, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, ...]:
        """Return the results of the calls, in order."""
        results = []
        for name, (args, kwargs) in zip(self.parts.calls, calls, strict=True):
            results.append(self._origin[0].get_submodule(name)(*args, **kwargs))
        return tuple(results)


def whole_model(model: nn.Module) -> nn.Module:
    """Return the model that a `PartRun` belongs to; any other module itself. A copied `PartRun` belongs to the copy."""
    return model._origin[0] if isinstance(model, PartRun) else model


def is_in_parts(name: str, parts: Parts | None) -> bool:
    """Return whether a qualified name lies in one of the parts; True for any name where there are no parts."""
    return parts is None or any(name == part or name.startswith(f"{part}.") for part in parts.names)


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
class AffineSize:
    """A size that is `times * batch + plus`."""

    times: int
    plus: int

    def __str__(self) -> str:
        """Format the size as in "2*batch+1"."""
        product = "batch" if self.times == 1 else f"{self.times}*batch"
        return f"{product}{self.plus:+d}" if self.plus else product

    def at(self, batch: int) -> int:
        """Return the size at a batch."""
        return self.times * batch + self.plus


def affine_size(sizes: tuple[int, int], batches: tuple[int, int]) -> AffineSize | None:
    """Return a size as a function of the batch, from its values at two batches.

    A line goes through any two points, so only lines of whole numbers are taken that do not cross zero from a batch of
    1 on: the batch, its windows, heads or tokens, some rows more or one less. A square is no such line.

    Args:
        sizes: the size at each of the batches.
        batches: two batches.

    Returns:
        The size; None if it does not depend on the batch in this way.
    """
    times, rest = divmod(sizes[0] - sizes[1], batches[0] - batches[1])
    plus = sizes[0] - times * batches[0]
    crosses_zero = (times + plus) * times < 0
    return None if rest or not times or crosses_zero else AffineSize(times, plus)


@dataclass(frozen=True, slots=True)
class Cost:
    """Size and work of a model.

    Attributes:
        n_params: number of parameter elements, tied ones counted once.
        macs: multiply-accumulate operations of one sample (of the whole example where the batch is not free);
            convolutions and matrix products only, biases, norms and activations not counted.
        size_bytes: bytes of all tensors, by their dtypes: parameters, buffers and constants, tied ones counted once.
    """

    n_params: int
    macs: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class DynamicShapes:
    """Shapes that depend on the batch, as two captures at different batches show.

    Attributes:
        batches: batch of the capture whose graph is kept, and of the other capture.
        other: name of a node -> its shape, or shapes, in the other capture; only of nodes whose shape differs there.
    """

    batches: tuple[int, int]
    other: Mapping[str, Any]


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
        dynamic_shapes: shapes that depend on the batch; None if the batch is static.
        training: the same model captured in train mode, if that reads parameters or buffers which the eval graph does
            not read, as auxiliary heads are, or gives other outputs, as raw maps for a loss are; else None.
        omitted_outputs: names and types of outputs that are not captured: objects that torch.export does not know,
            such as a cache of keys and values.
        has_assumed_branches: whether every `if` on a value of a tensor was answered with no during capture, since
            torch.export could not capture both branches. Such a graph says what depends on what, and is not to be run.
        parts: the modules that were captured, if the model was not captured whole. The graph then holds all of their
            calls one after another; its inputs are `(args, kwargs)` of each call, its outputs the results of all.
        functions: calls of functions that define their own backward (`torch.autograd.Function`), of which the graph
            holds the operators only.
        signature: signature of the model's forward.
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
    dynamic_shapes: DynamicShapes | None = None
    training: "Graph | None" = None
    omitted_outputs: tuple[str, ...] = ()
    has_assumed_branches: bool = False
    parts: Parts | None = None
    functions: tuple[FunctionCall, ...] = ()
    signature: inspect.Signature = _ANY_CALL

    def __iter__(self) -> Iterator[fx.Node]:
        return iter(self.fx_graph.nodes)

    def __len__(self) -> int:
        return len(self.fx_graph.nodes)

    def __repr__(self) -> str:
        name = self.model_type.rpartition(".")[2]
        return f"<Graph of {name} in {self.mode} mode: {len(self)} nodes, {len(self.state)} tensors>"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of operators, arguments and shapes: equal for two models that are the same network.

        Devices and types make no difference: they are left out, and so are calls that return their operand in another
        type or layout, which torch.export keeps or drops depending on the device.
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

    def is_dynamic(self, node: fx.Node, dim: Dim) -> bool:
        """Return whether a size of a node's value depends on the batch or on data."""
        size, other = self._sizes(node, dim)
        return isinstance(size, torch.SymInt) or size != other

    def batch_formula(self, node: fx.Node, dim: Dim) -> AffineSize | None:
        """Return a dynamic size as a function of the batch; None if there is no simple one, or it depends on data."""
        size, other = self._sizes(node, dim)
        if self.dynamic_shapes is None or other is None or isinstance(size, torch.SymInt):
            return None
        return affine_size((size, other), self.dynamic_shapes.batches)

    def _sizes(self, node: fx.Node, dim: Dim) -> tuple[Any, int | None]:
        """Return a size of a node's value in the graph and in the other capture; None where the value is no tensor."""
        value = node.meta.get("val")
        shape = self.dynamic_shapes.other.get(node.name) if self.dynamic_shapes is not None else None
        if not isinstance(dim, int):
            number, dim = dim
            value = value[number] if isinstance(value, list | tuple) else None
            shape = None if shape is None else shape[number]
        size = value.shape[dim] if isinstance(value, Tensor) else None
        return size, size if shape is None or size is None else int(shape[dim])

    @property
    def lost_backwards(self) -> tuple[FunctionCall, ...]:
        """Calls of functions whose gradients are not those of the operators in the graph."""
        return tuple(call for call in self.functions if call.has_own_backward)

    def describe_inputs(self) -> dict[str, str]:
        """Return a phrase for messages for each input, by the name of its node."""
        nodes = [node for node in self.fx_graph.nodes if node.op == "placeholder"]
        parts = self._repeat_parts([len(pytree.tree_leaves(given)) for given in self.inputs.args])
        return {
            node.name: f"input of part {parts[number]!r}" if parts else f"model input {node.name!r}"
            for number, node in enumerate(nodes)
        }

    def output_parts(self) -> list[str]:
        """Return the part that gives each of the flat outputs; [] where the model was captured whole."""
        return self._repeat_parts([spec.num_leaves for spec in self.out_spec.children()])

    def _repeat_parts(self, counts: list[int]) -> list[str]:
        """Return the part of each flat input or output, from their number in each call."""
        calls = self.parts.calls if self.parts is not None else ()
        return [part for part, count in zip(calls, counts, strict=False) for _ in range(count)]

    def n_params(self) -> int:
        """Return the number of parameter elements, tied parameters counted once."""
        return sum(entry.tensor.numel() for entry in self.state.values() if entry.kind == "parameter")


def shape_with_batch(graph: Graph, node: fx.Node) -> tuple[int | None, ...]:
    """Return the sizes of a node's value, with None for those that depend on the batch."""
    return tuple(None if graph.is_dynamic(node, dim) else size for dim, size in enumerate(shape_of(node)))


def output_nodes(graph: Graph) -> list[tuple[str, Any]]:
    """Return the name of each output of a graph with its node, or with its value if it is a constant."""
    end = next(node for node in reversed(graph.fx_graph.nodes) if node.op == "output")
    values = pytree.tree_leaves(end.args[0], is_leaf=lambda value: isinstance(value, fx.Node))
    return list(zip(output_names(graph.out_spec), values, strict=True))


def check_outputs(graph: Graph, given: object) -> tuple[str, ...]:
    """Return the names or patterns of outputs that may shrink, after checking that each fits an output.

    Raises:
        ArgumentError: one fits no output (the message lists the outputs with their shapes), or the graph is of parts.
    """
    patterns = parse_names("prunable_outputs", given)
    if patterns and graph.parts is not None:
        raise ArgumentError(
            f"prunable_outputs={list(patterns)!r} with submodules; outputs of parts keep their shapes, since the rest "
            f"of the model reads them. Leave prunable_outputs out."
        )
    phrases: dict[str, str] = {}
    for one, suffix in ((graph, ""), (graph.training, " in train mode")) if patterns else ():
        for name, value in output_nodes(one) if one is not None else ():
            shape = "(no tensor)"
            if one is not None and isinstance(value, fx.Node) and isinstance(shape_of(value), tuple):
                sizes = ("batch" if size is None else str(size) for size in shape_with_batch(one, value))
                shape = f"({', '.join(sizes)})"
            phrases.setdefault(name, f"{name} {shape}{suffix}")
    for pattern in patterns:
        if not any(matches(pattern, name) for name in phrases):
            known = ", ".join(list(phrases.values())[:40])
            raise ArgumentError(
                f"prunable_outputs: {pattern!r} fits no output of {graph.model_type}, which has {known}"
                f"{', ...' if len(phrases) > 40 else ''}. Name one of these, or a pattern such as 'features.*'."
                f"{close_names(pattern, phrases)}"
            )
    return patterns
