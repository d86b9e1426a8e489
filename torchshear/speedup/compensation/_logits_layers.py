"""Fit of the two layers in front of a product, as queries and keys, so that it gives what it gave before the cut."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor, fx

from torchshear.calibration._processes import is_distributed, sum_over_processes
from torchshear.calibration._samples import SampleSplit, sample_numbers
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules._call import bind_arguments
from torchshear.graph._operator_record import operator_of
from torchshear.speedup.compensation._frontier import Frontier
from torchshear.speedup.compensation._least_squares import LinearFit, fit_linear, sum_apart
from torchshear.speedup.compensation._linear_layer import MAX_UNKNOWNS, LinearLayer, linear_layer
from torchshear.speedup.compensation._logits import Logits, Side, keep_others, leaks, places
from torchshear.speedup.compensation._logits_fit import HeadSums, Maps, fit_maps, product_error, relative_error
from torchshear.speedup.compensation._stored_parts import StoredParts

MIN_ROWS: Final = 32768
_SAME: Final = 1e-10
_OTHER_FORM: Final = "what it multiplies comes from layers of another form, each fitted to its own kept dimensions"
_READ_ELSEWHERE: Final = "what it multiplies is read elsewhere as well, so each was fitted to its own kept dimensions"


@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """The numbers that meet in a product in one batch: n pairs of matrices; first those of queries, then of keys.

    Attributes:
        rows: row in the result of the layer for each row of each matrix, shape (n, rows).
        outputs: output of the layer in the smaller network for each dimension, shape (n, D').
        dense: the same in the original, shape (n, D).
        is_held_out: whether the sample of a pair is held out, shape (n,).
    """

    rows: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]
    dense: tuple[Tensor, Tensor]
    is_held_out: Tensor

    def heads(self) -> Tensor:
        """Return what tells heads apart: all outputs that meet, shape (n, 2 D' + 2 D)."""
        return torch.cat([*self.outputs, *self.dense], 1)


@dataclass(frozen=True, slots=True, eq=False)
class Wide:
    """A layer of the smaller network that gives all dimensions of the original's queries or keys.

    Attributes:
        layer: the layer as it is.
        fit: weight and bias for all dimensions.
        columns: output of the original -> its place among those of the fit; -1 for others.
    """

    layer: LinearLayer
    fit: LinearFit
    columns: Tensor

    def of(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias for some outputs of the original, shapes (D, K) and (D,)."""
        chosen = self.columns[outputs].to(self.fit.weight.device)
        return self.fit.weight[0][chosen], self.fit.bias[0][chosen]


class LogitsFit:
    """Fit of the layers in front of one product.

    Args:
        logits: the product.
        groups: the analysed original.
        cut: the units that were removed.
        parts: the tensors that calls read.
        small: canonical name -> tensor of the smaller network.
        split: samples of the batches.
        frontier: values of both networks.
        smaller: nodes of the smaller network by name.
    """

    def __init__(
        self,
        logits: Logits,
        groups: ChannelGroups,
        cut: Cut,
        parts: StoredParts,
        small: Mapping[str, Tensor],
        split: SampleSplit,
        frontier: Frontier,
        smaller: Mapping[str, fx.Node],
    ) -> None:
        self.logits, self.groups, self.cut, self.parts = logits, groups, cut, parts
        self.small, self.split, self.frontier, self.smaller = small, split, frontier, smaller
        self._generator = torch.Generator().manual_seed(0)

    def run(self) -> tuple[dict[str, Tensor], tuple[float, float, str]] | str:
        """Fit both layers.

        Returns:
            New tensors by canonical name, with the errors of the product before and after and the method; or the reason
            why they stay as they are.
        """
        layers = [self._layer(side) for side in self.logits.sides]
        if not all(isinstance(layer, LinearLayer) for layer in layers):
            return _OTHER_FORM
        first, second = (layer for layer in layers if isinstance(layer, LinearLayer))
        try:
            meetings = [self._meet(first, number) for number in range(len(self.split.sizes))]
        except (KeyError, IndexError, RuntimeError):  # a size that is gone, or moves that depend on the batch
            return _OTHER_FORM
        heads = _by_keys(meetings)
        if heads is None:
            return _OTHER_FORM
        if self._is_read_elsewhere(meetings[0]):
            return _READ_ELSEWHERE
        wide = tuple(self._widen(place, layer, meetings) for place, layer in enumerate((first, second)))
        if wide[0] is None or wide[1] is None:
            return "no sample that is fitted to, or none that is held out, gives it finite values"
        return self._fit_heads(heads, (wide[0], wide[1]), meetings)

    def _layer(self, side: Side) -> LinearLayer | str:
        """Return the layer behind one side, if its weight has no other reader."""
        carriers, hint = self.groups.facts.carriers, self.groups.graph.batch_hint
        layer = linear_layer(side.linear, self.smaller[side.linear.name], carriers, self.parts, hint)
        if isinstance(layer, str) or layer.kind != "dense" or self.parts.n_reads(layer.weight) > 1:
            return _OTHER_FORM
        return layer

    def _values(self, values: Mapping[str, Any], number: int) -> Any:
        return lambda node: values[node.name][number]

    def _meet(self, layer: LinearLayer, number: int) -> Meeting:
        """Follow the numbers of a batch from the layers to where they meet, in both networks."""
        facts, frontier = self.groups.facts, self.frontier
        originals = {node.name: node for side in self.logits.sides for node in side.path}
        found: list[tuple[Tensor, Tensor]] = []
        sizes = [], []  # type: tuple[list[int], list[int]]
        for values, path, is_dense in ((frontier.small, self.smaller, False), (frontier.dense, originals, True)):
            both = []
            for side in self.logits.sides:
                shape = values[side.linear.name][number].shape
                sizes[is_dense].append(shape[-1])
                one = places(side, path, shape, self._values(values, number))
                both.append(keep_others(side, one, facts, self.cut) if is_dense else one)
            found.append(self.logits.arrange(*both))
        rows = [[one // n for one, n in zip(pair, own, strict=True)] for pair, own in zip(found, sizes, strict=True)]
        outputs = [[one % n for one, n in zip(pair, own, strict=True)] for pair, own in zip(found, sizes, strict=True)]
        for small, dense in zip(*rows, strict=True):
            if not torch.equal(small, small[..., :1].expand_as(small)) or not torch.equal(small[..., 0], dense[..., 0]):
                raise IndexError("rows are mixed")
        for one in (each for pair in outputs for each in pair):
            if not torch.equal(one, one[:, :1].expand_as(one)):
                raise IndexError("outputs are mixed")
        leading = frontier.small[layer.operand][number].shape[:-1]
        dim = min(layer.batch_dim, len(leading) - 1)
        row = torch.unravel_index(rows[0][0][:, 0, 0], leading)[dim]
        samples = sample_numbers(leading[dim], self.split.sizes[number])[row]
        return Meeting(
            rows=(rows[0][0][..., 0], rows[0][1][..., 0]),
            outputs=(outputs[0][0][:, 0], outputs[0][1][:, 0]),
            dense=(outputs[1][0][:, 0], outputs[1][1][:, 0]),
            is_held_out=self.split.is_held_out(samples, number),
        )

    def _is_read_elsewhere(self, meeting: Meeting) -> bool:
        """Check whether something else reads the outputs that meet, or one layer gives the same ones to both sides."""
        sides, values = self.logits.sides, self.frontier.dense
        channels = [_distinct(meeting.dense[place]) for place in range(2)]
        if sides[0].linear is sides[1].linear:
            if bool(torch.isin(channels[0], channels[1]).any()):
                return True
            channels = [torch.cat(channels)] * 2
        for side, own in zip(sides, channels, strict=True):
            shape = values[side.linear.name][0].shape
            try:
                if leaks(self.logits, side.linear, own, shape, self._values(values, 0)):
                    return True
            except KeyError:  # a size of another branch is not known yet
                return True
        return False

    def _widen(self, place: int, layer: LinearLayer, meetings: Sequence[Meeting]) -> Wide | None:
        """Fit all dimensions of the original's queries or keys to what the layer reads now."""
        linear, values = self.logits.sides[place].linear, self.frontier.dense
        chosen = _distinct(torch.cat([meeting.dense[place] for meeting in meetings]))
        product = operator_of(linear).product
        assert product is not None, "found as a layer"
        given = bind_arguments(linear)
        factor, bias = given[product.right], given.get(product.bias)
        dense = values[factor.name][0].detach()
        axes = self.groups.facts.axes[factor.name]
        assert isinstance(axes, tuple), "a weight is one tensor"
        device = dense.device
        is_kept = torch.from_numpy(self.cut.keep(axes[1 if layer.is_rows_first else 0]).copy()).to(device)
        weight = (dense if layer.is_rows_first else dense.mT)[chosen.to(device)][:, is_kept].double().unsqueeze(0)
        shift = weight.new_zeros(1, len(chosen))
        if bias is not None:
            shift = values[bias.name][0].detach()[chosen.to(device)].double().unsqueeze(0)
        n_rows = -(-max(MIN_ROWS, 8 * weight.shape[2]) // len(self.split.sizes))

        def rows(number: int) -> tuple[Tensor, Tensor, Tensor]:
            wanted = values[linear.name][number][..., chosen.to(device)]
            operand = self.frontier.small[layer.operand][number]
            found = layer.rows(operand, wanted, (), n_rows, self._generator, self.split.sizes[number])
            return found.inputs, found.outputs, self.split.is_held_out(found.samples, number)

        fit = LinearFit(weight, shift, 0.0, 0.0, "")
        if weight.shape[2] <= MAX_UNKNOWNS:
            shape = (1, weight.shape[2], weight.shape[1])
            fitting, held_out = sum_apart(map(rows, range(len(self.split.sizes))), shape)
            if not fitting.n or not held_out.n:
                return None
            fit = fit_linear(fitting, held_out, weight, shift, bias is not None)
        columns = torch.full((values[linear.name][0].shape[-1],), -1)
        columns[chosen] = torch.arange(len(chosen))
        return Wide(layer, fit, columns)

    def _fit_heads(
        self, heads: Sequence[Sequence[Tensor]], wide: tuple[Wide, Wide], meetings: Sequence[Meeting]
    ) -> tuple[dict[str, Tensor], tuple[float, float, str]]:
        """Fit the heads that share keys, set after set; each stays as it is where that does better."""
        matrices = {one.layer.node: one.layer.to_matrix(one.layer.weight.read(self.small))[0].double() for one in wide}
        shifts = {node: matrix.new_zeros(len(matrix)) for node, matrix in matrices.items()}
        for one in wide:
            if one.layer.bias is not None:
                shifts[one.layer.node] = one.layer.bias.read(self.small).double().clone()
        before, after, methods = torch.zeros(4), torch.zeros(4), set()
        for group in heads:
            present = _Weights(matrices, shifts)
            errors = self._error(group, wide, meetings, present)
            best, method = errors, ""
            chosen = present
            for name, maps in self._maps(group, wide, meetings):
                tried = self._apply(maps, group, wide, meetings[0], present)
                found = self._error(group, wide, meetings, tried)
                if float(found[0]) < float(best[0]):
                    best, method, chosen = found, name, tried
            matrices, shifts = chosen.matrices, chosen.shifts
            before, after = before + errors, after + best
            methods |= {method} if method else set()
        found_errors = relative_error(before), relative_error(after)
        if not methods or found_errors[0] < _SAME:
            return {}, (found_errors[0], found_errors[0], "")
        new: dict[str, Tensor] = {}
        for layer in {one.layer.node: one.layer for one in wide}.values():
            value = layer.to_weight(matrices[layer.node].unsqueeze(0), layer.weight.read(self.small))
            layer.weight.write(self.small, new, value)
            if layer.bias is not None:
                layer.bias.write(self.small, new, shifts[layer.node])
        return new, (*found_errors, ", ".join(sorted(methods)))

    def _matrices(self, layer: LinearLayer, weight: Tensor, bias: Tensor, rows: Tensor, number: int) -> Tensor:
        """Return what a layer gives with some weights at some rows of a batch, shape (n, rows, outputs), float64."""
        inputs: Tensor = self.frontier.small[layer.operand][number].flatten(0, -2)
        return inputs[rows.to(inputs.device)].double() @ weight.mT + bias

    def _pairs(
        self, meetings: Sequence[Meeting], head: Tensor, is_held_out: bool
    ) -> Iterator[tuple[int, Meeting, Tensor]]:
        """Give for each batch the pairs of a head."""
        for number, meeting in enumerate(meetings):
            is_head = (meeting.heads() == head).all(1) & (meeting.is_held_out == is_held_out)
            yield number, meeting, is_head.nonzero().squeeze(1)

    def _dense(self, place: int, meeting: Meeting, number: int, pairs: Tensor) -> Tensor:
        """Return queries or keys of the original for some pairs, shape (n, rows, D), float64."""
        value: Tensor = self.frontier.dense[self.logits.sides[place].linear.name][number].flatten(0, -2)
        rows, outputs = meeting.rows[place][pairs], meeting.dense[place][pairs][:1].flatten()
        return value[:, outputs.to(value.device)][rows.to(value.device)].double()

    def _maps(
        self, group: Sequence[Tensor], wide: tuple[Wide, Wide], meetings: Sequence[Meeting]
    ) -> Iterator[tuple[str, Maps]]:
        """Give maps from all dimensions to those that are left, for the heads that share keys."""
        sums = []
        for head in group:
            found = []
            for number, meeting, pairs in self._pairs(meetings, head, is_held_out=False):
                sides = []
                for place, one in enumerate(wide):
                    outputs = self._split(head, meeting)[2 + place]
                    value = self._matrices(one.layer, *one.of(outputs), meeting.rows[place][pairs], number)
                    if one.layer.bias is not None:
                        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
                    sides.append(value)
                dense = [self._dense(place, meeting, number, pairs) for place in range(2)]
                found.append(HeadSums.of(sides[0], sides[1], dense[0], dense[1]))
            sums.append(HeadSums.joined(found))
        yield from fit_maps(sums, meetings[0].outputs[1].shape[1])

    def _split(self, head: Tensor, meeting: Meeting) -> list[Tensor]:
        """Return the outputs of a head: in the smaller network of queries and of keys, and the same in the original."""
        ends = list(accumulate(one.shape[1] for one in (*meeting.outputs, *meeting.dense)))
        return [head[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _apply(
        self, maps: Maps, group: Sequence[Tensor], wide: tuple[Wide, Wide], meeting: Meeting, present: "_Weights"
    ) -> "_Weights":
        """Return weights with those of the heads that share keys replaced, rounded to the type of the network."""
        changed = present.copy()
        for head, own in zip(group, maps.queries, strict=True):
            outputs = self._split(head, meeting)
            for place, mapped in ((0, own), (1, maps.keys)):
                layer = wide[place].layer
                dtype = self.small[layer.weight.tensor].dtype
                weight, bias = wide[place].of(outputs[2 + place])
                size = weight.shape[0]
                index = outputs[place].to(weight.device)
                changed.matrices[layer.node][index] = (mapped[:, :size] @ weight).to(dtype).double()
                if layer.bias is not None:
                    shift = mapped[:, :size] @ bias + mapped[:, size]
                    changed.shifts[layer.node][index] = shift.to(dtype).double()
        return changed

    def _error(
        self, group: Sequence[Tensor], wide: tuple[Wide, Wide], meetings: Sequence[Meeting], weights: "_Weights"
    ) -> Tensor:
        """Return the sums of `product_error` over samples held out, for the heads that share keys."""
        total = torch.zeros(4, dtype=torch.float64)
        for head in group:
            for number, meeting, pairs in self._pairs(meetings, head, is_held_out=True):
                sides = []
                for place, one in enumerate(wide):
                    node, index = one.layer.node, self._split(head, meeting)[place]
                    matrix, shift = weights.matrices[node], weights.shifts[node]
                    chosen = index.to(matrix.device)
                    rows = meeting.rows[place][pairs]
                    sides.append(self._matrices(one.layer, matrix[chosen], shift[chosen], rows, number))
                dense = [self._dense(place, meeting, number, pairs) for place in range(2)]
                total += product_error(sides[0], sides[1], dense[0], dense[1]).cpu()
        return sum_over_processes(total) if is_distributed() else total


@dataclass(frozen=True, slots=True, eq=False)
class _Weights:
    """Weights and biases of the layers by the name of their calls, float64."""

    matrices: dict[str, Tensor]
    shifts: dict[str, Tensor]

    def copy(self) -> "_Weights":
        return _Weights(*({name: one.clone() for name, one in own.items()} for own in (self.matrices, self.shifts)))


def _by_keys(meetings: Sequence[Meeting]) -> list[list[Tensor]] | None:
    """Return the heads, those that share keys together; None where they share anything else."""
    heads = torch.tensor(sorted({tuple(head) for meeting in meetings for head in meeting.heads().tolist()}))
    width, size = meetings[0].outputs[0].shape[1], meetings[0].dense[0].shape[1]
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for head in heads:
        groups.setdefault(tuple(head[width : 2 * width].tolist()), []).append(head)
    queries = heads[:, :width]
    keys = torch.tensor(list(groups))
    is_apart = len(_distinct(queries)) == queries.numel() and len(_distinct(keys)) == keys.numel()
    dense = [tuple(head[2 * width + size :].tolist()) for own in groups.values() for head in own[:1]]
    same = all(torch.equal(a[2 * width + size :], own[0][2 * width + size :]) for own in groups.values() for a in own)
    return list(groups.values()) if is_apart and same and len(set(dense)) == len(dense) else None


def _distinct(values: Tensor) -> Tensor:
    """Return the different values of a tensor of whole numbers, in order."""
    return torch.tensor(sorted(set(values.flatten().tolist())))
