"""Fits of single layers, from what the original and the smaller network hold where the layer stands."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from torchshear.calibration._processes import is_distributed
from torchshear.calibration._samples import SampleSplit, batch_dimension, sample_numbers
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules._call import bind_arguments
from torchshear.graph._location import locate
from torchshear.graph._operator_record import Norm, operator_of
from torchshear.speedup.compensation._channel_form import expand_weight, fit_channels
from torchshear.speedup.compensation._frontier import Frontier, Values
from torchshear.speedup.compensation._least_squares import LinearFit, Moments, fit_linear, sum_apart
from torchshear.speedup.compensation._least_squares_wide import WideRows, fit_wide
from torchshear.speedup.compensation._linear_layer import MAX_UNKNOWNS, LinearLayer, linear_layer
from torchshear.speedup.compensation._logits import Logits, find_logits
from torchshear.speedup.compensation._logits_layers import LogitsFit
from torchshear.speedup.compensation._norm_fit import AffineSums, fit_norm
from torchshear.speedup.compensation._recurrent_fit import RecurrentFit, recurrent_obstacle
from torchshear.speedup.compensation._refit_record import RefittedLayer, SkippedLayer
from torchshear.speedup.compensation._shared_layer import SharedLayer
from torchshear.speedup.compensation._stored_parts import StoredParts, is_einsum
from torchshear.speedup.compensation._sum_shortfall import SumBehind, find_sum, shortfall
from torchshear.speedup.rewriting._slicing import map_axes, select_kept

ROWS_PER_UNKNOWN: Final = 8
MIN_ROWS: Final = 32768
_NO_VALUES: Final = "no sample that is fitted to, or none that is held out, gives it finite values"
_SAME: Final = 1e-10  # a relative squared error below this is rounding


class LayerFits:
    """Fits layers one by one, and records how it went.

    Args:
        groups: the analysed original.
        cut: the units that were removed.
        smaller: nodes of the smaller network.
        dense: canonical name -> tensor of the original.
        small: canonical name -> tensor of the smaller network, as it is by now.
        split: samples of the batches.

    Attributes:
        layers: results so far.
        skipped: layers left alone so far.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        cut: Cut,
        smaller: Sequence[fx.Node],
        dense: Mapping[str, Tensor],
        small: Mapping[str, Tensor],
        split: SampleSplit,
    ) -> None:
        self.groups, self.cut, self.dense, self.small = groups, cut, dense, small
        self.split = split
        self._parts = StoredParts(groups.graph.fx_graph.nodes, smaller, small)
        self._smaller = {node.name: node for node in smaller}
        found = {node.name: find_logits(node, groups.facts, cut) for node in groups.graph}
        self._logits = {name: one for name, one in found.items() if one}
        self.layers: list[RefittedLayer] = []
        self.skipped: list[SkippedLayer] = []
        self._shared: dict[tuple[str, str], SharedLayer] = {}
        self._is_settled = False
        self._generator = torch.Generator().manual_seed(0)
        self._batch_hint = groups.graph.batch_hint

    def fit(self, original: fx.Node, node: fx.Node, frontier: Frontier, present: Values | None) -> dict[str, Tensor]:
        """Fit the layer that a call is, if it is one, and return its new tensors by canonical name.

        Args:
            original: the call in the original network, whose values are known.
            node: the call in the smaller network, whose operands are known.
            frontier: values of both.
            present: values that the call gives with the present tensors; needed for norms.
        """
        norm = operator_of(original).norm
        if norm is not None:
            assert present is not None, "computed for norms"
            return self._fit_norm(original, norm, frontier, present)
        if operator_of(original).recurrence is not None:
            return self._fit_recurrent(original, node, frontier)
        layer = linear_layer(original, node, self.groups.facts.carriers, self._parts, self._batch_hint)
        if isinstance(layer, str):
            if layer:
                self.skipped.append(SkippedLayer(_module_of(original), layer))
            return {}
        n_reads = self._parts.n_reads(layer.weight)
        if self._parts.n_layers(layer.weight) < n_reads:
            reason = f"{layer.weight.tensor!r} is read by {n_reads} calls, not all of which are layers"
            self.skipped.append(SkippedLayer(_module_of(original), reason))
            return {}
        if n_reads > 1:
            self._add_use(original, layer, frontier)
            return {}
        return self._fit_linear(original, layer, frontier)

    def fit_logits(self, original: fx.Node, frontier: Frontier) -> dict[str, Tensor]:
        """Fit the layers of queries and keys to their product, if a call is one, and return their new tensors."""
        logits = self._logits.get(original.name)
        if logits is None:
            return {}
        fit: Any = logits
        if isinstance(logits, Logits):
            fit = LogitsFit(
                *(logits, self.groups, self.cut, self._parts, self.small, self.split, frontier, self._smaller)
            ).run()
        if isinstance(fit, str):
            self.skipped.append(SkippedLayer(_module_of(original), fit))
            return {}
        found, errors = fit
        self.layers.append(RefittedLayer(_module_of(original), "logits", *errors))
        return dict(found)

    def logits_of(self, name: str) -> Logits | None:
        """Return the product that a call is, if its layers are fitted to it."""
        found = self._logits.get(name)
        return found if isinstance(found, Logits) else None

    def _fit_recurrent(self, original: fx.Node, node: fx.Node, frontier: Frontier) -> dict[str, Tensor]:
        """Fit all layers and directions of a recurrent call."""
        problem = recurrent_obstacle(original, self._parts)
        if problem:
            self.skipped.append(SkippedLayer(_module_of(original), problem))
            return {}
        found, records = RecurrentFit(original, node, self.groups, self.cut, self.small, self.split, frontier).run()
        self.layers += records
        return found

    def _add_use(self, original: fx.Node, layer: LinearLayer, frontier: Frontier) -> None:
        """Sum up the rows of one of several calls that read a weight, until that was fitted."""
        if self._is_settled:
            return
        weight = layer.to_matrix(layer.weight.read(self.small))
        first = SharedLayer(_module_of(original), layer, self._parts.n_reads(layer.weight))
        shared = self._shared.setdefault(layer.weight.key, first)
        if weight.shape[2] <= MAX_UNKNOWNS and shared.has_form_of(layer):
            shared.add(self._moments(original, layer, frontier, weight))

    def fit_shared(self) -> dict[str, Tensor]:
        """Fit the weights that several calls read, each by one system over all of its calls.

        Returns:
            New tensors by canonical name. Where there are any, the calls in between have seen the old ones, and all
            other layers are to be fitted once more; what was recorded of them is forgotten.
        """
        self._is_settled = True
        found: dict[str, Tensor] = {}
        layers, skipped = self.layers, self.skipped
        self.layers, self.skipped = [], []
        for shared in self._shared.values():
            fit = shared.fit(self.small)
            if isinstance(fit, str):
                self.skipped.append(SkippedLayer(shared.module, fit))
            else:
                found |= self._record(shared.module, shared.layer, fit, found=found)
        if not found:
            self.layers, self.skipped = [*self.layers, *layers], [*self.skipped, *skipped]
        return found

    def _fit_linear(self, original: fx.Node, layer: LinearLayer, frontier: Frontier) -> dict[str, Tensor]:
        """Fit weight and bias of a linear layer; the mean of a batch norm behind it stands in for a missing bias."""
        weight = layer.to_matrix(layer.weight.read(self.small))
        norm_behind = self._batch_norm_behind(original) if layer.bias is None else ""
        bias = weight.new_zeros(weight.shape[:2])
        if layer.bias is not None:
            bias = layer.bias.read(self.small).reshape(bias.shape)
        has_bias = layer.bias is not None or bool(norm_behind)
        if weight.shape[2] > MAX_UNKNOWNS:
            fit = self._fit_wide(original, layer, frontier, weight, bias, has_bias)
        else:
            fitting, held_out = self._moments(original, layer, frontier, weight)
            fit = fit_linear(fitting, held_out, weight, bias, has_bias) if fitting.n and held_out.n else None
        if fit is None:
            self.skipped.append(SkippedLayer(_module_of(original), _NO_VALUES))
            return {}
        return self._record(_module_of(original), layer, fit, norm_behind)

    def _record(
        self,
        module: str,
        layer: LinearLayer,
        fit: LinearFit,
        norm_behind: str = "",
        found: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Record the fit of a linear layer, and return its new tensors.

        Args:
            module: name of its module.
            layer: the layer.
            fit: the fit.
            norm_behind: the mean of a batch norm that takes the place of its bias; "" for none.
            found: tensors that are new already; parts of them may be those of this layer.
        """
        if not fit.method or fit.error_before < _SAME:
            self.layers.append(RefittedLayer(module, "linear", fit.error_before, fit.error_before, ""))
            return {}
        self.layers.append(RefittedLayer(module, "linear", fit.error_before, fit.error_after, fit.method))
        new = dict(found or {})
        layer.weight.write(self.small, new, layer.to_weight(fit.weight, layer.weight.read(self.small)))
        if layer.bias is not None:
            layer.bias.write(self.small, new, fit.bias)
        if norm_behind:
            new[norm_behind] = self.small[norm_behind].double() - fit.bias.reshape(-1)
        return new

    def _moments(
        self, original: fx.Node, layer: LinearLayer, frontier: Frontier, weight: Tensor
    ) -> tuple[Moments, Moments]:
        """Sum up rows of a layer, apart for samples to fit to and for samples held out."""
        n_groups, n_out, n_in = weight.shape
        n_rows = max(MIN_ROWS, ROWS_PER_UNKNOWN * n_in)
        batches = range(len(self.split.sizes))
        rows = (self._rows(original, layer, frontier, number, n_rows) for number in batches)
        return sum_apart(rows, (n_groups, n_in, n_out))

    def _rows(
        self, original: fx.Node, layer: LinearLayer, frontier: Frontier, number: int, n_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw rows of a batch: inputs, wanted outputs, and a mask of those of samples held out.

        Args:
            original: the call in the original network.
            layer: the layer.
            frontier: values of both networks.
            number: number of the batch.
            n_rows: how many rows to draw at most, of all batches together.
        """
        wanted = self._wanted(original, frontier, number)
        kernel = layer.weight.read(self.small).shape
        taps = [kernel[dim] for dim in layer.order][2:] if layer.n_dims else []
        share = -(-n_rows // len(self.split.sizes))
        operand = frontier.small[layer.operand][number]
        rows = layer.rows(operand, wanted, taps, share, self._generator, self.split.sizes[number])
        return rows.inputs, rows.outputs, self.split.is_held_out(rows.samples, number)

    def _fit_wide(
        self, original: fx.Node, layer: LinearLayer, frontier: Frontier, weight: Tensor, bias: Tensor, has_bias: bool
    ) -> LinearFit | None:
        """Fit a layer that has too many unknowns for one system; None where no row has finite values."""
        rows = WideRows()
        for number in range(len(self.split.sizes)):
            rows.add(*self._rows(original, layer, frontier, number, WideRows.count_for(weight.shape[2])))
        candidates: dict[str, tuple[Tensor, Tensor]] = {}
        n_taps = math.prod(layer.weight.read(self.small).shape[dim] for dim in layer.order[2:])
        if layer.weight.is_whole and layer.n_dims and layer.n_groups == 1 and weight.shape[2] // n_taps <= MAX_UNKNOWNS:
            found = self._fold_channels(original, layer, frontier)
            if found is not None:
                candidates["channel form"] = found[0], bias.double() + found[1] if has_bias else bias.double()
        return fit_wide(rows, weight, bias, has_bias, candidates)

    def _fold_channels(self, original: fx.Node, layer: LinearLayer, frontier: Frontier) -> tuple[Tensor, Tensor] | None:
        """Express the channels that a convolution read by those that are left, and fold that into its weight."""
        tensor, places = layer.weight.tensor, layer.order[:2]
        axes = self.groups.facts.state_axes[tensor]
        out_dim, in_dim = places if layer.kind == "convolution" else reversed(places)
        kept_in, kept_out = (torch.from_numpy(self.cut.keep(axes[dim]).copy()) for dim in (in_dim, out_dim))
        fit = fit_channels(
            frontier.dense[layer.operand],
            frontier.small[layer.operand],
            kept_in,
            self.split,
            layer.n_dims,
            self._generator,
        )
        if fit is None:
            return None
        dense = layer.to_matrix(self.dense[tensor].detach())[0][kept_out.to(self.dense[tensor].device)]
        return expand_weight(dense, fit)

    def _batch_norm_behind(self, node: fx.Node) -> str:
        """Return the running mean of a batch norm that alone reads a layer, or ""."""
        users = list(node.users)
        norm = operator_of(users[0]).norm if len(users) == 1 else None
        if norm is None or norm.over != "batch" or not self._has_channels_first(node):
            return ""
        given = bind_arguments(users[0])
        mean = given.get(norm.mean)
        if given.get(norm.input) is not node or given.get(norm.own) or not isinstance(mean, fx.Node):
            return ""
        return str(mean.target) if mean.op == "get_attr" and self._parts.n_reads_of(str(mean.target)) == 1 else ""

    @staticmethod
    def _has_channels_first(node: fx.Node) -> bool:
        """Check that the outputs of a layer lie along the dimension that a batch norm has for channels, and that alone.

        Those of a linear layer lie along the last one.
        """
        return "stride" in bind_arguments(node) or (node.meta["val"].ndim == 2 and not is_einsum(node))

    def _fit_norm(self, original: fx.Node, norm: Norm, frontier: Frontier, present: Values) -> dict[str, Tensor]:
        """Fit scale and shift of a norm, or renew its running statistics, whichever does better."""
        given, module = bind_arguments(original), _module_of(original)
        roles = {"scale": norm.scale, "shift": norm.shift, "mean": norm.mean, "variance": norm.variance}
        held = {role: given[argument] for role, argument in roles.items() if isinstance(given.get(argument), fx.Node)}
        tensors = {role: str(node.target) for role, node in held.items()}
        if any(one.op != "get_attr" or self._parts.n_reads_of(str(one.target)) > 1 for one in held.values()):
            self.skipped.append(SkippedLayer(module, "its scale or shift is computed, or read by several calls"))
            return {}
        if not tensors or given.get(norm.own):
            return {}
        if any(self.small[tensor].ndim != 1 for tensor in tensors.values()):
            self.skipped.append(SkippedLayer(module, "its scale has several dimensions"))
            return {}
        fitting, held_out = self._norm_sums(original, norm, frontier, present)
        if not fitting.n or not held_out.n:
            self.skipped.append(SkippedLayer(module, _NO_VALUES))
            return {}
        fit = fit_norm(
            fitting, held_out, {role: self.small[name] for role, name in tensors.items()}, given.get("eps") or 0.0
        )
        if fit.error_before < _SAME:
            self.layers.append(RefittedLayer(module, "norm", fit.error_before, fit.error_before, ""))
            return {}
        self.layers.append(RefittedLayer(module, "norm", fit.error_before, fit.error_after, fit.method))
        return {tensors[role]: value for role, value in fit.tensors.items()}

    def _norm_sums(
        self, original: fx.Node, norm: Norm, frontier: Frontier, present: Values
    ) -> tuple[AffineSums, AffineSums]:
        """Sum up what a norm reads, gives and should give, apart for samples to fit to and for samples held out."""
        sums, source = (AffineSums(), AffineSums()), bind_arguments(original)[norm.input].name
        for number, size in enumerate(self.split.sizes):
            wanted = self._wanted(original, frontier, number)
            values = [present[number], wanted, frontier.small[source][number]]
            if wanted.ndim == 1:  # one sample without a batch
                values = [value.unsqueeze(0) for value in values]
            dim = batch_dimension(original, self._batch_hint) or 0
            is_held_out = self.split.is_held_out(sample_numbers(values[1].shape[dim], size), number)
            for one, chosen in zip(sums, (~is_held_out, is_held_out), strict=True):
                index = chosen.nonzero().squeeze(1).to(wanted.device)
                one.add(*(v.index_select(dim, index).movedim(norm.channels, 0).flatten(1).double() for v in values))
        for one in sums if is_distributed() else ():
            one.reduce()
        return sums

    def needs_fit(self, node: fx.Node, frontier: Frontier) -> bool:
        """Check that a layer is to be fitted even if it reads the same in both networks.

        It can make up for what the rest of a sum behind it lacks, or its weight is read by other calls as well.
        """
        known = operator_of(node)
        if known.product is None and known.norm is None and not is_einsum(node):
            return False
        held = [self._parts.behind(operand) for operand in node.all_input_nodes]
        if any(part is not None and self._parts.n_layers(part) > 1 for part in held):
            return True
        rest = self._rest_of_sum(node, frontier)
        return rest is not None and frontier.dense[rest.other.name] is not frontier.small[rest.other.name]

    def _wanted(self, node: fx.Node, frontier: Frontier, number: int) -> Tensor:
        """Return what a layer is to give in a batch: what it gave, and what the rest of a sum behind it lacks."""
        wanted: Tensor = self.kept(node, frontier.dense[node.name][number])
        rest = self._rest_of_sum(node, frontier)
        if rest is None:
            return wanted
        dense = self.kept(rest.other, frontier.dense[rest.other.name][number])
        small = frontier.small[rest.other.name][number]
        if dense.shape != wanted.shape or small.shape != wanted.shape or not dense.is_floating_point():
            return wanted
        return wanted + shortfall(rest, dense, small, self.small)

    def _rest_of_sum(self, node: fx.Node, frontier: Frontier) -> SumBehind | None:
        """Return the sum behind a layer, if both networks have computed its other operand by now."""
        found = find_sum(node)
        is_known = found is not None and found.other.name in frontier.dense and found.other.name in frontier.small
        return found if is_known else None

    def kept(self, node: Any, value: Any) -> Any:
        """Select the kept positions of a value of the original network."""
        axes = self.groups.facts.axes.get(node.name) if isinstance(node, fx.Node) else None
        found: Any = map_axes(lambda tensor, own: select_kept(tensor, own, self.cut), value, axes)
        return found


def _module_of(node: fx.Node) -> str:
    return locate(node).module or node.name
