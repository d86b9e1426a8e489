"""Activations that candidates of a search have in common: kept, and not computed again.

Up to the first layer in which two candidates differ, both compute the same from the same inputs. The calls of a
candidate's graph are therefore run from the last place on at which another candidate, of equal calls and weights up to
there, has left its values for these inputs.
"""

import copy
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError
from torchshear.graph._graph import Graph
from torchshear.graph._nodes import is_written
from torchshear.speedup.rewriting._traced import follow_device

DEFAULT_BYTES: Final = 2 * 10**9
Values = dict[fx.Node, Any]


def feed_tensor(digest: Any, tensor: Tensor) -> None:
    """Put type, shape and values of a tensor into a hash."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(np.ascontiguousarray(flat.view(torch.uint8).numpy()).data)


def check_reusable(graph: Graph) -> None:
    """Refuse networks whose calls cannot be run one by one.

    Raises:
        ArgumentError: the network was captured in parts, or in a way in which it does not run.
    """
    why = "was captured in parts" if graph.parts is not None else ""
    if graph.has_assumed_branches:
        why = "decides by values of tensors what it runs"
    if why:
        raise ArgumentError(f"reuse_activations=True, and {graph.model_type} {why}. Leave reuse_activations away.")


@dataclass(slots=True)
class _Kept:
    """Values at a place by the names of their nodes, their size in bytes, and the candidate that read them last."""

    values: dict[str, Any]
    n_bytes: int
    last_read: int


@dataclass(slots=True)
class ActivationStore:
    """Values inside candidates, by what computes them and the inputs.

    Attributes:
        limit: bytes that they may take.
        starts: for each searched group the names of its tensors; values are kept before the first call that reads one.
        n_calls: calls of operators in all evaluations so far.
        n_skipped: those of them whose results were at hand.
    """

    limit: int
    starts: Sequence[Collection[str]]
    n_calls: int = 0
    n_skipped: int = 0
    _candidate: int = 0
    _first_seen: dict[bytes, int] = field(default_factory=dict, repr=False)
    _kept: dict[tuple[bytes, bytes], _Kept] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, groups: ChannelGroups, names: Collection[str], limit: int | None) -> "ActivationStore":
        """Make an empty store for a search over the groups of these names."""
        starts = [{member.name for member in group.members} for group in groups if group.name in names]
        return cls(DEFAULT_BYTES if limit is None else limit, starts)

    def __str__(self) -> str:
        share = self.n_skipped / max(self.n_calls, 1)
        return f"{share:.0%} of the calls of operators in evaluations were not run, since activations were reused."

    def next_run(self, graph: fx.Graph) -> "ReusingRun":
        """Return what runs the next candidate's graph."""
        self._candidate += 1
        return ReusingRun(graph, self)

    def is_shared(self, prefix: bytes) -> bool:
        """Return whether an earlier candidate has these calls and weights as well."""
        return self._first_seen.setdefault(prefix, self._candidate) < self._candidate

    def find(self, prefix: bytes, inputs: bytes) -> dict[str, Any] | None:
        """Return copies of the values after some calls on some inputs; None if they are not kept."""
        kept = self._kept.get((prefix, inputs))
        if kept is None:
            return None
        kept.last_read = self._candidate
        return copy.deepcopy(kept.values)

    def keep(self, prefix: bytes, inputs: bytes, values: dict[str, Any]) -> None:
        """Keep copies of values, if there is room beside those that were read in the last round of candidates."""
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in pytree.tree_leaves(values)
            if isinstance(value, Tensor)
        }
        n_bytes, used = sum(storages.values()), sum(one.n_bytes for one in self._kept.values())
        for key, one in sorted(self._kept.items(), key=lambda item: item[1].last_read):
            if used + n_bytes <= self.limit or one.last_read + len(self.starts) >= self._candidate:
                break
            del self._kept[key]
            used -= one.n_bytes
        if used + n_bytes <= self.limit:
            self._kept[prefix, inputs] = _Kept(copy.deepcopy(values), n_bytes, self._candidate)


class ReusingRun:
    """Graph of a candidate that is run from the last place whose values are at hand; called as `GraphCode` is.

    Args:
        graph: calls in execution order.
        store: values that candidates share.
    """

    def __init__(self, graph: fx.Graph, store: ActivationStore) -> None:
        tensors = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
        self._writes_tensors = any(map(is_written, tensors))
        follow_device(graph)
        self._store = store
        nodes = list(graph.nodes)
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        self._state = [node for node in nodes if node.op == "get_attr"]
        self._calls = [node for node in nodes if node.op == "call_function"]
        self._output = nodes[-1]
        position = {node: number for number, node in enumerate(self._calls)} | {self._output: len(self._calls)}
        self._users = {node: [position[user] for user in node.users] for node in nodes}
        self._last_use = {node: max(users, default=-1) for node, users in self._users.items()}
        self._alive = {
            place: [node for node in self._calls[:place] if self._last_use[node] >= place]
            for place in self._find_places()
        }
        self._read: list[tuple[Tensor, int]] = []
        self._prefixes: dict[int, bytes] = {}

    def _find_places(self) -> list[int]:
        """Return the positions of calls before which values are kept, ascending.

        There are none where calls write to weights or inputs, or hold graphs, and none after random numbers.
        """
        if self._writes_tensors:
            return []
        readers = {str(node.target): self._users[node] for node in self._state}
        found = {min((p for name in names for p in readers.get(name, ())), default=0) for names in self._store.starts}
        last = len(self._calls)
        for position, node in enumerate(self._calls):
            target: Any = node.target
            if isinstance(target, torch._ops.HigherOrderOperator) or (
                isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
            ):
                last = position
                break
        return sorted(place for place in found if 0 < place <= last)

    def __call__(self, module: nn.Module, *leaves: Any) -> Any:
        """Run what is not at hand."""
        store = self._store
        values: Values = dict(zip(self._inputs, leaves, strict=True))
        values |= {node: attrgetter(str(node.target))(module) for node in self._state}
        prefixes: dict[int, bytes] = {}
        inputs, first = b"", 0
        if not any(isinstance(one, Tensor) and one.requires_grad for one in values.values()):
            prefixes, inputs = self._prefixes_of([values[node] for node in self._state]), _digest_inputs(leaves)
        for place, prefix in reversed(prefixes.items()):
            known = store.find(prefix, inputs)
            if known is not None:
                first = place
                values |= {node: known[node.name] for node in self._alive[place]}
                break
        shared = {place for place, prefix in prefixes.items() if store.is_shared(prefix) and place > first}
        store.n_calls += len(self._calls)
        store.n_skipped += first
        for position in range(first, len(self._calls)):
            node = self._calls[position]
            if position in shared:
                store.keep(prefixes[position], inputs, {one.name: values[one] for one in self._alive[position]})
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            for operand in {node, *node.all_input_nodes}:
                if self._last_use[operand] <= position:
                    del values[operand]
        return fx.map_arg(self._output.args[0], values.__getitem__)

    def _prefixes_of(self, tensors: list[Tensor]) -> dict[int, bytes]:
        """Return a hash for each place of all calls before it and the weights that they read."""
        read = [(tensor, tensor._version) for tensor in tensors]
        if len(read) != len(self._read) or any(
            a[0] is not b[0] or a[1] != b[1] for a, b in zip(read, self._read, strict=True)
        ):
            weights = dict(zip(self._state, tensors, strict=True))
            digest, self._read, self._prefixes = hashlib.blake2b(), read, {}
            for position, node in enumerate(self._calls[: max(self._alive, default=0) + 1]):
                if position in self._alive:
                    self._prefixes[position] = digest.digest()
                digest.update(f"{node.name} {node.target} {node.args} {node.kwargs}".encode())
                for operand in node.all_input_nodes:
                    if operand in weights:
                        feed_tensor(digest, weights.pop(operand))
        return self._prefixes


def _digest_inputs(leaves: Sequence[Any]) -> bytes:
    """Return a hash of inputs, and of the modes that change what calls on them give."""
    digest = hashlib.blake2b()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.device} {leaf.stride()}".encode())
            feed_tensor(digest, leaf)
            modes = torch.is_autocast_enabled(leaf.device.type), torch.get_autocast_dtype(leaf.device.type)
            digest.update(repr(modes).encode())
        else:
            digest.update(repr(leaf).encode())
    digest.update(f"{torch.is_inference_mode_enabled()}".encode())
    return digest.digest()
