"""Refit of a shrunk model: every layer is fitted, in the order of the graph, to give what it gave before the cut.

The captured graph and the graph of the smaller network are interpreted side by side, node by node, with all batches at
each node. At a linear layer the smaller network knows its inputs, all layers before it being refitted, and the original
knows the output that is wanted: one linear system. Errors of earlier layers are so corrected by later ones.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from zlib import crc32

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.calibration._processes import is_distributed, sum_over_processes
from torchshear.calibration._progress import Progress, with_progress
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules._call import bind_arguments
from torchshear.dependency.rules._weights import unwrap_moves
from torchshear.errors import DataError
from torchshear.graph._location import locate
from torchshear.graph._nodes import is_only_read, is_written
from torchshear.graph._operator_record import Norm, operator_of
from torchshear.graph._run import interpret
from torchshear.speedup.compensation._least_squares import Moments, fit_linear
from torchshear.speedup.compensation._linear_layer import MAX_UNKNOWNS, LinearLayer, linear_layer
from torchshear.speedup.compensation._norm_fit import AffineSums, fit_norm
from torchshear.speedup.compensation._refit_record import Refit, RefittedLayer, SkippedLayer
from torchshear.speedup.compensation._samples import (
    HELD_OUT,
    batch_dimension,
    count_samples,
    is_held_out,
    output_nodes,
    sample_numbers,
)
from torchshear.speedup.rewriting._rewrite import rewrite_graph
from torchshear.speedup.rewriting._slicing import map_axes, select_kept

State = dict[str, Tensor]
Values = list[Any]  # value of a node in each batch

ROWS_PER_UNKNOWN: Final = 8
MIN_ROWS: Final = 32768
MIN_SAMPLES: Final = 2 * HELD_OUT
_NO_VALUES: Final = "no sample that is fitted to, or none that is held out, gives it finite values"
_SAME: Final = 1e-10  # a relative squared error below this is rounding


class RefitPass:
    """One pass over the original and the smaller network.

    Args:
        groups: the analysed original.
        cut: the units that were removed.
        dense: canonical name -> tensor of the original.
        small: canonical name -> tensor of the smaller network; entries are replaced as layers are fitted.
        batches: flat inputs of each batch.
        progress: see `torchshear.collect`.

    Attributes:
        smaller: graph of the smaller network.
        layers: results so far.
        skipped: layers left alone so far.
        sizes: samples in each batch of this process.
        offsets: samples in the batches before each.
        n_samples: samples in all batches of this process.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        cut: Cut,
        dense: Mapping[str, Tensor],
        small: State,
        batches: Sequence[list[Any]],
        progress: Progress,
    ) -> None:
        self.groups, self.cut = groups, cut
        self.smaller = rewrite_graph(groups.graph.fx_graph, groups.facts, cut)
        self.dense_state, self.small_state = dense, small
        self.batches, self.progress = batches, progress
        self.layers: list[RefittedLayer] = []
        self.skipped: list[SkippedLayer] = []
        self.inputs = [node for node in groups.graph if node.op == "placeholder"]
        self.generator = torch.Generator().manual_seed(0)
        self.sources: list[fx.Node] = []
        self.sizes = [count_samples(groups.graph, leaves) for leaves in batches]
        self.offsets = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        self.n_samples = sum(self.sizes)
        if 0 in self.sizes:
            raise DataError(f"batch {self.sizes.index(0)} holds no sample; expected at least one.")
        if self.n_samples < MIN_SAMPLES:
            raise DataError(
                f"the data has {self.n_samples} samples; a refit needs at least {MIN_SAMPLES}, of which a quarter is "
                f"held out. Some hundred are better."
            )
        self.n_reads = _count_reads(groups.graph)

    def run(self) -> tuple[Values, Values]:
        """Fit all layers, and return the outputs for each batch: of the original at kept positions, and of the smaller.

        Values are dropped after their last reader in either network.
        """
        graph = self.groups.graph
        originals = {node.name: node for node in graph.fx_graph.nodes}
        nodes = list(self.smaller.nodes)
        self.sources = [node for node in nodes if node.op == "get_attr"]
        readers = [*nodes, *(originals[node.name] for node in nodes if node.name in originals)]
        order = {node.name: number for number, node in enumerate(nodes)}
        last: dict[str, int] = {}
        for reader in readers:
            for operand in reader.all_input_nodes:
                last[operand.name] = max(last.get(operand.name, 0), order[reader.name])
        dense: dict[str, Values] = {}
        small: dict[str, Values] = {}
        work = with_progress(nodes[:-1], len(nodes) - 1, "refitting", self.progress)  # without the output
        for number, node in enumerate(work):
            self._step(originals.get(node.name), node, dense, small)
            for name in [name for name in small if last.get(name, 0) <= number]:
                dense.pop(name, None)
                small.pop(name)
        outputs = output_nodes(graph)
        wanted = [[self._kept(node, _value_of(node, dense, n)) for node in outputs] for n in range(len(self.batches))]
        return wanted, [[_value_of(node, small, n) for node in outputs] for n in range(len(self.batches))]

    def outputs_of(self, state: State) -> Values:
        """Run the smaller network with other tensors on all batches, with the random numbers that `run` draws."""
        found: Values = []
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
        n_held_out = self.n_samples // HELD_OUT
        return Refit(
            layers=tuple(self.layers),
            skipped=tuple(dict.fromkeys(self.skipped)),
            n_samples=self.n_samples - n_held_out,
            n_held_out=n_held_out,
            error_before=error_before,
            error_after=error_after,
            is_kept=error_after <= error_before,
        )

    def _step(
        self, original: fx.Node | None, node: fx.Node, dense: dict[str, Values], small: dict[str, Values]
    ) -> None:
        """Compute a node in both networks, and fit it first if it is a layer. Some nodes scale sizes in one alone."""
        if original is None:
            small[node.name] = _call_all(node, small, len(self.batches))
        elif node.op in ("placeholder", "get_attr"):
            dense[node.name], small[node.name] = self._load(original)
        elif self._is_shared(original, node, dense, small):
            dense[node.name] = small[node.name] = _call_all(original, dense, len(self.batches))
        else:
            dense[node.name] = _call_all(original, dense, len(self.batches))
            self._fit(original, node, dense, small)
            small[node.name] = _call_all(node, small, len(self.batches))

    def _load(self, node: fx.Node) -> tuple[Values, Values]:
        """Return the values of an input, a parameter or a buffer in both networks; the same list where they agree."""
        if node.op == "placeholder":
            number = self.inputs.index(node)
            values = [leaves[number] for leaves in self.batches]
            if not is_written(node):
                return values, values
            return [_clone(value) for value in values], [_clone(value) for value in values]
        name = str(node.target)
        is_shared = is_only_read(node)

        def load(tensor: Tensor) -> Values:
            return [tensor.detach() if is_shared and tensor.ndim > 1 else tensor.detach().clone() for _ in self.batches]

        dense, small = self.dense_state[name], self.small_state[name]
        values = load(dense)
        is_same = dense.shape == small.shape and not is_written(node) and torch.equal(dense, small)
        return values, values if is_same else load(small)

    def _is_shared(
        self, original: fx.Node, node: fx.Node, dense: Mapping[str, Values], small: Mapping[str, Values]
    ) -> bool:
        """Check that a call gives the same in both networks: same operands, same arguments, in memory that stays."""
        if is_written(original) or any(
            small[operand.name] is not dense.get(operand.name) for operand in node.all_input_nodes
        ):
            return False
        one, other = (fx.map_arg((of.args, dict(of.kwargs)), lambda operand: operand.name) for of in (original, node))
        return original.target == node.target and bool(one == other)

    def _fit(self, original: fx.Node, node: fx.Node, dense: Mapping[str, Values], small: dict[str, Values]) -> None:
        """Fit the layer that a call is, if it is one, before the smaller network computes it."""
        norm = operator_of(original).norm
        if norm is not None:
            self._fit_norm(original, node, norm, dense, small)
            return
        layer = linear_layer(original, node, self.groups.facts.carriers, self.n_reads, self.groups.graph.batch_hint)
        if isinstance(layer, str):
            if layer:
                self.skipped.append(SkippedLayer(_module_of(original), layer))
            return
        weight = layer.to_matrix(self.small_state[layer.weight].detach())
        if weight.shape[2] > MAX_UNKNOWNS:
            reason = f"it has {weight.shape[2]:,} unknowns for each output; at most {MAX_UNKNOWNS:,} are fitted"
            self.skipped.append(SkippedLayer(_module_of(original), reason))
            return
        norm_behind = self._batch_norm_behind(original) if not layer.bias else None
        bias = weight.new_zeros(weight.shape[:2])
        if layer.bias:
            bias = self.small_state[layer.bias].detach().reshape(bias.shape)
        fitting, held_out = self._moments(original, layer, weight, dense, small)
        if not fitting.n or not held_out.n:
            self.skipped.append(SkippedLayer(_module_of(original), _NO_VALUES))
            return
        fit = fit_linear(fitting, held_out, weight, bias, bool(layer.bias or norm_behind))
        if fit.ridge is None or fit.error_before < _SAME:
            self.layers.append(RefittedLayer(_module_of(original), "linear", fit.error_before, fit.error_before, ""))
            return
        self.layers.append(
            RefittedLayer(_module_of(original), "linear", fit.error_before, fit.error_after, "least squares")
        )
        self._set(layer.weight, layer.to_weight(fit.weight, self.small_state[layer.weight]), small)
        if layer.bias:
            self._set(layer.bias, fit.bias.reshape(-1), small)
        elif norm_behind:
            self._set(norm_behind, self.small_state[norm_behind].double() - fit.bias.reshape(-1), small)

    def _moments(
        self,
        original: fx.Node,
        layer: LinearLayer,
        weight: Tensor,
        dense: Mapping[str, Values],
        small: Mapping[str, Values],
    ) -> tuple[Moments, Moments]:
        """Sum up rows of a layer, apart for samples to fit to and for samples held out."""
        n_groups, n_out, n_in = weight.shape
        both = Moments(n_groups, n_in, n_out, weight.device), Moments(n_groups, n_in, n_out, weight.device)
        n_rows = -(-max(MIN_ROWS, ROWS_PER_UNKNOWN * n_in) // len(self.batches))
        taps = [self.small_state[layer.weight].shape[dim] for dim in layer.order][2:] if layer.n_dims else []
        for number, (size, offset) in enumerate(zip(self.sizes, self.offsets, strict=True)):
            wanted = self._kept(original, dense[original.name][number])
            rows = layer.rows(small[layer.operand][number], wanted, taps, n_rows, self.generator, size)
            held_out = is_held_out(rows.samples, offset)
            for moments, chosen in zip(both, (~held_out, held_out), strict=True):
                index = chosen.nonzero().squeeze(1).to(weight.device)
                moments.add(rows.inputs.index_select(1, index), rows.outputs.index_select(1, index))
        for moments in both if is_distributed() else ():
            moments.reduce(sum_over_processes)
        return both

    def _batch_norm_behind(self, node: fx.Node) -> str:
        """Return the running mean of a batch norm that alone reads a layer, or ""."""
        users = list(node.users)
        norm = operator_of(users[0]).norm if len(users) == 1 else None
        if norm is None or norm.over != "batch":
            return ""
        given = bind_arguments(users[0])
        mean = given.get(norm.mean)
        if given.get(norm.input) is not node or given.get(norm.own) or not isinstance(mean, fx.Node):
            return ""
        return str(mean.target) if mean.op == "get_attr" and self.n_reads[str(mean.target)] == 1 else ""

    def _fit_norm(
        self, original: fx.Node, node: fx.Node, norm: Norm, dense: Mapping[str, Values], small: dict[str, Values]
    ) -> None:
        """Fit scale and shift of a norm, or renew its running statistics, whichever does better."""
        given, module = bind_arguments(original), _module_of(original)
        roles = {"scale": norm.scale, "shift": norm.shift, "mean": norm.mean, "variance": norm.variance}
        held = {role: given[argument] for role, argument in roles.items() if isinstance(given.get(argument), fx.Node)}
        tensors = {role: str(node.target) for role, node in held.items()}
        if any(one.op != "get_attr" or self.n_reads[str(one.target)] > 1 for one in held.values()):
            self.skipped.append(SkippedLayer(module, "its scale or shift is computed, or read by several calls"))
            return
        if not tensors or given.get(norm.own):
            return
        if any(self.small_state[tensor].ndim != 1 for tensor in tensors.values()):
            self.skipped.append(SkippedLayer(module, "its scale has several dimensions"))
            return
        fitting, held_out = self._norm_sums(original, node, norm, dense, small)
        if not fitting.n or not held_out.n:
            self.skipped.append(SkippedLayer(module, _NO_VALUES))
            return
        fit = fit_norm(
            fitting, held_out, {role: self.small_state[name] for role, name in tensors.items()}, given.get("eps") or 0.0
        )
        if fit.error_before < _SAME:
            self.layers.append(RefittedLayer(module, "norm", fit.error_before, fit.error_before, ""))
            return
        self.layers.append(RefittedLayer(module, "norm", fit.error_before, fit.error_after, fit.method))
        for role, value in fit.tensors.items():
            self._set(tensors[role], value, small)

    def _norm_sums(
        self, original: fx.Node, node: fx.Node, norm: Norm, dense: Mapping[str, Values], small: Mapping[str, Values]
    ) -> tuple[AffineSums, AffineSums]:
        """Sum up what a norm reads, gives and should give, apart for samples to fit to and for samples held out."""
        sums = AffineSums(), AffineSums()
        present, source = _call_all(node, small, len(self.batches)), bind_arguments(original)[norm.input].name
        for number, (size, offset) in enumerate(zip(self.sizes, self.offsets, strict=True)):
            values = [present[number], self._kept(original, dense[original.name][number]), small[source][number]]
            if values[1].ndim == 1:  # one sample without a batch
                values = [value.unsqueeze(0) for value in values]
            dim = batch_dimension(original, self.groups.graph.batch_hint) or 0
            held_out = is_held_out(sample_numbers(values[1].shape[dim], size), offset)
            for one, chosen in zip(sums, (~held_out, held_out), strict=True):
                index = chosen.nonzero().squeeze(1).to(values[1].device)
                one.add(*(v.index_select(dim, index).movedim(norm.channels, 0).flatten(1).double() for v in values))
        for one in sums if is_distributed() else ():
            one.reduce()
        return sums

    def _kept(self, node: Any, value: Any) -> Any:
        """Select the kept positions of a value of the original network."""
        axes = self.groups.facts.axes.get(node.name) if isinstance(node, fx.Node) else None
        kept: Any = map_axes(lambda tensor, own: select_kept(tensor, own, self.cut), value, axes)
        return kept

    def _set(self, name: str, value: Tensor, small: dict[str, Values]) -> None:
        """Replace a tensor of the smaller network, and what calls read of it from now on."""
        old = self.small_state[name]
        self.small_state[name] = value.detach().reshape(old.shape).to(old)
        stale = [node for node in self.sources if str(node.target) == name and node.name in small]
        for source in stale:
            small[source.name] = [self.small_state[name] for _ in self.batches]
        while stale:  # calls that moved the dimensions of a weight before its layer reads it
            for user in stale.pop().users:
                if user.name in small:
                    small[user.name] = _call_all(user, small, len(self.batches))
                    stale.append(user)


def _call_all(node: fx.Node, values: Mapping[str, Values], n_batches: int) -> Values:
    """Compute a call in every batch."""
    found = []
    for number in range(n_batches):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: values[operand.name][number])  # noqa: B023
        found.append(_call(node, args, kwargs, number))
    return found


def _call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> Any:
    """Make a call in a batch; both networks draw the same random numbers, as far as they are alike."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        torch.manual_seed(crc32(f"{node.name} {number}".encode()))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _value_of(node: Any, values: Mapping[str, Values], number: int) -> Any:
    """Return an output of a batch: the value of a node, or a number."""
    return values[node.name][number] if isinstance(node, fx.Node) else node


def _clone(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)


def _count_reads(nodes: Iterable[fx.Node]) -> Counter[str]:
    """Count the calls that read each tensor of the model, whether or not its dimensions are moved before."""
    readers = [node for node in nodes if unwrap_moves(node)[0] is node]
    bases = [unwrap_moves(operand)[0] for node in readers for operand in node.all_input_nodes]
    return Counter(str(base.target) for base in bases if base.op == "get_attr")


def _module_of(node: fx.Node) -> str:
    return locate(node).module or node.name
