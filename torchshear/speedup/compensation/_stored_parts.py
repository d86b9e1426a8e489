"""Tensors of the model as calls read them: whole, or a part of one that is cut out before."""

import hashlib
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, fx

from torchshear.dependency.rules._weights import unwrap_moves, weight_behind
from torchshear.graph._nodes import is_from_state, shape_of
from torchshear.graph._operator_record import operator_name, operator_of

SPLITS: Final = frozenset(
    f"aten.{name}"
    for name in (
        *("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind"),
        *("hsplit", "vsplit", "dsplit"),
    )
)


@dataclass(frozen=True, slots=True, eq=False)
class StoredPart:
    """A tensor of the model, or a part of one.

    Attributes:
        tensor: canonical name of the tensor.
        calls: calls of the smaller network that take the part out of the tensor, in order; empty for a whole one, whose
            dimensions may be moved by what reads it.
        key: tells parts apart: two of a tensor that hold the same numbers have the same one.
        form: tells in which order and shape a part has its numbers.
        problem: the reason why it cannot be written to; "" if it can.
    """

    tensor: str
    calls: tuple[fx.Node, ...] = ()
    key: tuple[str, str] = ("", "")
    form: str = ""
    problem: str = ""

    @property
    def is_whole(self) -> bool:
        """Return whether it is a tensor as it is stored."""
        return not self.calls

    def read(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return its values.

        Args:
            state: canonical name -> tensor of the smaller network.
        """
        return _take(self.calls, state[self.tensor].detach())

    def write(self, state: Mapping[str, Tensor], found: MutableMapping[str, Tensor], value: Tensor) -> None:
        """Put new values into a copy of its tensor.

        Args:
            state: canonical name -> tensor of the smaller network.
            found: canonical name -> new tensor; where its own is among them already, that one gets the values.
            value: the values, in the shape in which it is read.
        """
        old = found.get(self.tensor, state[self.tensor]).detach()
        if self.is_whole:
            found[self.tensor] = value.reshape(old.shape)
            return
        places = _places(self.calls, old).flatten().to(old.device)
        flat = old.flatten().clone()
        flat[places] = value.flatten().to(flat)
        found[self.tensor] = flat.reshape(old.shape)


class StoredParts:
    """The tensors and parts of tensors that calls of a network read.

    Args:
        original: nodes of the captured network.
        smaller: nodes of the smaller one, which have the same names.
        state: canonical name -> tensor of the smaller network.
    """

    def __init__(self, original: Iterable[fx.Node], smaller: Iterable[fx.Node], state: Mapping[str, Tensor]) -> None:
        by_name = {node.name: node for node in smaller}
        self._by_operand: dict[str, StoredPart] = {}
        self._reads: Counter[tuple[str, str]] = Counter()
        self._layers: Counter[tuple[str, str]] = Counter()
        self._of_tensor: Counter[str] = Counter()
        readers = [node for node in original if not _is_taken(node)]
        operands = {operand.name: operand for node in readers for operand in node.all_input_nodes}
        for name, operand in operands.items():
            part = _part_behind(operand, by_name, state)
            if part is not None:
                self._by_operand[name] = part
        self._refuse_overlaps(state)
        for node in readers:
            for operand in node.all_input_nodes:
                part = self._by_operand.get(operand.name)
                if part is not None:
                    self._reads[part.key] += 1
                    self._layers[part.key] += operator_of(node).product is not None or is_einsum(node)
                    self._of_tensor[part.tensor] += 1

    def behind(self, operand: fx.Node) -> StoredPart | None:
        """Return what an operand of a call holds of a tensor of the model; None where it is anything else."""
        return self._by_operand.get(operand.name)

    def n_reads(self, part: StoredPart) -> int:
        """Return how many calls read a part."""
        return self._reads[part.key]

    def n_layers(self, part: StoredPart) -> int:
        """Return how many of these calls multiply it with something."""
        return self._layers[part.key]

    def n_reads_of(self, tensor: str) -> int:
        """Return how many calls read a tensor, or parts of it."""
        return self._of_tensor[tensor]

    def _refuse_overlaps(self, state: Mapping[str, Tensor]) -> None:
        """Say of parts that share some of their numbers with others, or hold one several times, that they stay."""
        by_tensor: dict[str, dict[tuple[str, str], StoredPart]] = {}
        for part in self._by_operand.values():
            by_tensor.setdefault(part.tensor, {})[part.key] = part
        problems: dict[tuple[str, str], str] = {}
        text = "its weight is a part of {!r} that overlaps with other parts or holds numbers twice"
        for tensor, parts in by_tensor.items():
            if all(part.is_whole for part in parts.values()):
                continue
            counts = torch.zeros(state[tensor].numel(), dtype=torch.int32)
            held = {key: _places(part.calls, state[tensor]).flatten() for key, part in parts.items()}
            for places in held.values():
                counts += torch.bincount(places, minlength=len(counts)).int()
            for key, places in held.items():
                if bool((counts[places] > 1).any()):
                    problems[key] = text.format(tensor)
        for name, part in self._by_operand.items():
            if part.key in problems:
                self._by_operand[name] = replace(part, problem=problems[part.key])


def is_einsum(node: fx.Node) -> bool:
    """Check that a call is an einsum."""
    return node.op == "call_function" and operator_name(node) == "aten.einsum.default"


def _part_behind(operand: fx.Node, by_name: Mapping[str, fx.Node], state: Mapping[str, Tensor]) -> StoredPart | None:
    """Return what an operand holds of a tensor of the model."""
    whole = weight_behind(operand, {})
    if whole is not None and None not in whole[1] and len(whole[1]) == len(shape_of(whole[0])):
        name = str(whole[0].target)
        return StoredPart(name, key=(name, ""))
    calls: list[fx.Node] = []
    base = operand
    while _is_taken(base):
        calls.append(base)
        base = base.all_input_nodes[0]
    if (
        base.op != "get_attr"
        or not isinstance(operand.meta.get("val"), Tensor)
        or any(node.name not in by_name for node in calls)
    ):
        return None
    name = str(base.target)
    own = tuple(by_name[node.name] for node in reversed(calls))
    if any(len(node.all_input_nodes) != 1 for node in own):  # a size that is computed
        return None
    taken = _places(own, state[name])
    places = taken.flatten()
    key = "" if len(places) == state[name].numel() else _digest(places.sort().values)
    return StoredPart(name, own, (name, key), f"{tuple(taken.shape)} {_digest(places)}")


def _is_taken(node: fx.Node) -> bool:
    """Check that a call gives some or all values of a tensor of the model, in any order and shape."""
    if node.op != "call_function" or not is_from_state(node) or len(node.all_input_nodes) != 1:
        return False
    if node.args[0] is not node.all_input_nodes[0]:
        return False
    if node.target is operator.getitem:
        return _is_taken(node.all_input_nodes[0])
    if unwrap_moves(node)[0] is not node:
        return True
    return operator_of(node).passes == "layout" or ".".join(operator_name(node).split(".")[:2]) in SPLITS


def _take(calls: Iterable[fx.Node], tensor: Tensor) -> Tensor:
    """Make calls that take a part out of a tensor; conversions are left out."""
    value = tensor
    for node in calls:
        if operator_of(node).passes != "conversion":
            value = node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return value


def _places(calls: Iterable[fx.Node], tensor: Tensor) -> Tensor:
    """Return the place in the flattened tensor of each value of a part, in the shape of the part."""
    return _take(calls, torch.arange(tensor.numel()).reshape(tensor.shape))


def _digest(places: Tensor) -> str:
    return hashlib.sha256(places.numpy().tobytes()).hexdigest()
