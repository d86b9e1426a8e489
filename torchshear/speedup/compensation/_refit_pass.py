"""Refit of a shrunk model: every layer is fitted, in the order of the graph, to give what it gave before the cut.

The captured graph and the graph of the smaller network are interpreted side by side, node by node, with all batches at
each node. At a linear layer the smaller network knows its inputs, all layers before it being refitted, and the original
knows the output that is wanted: one linear system. Errors of earlier layers are so corrected by later ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.calibration._progress import Progress, with_progress
from torchshear.calibration._samples import HELD_OUT, SampleSplit, output_nodes
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.graph._nodes import is_from_state, is_only_read, is_written
from torchshear.graph._operator_record import operator_of
from torchshear.graph._run import interpret
from torchshear.speedup.compensation._frontier import Frontier, Values
from torchshear.speedup.compensation._layer_fits import LayerFits
from torchshear.speedup.compensation._refit_record import Refit
from torchshear.speedup.rewriting._rewrite import rewrite_graph

State = dict[str, Tensor]


class RefitPass:
    """One pass over the original and the smaller network.

    Args:
        groups: the analysed original.
        cut: the units that were removed.
        dense: canonical name -> tensor of the original.
        small: canonical name -> tensor of the smaller network; entries are replaced as layers are fitted.
        batches: flat inputs of each batch.
        memory: how many bytes values of nodes may take in memory; those beyond go to files.
        progress: see `torchshear.collect`.

    Attributes:
        smaller: graph of the smaller network.
        split: samples of the batches.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        cut: Cut,
        dense: Mapping[str, Tensor],
        small: State,
        batches: Sequence[list[Any]],
        memory: int,
        progress: Progress,
    ) -> None:
        self.groups = groups
        self.smaller = rewrite_graph(groups.graph.fx_graph, groups.facts, cut)
        self.dense_state, self.small_state = dense, small
        self.batches, self.memory, self.progress = batches, memory, progress
        self.split = SampleSplit.of(groups.graph, batches)
        self.fits = LayerFits(groups, cut, list(self.smaller.nodes), dense, small, self.split)
        self._inputs = [node for node in groups.graph if node.op == "placeholder"]
        self._nodes = {node.name: node for node in self.smaller.nodes}
        self._sources = [node for node in self.smaller.nodes if node.op == "get_attr"]

    def run(self) -> tuple[list[Any], list[Any]]:
        """Fit all layers, and return the outputs for each batch: of the original at kept positions, and of the smaller.

        Weights that several calls read are fitted after a first walk over the graphs, and all others in a second one.
        """
        outputs = self._walk()
        shared = self.fits.fit_shared()
        for name, value in shared.items():
            self._store(name, value)
        return self._walk() if shared else outputs

    def _walk(self) -> tuple[list[Any], list[Any]]:
        """Walk over both graphs once; values are dropped after their last reader in either network."""
        graph = self.groups.graph
        originals = {node.name: node for node in graph.fx_graph.nodes}
        nodes = list(self.smaller.nodes)
        readers = [*nodes, *(originals[node.name] for node in nodes if node.name in originals)]
        order = {node.name: number for number, node in enumerate(nodes)}
        last: dict[str, int] = {}
        for reader in readers:
            for operand in (each for own in reader.all_input_nodes for each in _with_sources(own)):
                last[operand.name] = max(last.get(operand.name, 0), order[reader.name])
        for node in originals.values():
            logits = self.fits.logits_of(node.name)
            if logits is not None:
                again = [operand.name for name in logits.recomputed() for operand in self._nodes[name].all_input_nodes]
                for name in (*logits.needed(), *again):
                    last[name] = max(last.get(name, 0), order[node.name])
        leaves = [leaf for leaves in self.batches for leaf in leaves if isinstance(leaf, Tensor)]
        state = (*leaves, *self.dense_state.values(), *self.small_state.values())
        with Frontier(self.memory, last, state) as frontier:
            work = with_progress(nodes[:-1], len(nodes) - 1, "refitting", self.progress)  # without the output
            for number, node in enumerate(work):
                self._step(originals.get(node.name), node, frontier)
                for name in [name for name in frontier.small if last.get(name, 0) <= number]:
                    frontier.drop(name)
            outputs, batches = output_nodes(graph), range(len(self.batches))
            wanted = [[self.fits.kept(node, _value_of(node, frontier.dense, n)) for node in outputs] for n in batches]
            return wanted, [[_value_of(node, frontier.small, n) for node in outputs] for n in batches]

    def outputs_of(self, state: State) -> list[Any]:
        """Run the smaller network with other tensors on all batches, with the random numbers that `run` draws."""
        found: list[Any] = []
        for number, leaves in enumerate(self.batches):
            values = interpret(
                self.smaller,
                [_clone(leaf) for leaf in leaves],
                load=lambda name: state[name].detach().clone(),
                apply=lambda node, args, kwargs: _call(node, args, kwargs, number),  # noqa: B023
            )
            for _, latest in values:
                output = latest
            found.append(pytree.tree_leaves(output))
        return found

    def record(self, error_before: float, error_after: float) -> Refit:
        """Return the result, with the errors of the outputs before and after; worse ones are not kept."""
        n_held_out = self.split.n_samples // HELD_OUT
        return Refit(
            layers=tuple(self.fits.layers),
            skipped=tuple(dict.fromkeys(self.fits.skipped)),
            n_samples=self.split.n_samples - n_held_out,
            n_held_out=n_held_out,
            error_before=error_before,
            error_after=error_after,
            is_kept=error_after <= error_before,
        )

    def _step(self, original: fx.Node | None, node: fx.Node, frontier: Frontier) -> None:
        """Compute a node in both networks, and fit it first if it is a layer. Some nodes scale sizes in one alone."""
        dense, small = frontier.dense, frontier.small
        if original is None:
            small[node.name] = self._call_all(node, small, frontier)
        elif node.op in ("placeholder", "get_attr"):
            dense[node.name], small[node.name] = self._load(original)
        elif self._is_shared(original, node, frontier) and not self.fits.needs_fit(original, frontier):
            dense[node.name] = small[node.name] = self._call_all(original, dense, frontier)
        else:
            dense[node.name] = self._call_all(original, dense, frontier)
            self._fit_logits(original, frontier)
            present = self._call_all(node, small, frontier) if operator_of(original).norm is not None else None
            fitted = self.fits.fit(original, node, frontier, present)
            for name, value in fitted.items():
                self._set(name, value, frontier)
            is_known = present is not None and not fitted
            small[node.name] = present if is_known and present else self._call_all(node, small, frontier)

    def _fit_logits(self, original: fx.Node, frontier: Frontier) -> None:
        """Fit the layers in front of a product of queries and keys to it, and compute anew what they give."""
        fitted = self.fits.fit_logits(original, frontier)
        for name, value in fitted.items():
            self._set(name, value, frontier)
        logits = self.fits.logits_of(original.name)
        for name in logits.recomputed() if fitted and logits is not None else ():
            frontier.small[name] = self._call_all(self._nodes[name], frontier.small, frontier)

    def _call_all(self, node: fx.Node, values: Mapping[str, Values], frontier: Frontier) -> Values:
        """Compute a call in every batch."""

        def compute(number: int) -> Any:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: values[operand.name][number])
            return _call(node, args, kwargs, number)

        return frontier.collect(compute, len(self.batches), can_move=not is_written(node))

    def _load(self, node: fx.Node) -> tuple[Values, Values]:
        """Return the values of an input, a parameter or a buffer in both networks; the same object where they agree."""
        if node.op == "placeholder":
            number = self._inputs.index(node)
            leaves = Values(leaves[number] for leaves in self.batches)
            if not is_written(node):
                return leaves, leaves
            return Values(map(_clone, leaves)), Values(map(_clone, leaves))
        name = str(node.target)
        is_shared = is_only_read(node)

        def load(tensor: Tensor) -> Values:
            return Values(
                tensor.detach() if is_shared and tensor.ndim > 1 else tensor.detach().clone() for _ in self.batches
            )

        dense, small = self.dense_state[name], self.small_state[name]
        values = load(dense)
        is_same = dense.shape == small.shape and not is_written(node) and torch.equal(dense, small)
        return values, values if is_same else load(small)

    def _is_shared(self, original: fx.Node, node: fx.Node, frontier: Frontier) -> bool:
        """Check that a call gives the same in both networks: same operands, same arguments, in memory that stays."""
        if is_written(original) or any(
            frontier.small[operand.name] is not frontier.dense.get(operand.name) for operand in node.all_input_nodes
        ):
            return False
        one, other = (fx.map_arg((of.args, dict(of.kwargs)), lambda operand: operand.name) for of in (original, node))
        return original.target == node.target and bool(one == other)

    def _store(self, name: str, value: Tensor) -> None:
        """Replace a tensor of the smaller network."""
        old = self.small_state[name]
        self.small_state[name] = value.detach().reshape(old.shape).to(old)

    def _set(self, name: str, value: Tensor, frontier: Frontier) -> None:
        """Replace a tensor of the smaller network, and what calls read of it from now on."""
        small = frontier.small
        self._store(name, value)
        stale = [node for node in self._sources if str(node.target) == name and node.name in small]
        for source in stale:
            small[source.name] = Values(self.small_state[name] for _ in self.batches)
        while stale:  # calls that move the dimensions of a weight, or take a part of it, before its layer reads it
            for user in stale.pop().users:
                if user.name in small and is_from_state(user):
                    small[user.name] = self._call_all(user, small, frontier)
                    stale.append(user)


def _call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> Any:
    """Make a call in a batch; both networks draw the same random numbers, as far as they are alike."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        torch.manual_seed(crc32(f"{node.name} {number}".encode()))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _with_sources(operand: fx.Node) -> Iterator[fx.Node]:
    """Give an operand and, if it is a part of a tensor of the model, all that it is taken out of."""
    yield operand
    while is_from_state(operand) and len(operand.all_input_nodes) == 1:
        (operand,) = operand.all_input_nodes
        yield operand


def _value_of(node: Any, values: Mapping[str, Values], number: int) -> Any:
    """Return an output of a batch: the value of a node, or a number."""
    return values[node.name][number] if isinstance(node, fx.Node) else node


def _clone(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)
