"""Fit of a recurrent layer: what its gates get from inputs and from states, layer after layer in each direction."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from torchshear.calibration._processes import is_distributed, sum_over_processes
from torchshear.calibration._recurrent import Pass, passes, run, run_pass, states_before
from torchshear.calibration._samples import SampleSplit, sample_numbers
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules._call import bind_arguments
from torchshear.graph._operator_record import operator_of
from torchshear.graph._run import arguments_by_name
from torchshear.speedup.compensation._frontier import Frontier
from torchshear.speedup.compensation._least_squares import RIDGES, Moments, fit_linear, sum_apart
from torchshear.speedup.compensation._linear_layer import MAX_UNKNOWNS, draw_positions
from torchshear.speedup.compensation._refit_record import RefittedLayer
from torchshear.speedup.compensation._stored_parts import StoredParts

_MIN_ROWS: Final = 32768
_SAME: Final = 1e-10
_INPUTS: Final = 0  # the place of a weight among those of a layer
_STATES: Final = 1
_N_GATES_OF_GRU: Final = 3
_STIFFER: Final = ((1e-2,), (1.0,))  # ridges that are tried besides the best for single steps: errors of states add up


@dataclass(frozen=True, slots=True)
class _Step:
    """Weights that are fitted, and whether to states of the original or to those that the smaller layer comes to."""

    places: tuple[int, ...]
    is_of_original: bool = False

    @property
    def names(self) -> list[str]:
        return [("inputs", "states")[place] for place in self.places]


_STEPS: Final = (
    _Step((_INPUTS,)),
    _Step((_INPUTS, _STATES), is_of_original=True),
    _Step((_INPUTS, _STATES)),
    _Step((_INPUTS, _STATES)),
    _Step((_INPUTS,)),
    _Step((_STATES,)),
)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Outputs of a layer in one direction in each batch, and the states that its steps start from."""

    outputs: list[Tensor]
    states: list[Tensor]


class RecurrentFit:
    """Fit of one recurrent call.

    The gates of each layer and direction get W_ih x + b_ih of its inputs and W_hh h + b_hh of its states. At the rows
    that are left their sum is fitted by one system, so that inputs tell what states that went told; in a GRU that is
    true of two gates of three, and the third multiplies what it gets of states, so that there each is fitted to what it
    was. States are those of the original that are left, and then those that the smaller layer comes to by itself. A fit
    is kept where what the layer gives, run over all steps, comes nearer on samples held out; stiffer ones are tried as
    well, as errors of states add up over the steps. Layers above read what those below give by then.

    Args:
        node: the call in the captured network.
        smaller: the call in the smaller one.
        groups: the analysed original.
        cut: the units that were removed.
        small: canonical name -> tensor of the smaller network.
        split: samples of the batches.
        frontier: values of both networks.
    """

    def __init__(
        self,
        node: fx.Node,
        smaller: fx.Node,
        groups: ChannelGroups,
        cut: Cut,
        small: Mapping[str, Tensor],
        split: SampleSplit,
        frontier: Frontier,
    ) -> None:
        self.node, self.groups, self.cut, self.small, self.split = node, groups, cut, small, split
        self.batches = range(len(split.sizes))
        self._given = [_arguments(smaller, frontier.small, number) for number in self.batches]
        self._dense_given = [_arguments(node, frontier.dense, number) for number in self.batches]
        self._names = [str(weight.target) for weight in bind_arguments(node)["params"]]
        self._dense = [self._run_dense(number) for number in self.batches]
        self._new: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._n_directions = 2 if self._given[0]["bidirectional"] else 1

    def run(self) -> tuple[dict[str, Tensor], list[RefittedLayer]]:
        """Fit all layers and directions, and return new tensors by canonical name with a record of each."""
        records = []
        inputs: list[Tensor] = [given["input"] for given in self._given]
        all_passes, n_directions = passes(self.node), self._n_directions
        for first in range(0, len(all_passes), n_directions):
            outputs = []
            for one in all_passes[first : first + n_directions]:
                record, found = self._fit_pass(one, inputs)
                records.append(record)
                outputs.append(found)
            inputs = [torch.cat(parts, 2) for parts in zip(*outputs, strict=True)]
        return self._new, records

    def _run_dense(self, number: int) -> dict[str, Tensor]:
        """Run the original in a batch, and return what its layers read and give."""
        seen = {bind_arguments(self.node)["input"].name: self._dense_given[number]["input"]}

        def see(name: str, value: Tensor) -> Tensor:
            seen[name] = value
            return value

        run(self.node, (), self._dense_given[number], see)
        return seen

    def _fit_pass(self, one: Pass, inputs: list[Tensor]) -> tuple[RefittedLayer, list[Tensor]]:
        """Fit a layer in one direction, and return its record and what it gives then in each batch."""
        kept = torch.from_numpy(self.cut.keep(self.groups.facts.state_axes[one.weights[1]][1]).copy())
        wanted, dense_states = (
            [seen[name][..., kept.to(seen[name].device)] for seen in self._dense] for name in (one.name, one.before)
        )
        best = self._run_small(one, inputs)
        before = error = self._error(one, best.outputs, wanted)
        helped: list[str] = []
        for step in _STEPS if before >= _SAME else ():
            operands = inputs, dense_states if step.is_of_original else best.states
            start = dict(self._new)
            chosen = start
            for found in self._candidates(one, step, operands):
                self._new = start | found
                tried = self._run_small(one, inputs)
                own = self._error(one, tried.outputs, wanted)
                if own < error:
                    best, error, chosen = tried, own, self._new
                self._new = start
            if chosen is not start:
                helped += [name for name in step.names if name not in helped]
            self._new = chosen
        method = f"least squares of {' and '.join(sorted(helped))}" if helped else ""
        return RefittedLayer(one.weights[0], "recurrent", before, error, method), best.outputs

    def _is_backward(self, one: Pass) -> bool:
        return one.number % self._n_directions == 1

    def _weights(self, one: Pass, number: int) -> list[Tensor]:
        """Return the weights of a layer in one direction, with those that are fitted by now."""
        params = self._given[number]["params"]
        n_each = len(params) // len(passes(self.node))
        own = range(one.number * n_each, (one.number + 1) * n_each)
        return [self._new.get(self._names[place], params[place].detach()) for place in own]

    def _run_small(self, one: Pass, inputs: list[Tensor]) -> _Run:
        """Run a layer of the smaller network in one direction on all batches."""
        is_backward = self._is_backward(one)
        found = _Run([], [])
        for number, x in enumerate(inputs):
            given = self._given[number]
            time = 1 - one.batch
            states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
            first = [state[one.number : one.number + 1].contiguous() for state in states]
            weights = self._weights(one, number)
            out, *_ = run_pass(self.node, given, x.flip(time) if is_backward else x, first, weights)
            out = out.flip(time) if is_backward else out
            found.outputs.append(out)
            found.states.append(states_before(first[0], out, time, is_backward))
        return found

    def _candidates(
        self, one: Pass, step: _Step, operands: tuple[Sequence[Tensor], Sequence[Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        """Give new tensors of a layer in one direction: the best fit to single steps, and stiffer ones.

        Args:
            one: the layer and direction.
            step: what is fitted.
            operands: its inputs in each batch, and the states that its steps start from.
        """
        n_gates = operator_of(self.node).recurrence.n_gates  # type: ignore[union-attr]
        n_rows = len(self._weight(one.weights[_INPUTS]))
        n_summed = n_rows // n_gates * (_N_GATES_OF_GRU - 1) if n_gates == _N_GATES_OF_GRU else n_rows
        both = self._moments(one, step.places, operands) if len(step.places) > 1 else None
        apart = () if both and n_summed == n_rows else step.places
        single = [self._moments(one, (place,), operands) for place in apart]
        for ridges in (RIDGES, *_STIFFER):
            found: dict[str, Tensor] = {}
            for place, sums in zip(apart, single, strict=True):
                found |= self._fit_weights(one, (place,), sums, n_rows, ridges, found)
            found |= self._fit_weights(one, step.places, both, n_summed, ridges, found) if both else {}
            if found:
                yield found

    def _fit_weights(
        self,
        one: Pass,
        places: tuple[int, ...],
        sums: tuple[Moments, Moments] | None,
        n_rows: int,
        ridges: Sequence[float],
        found: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Fit the first rows of some weights by one system; their biases together count once, in the first of them.

        Args:
            one: the layer and direction.
            places: the weights.
            sums: over the samples to fit to, and over those held out; None where there are too many unknowns.
            n_rows: rows that are fitted.
            ridges: those that are tried.
            found: tensors that are new already, whose other rows stay.

        Returns:
            New tensors by canonical name; none where no ridge makes single steps better.
        """
        if sums is None or not all(moments.n for moments in sums):
            return {}
        weights = [self._weight(one.weights[place]) for place in places]
        biases = [self._weight(one.biases[place]) for place in places if one.biases]
        weight = torch.cat(weights, 1)
        shift = sum(biases[1:], biases[0]) if biases else weight.new_zeros(len(weight))
        fit = fit_linear(*sums, weight.unsqueeze(0), shift.unsqueeze(0), bool(biases), ridges)
        if not fit.method:
            return {}
        names = [one.weights[place] for place in places]
        new = dict(zip(names, fit.weight[0].tensor_split([weights[0].shape[1]], 1)[: len(weights)], strict=True))
        if biases:
            new[one.biases[places[0]]] = fit.bias[0] - sum(bias.double() for bias in biases[1:])
            new |= {one.biases[place]: bias for place, bias in zip(places[1:], biases[1:], strict=True)}
        for name, value in new.items():
            whole = found.get(name, self._weight(name)).clone()
            whole[:n_rows] = value[:n_rows].to(whole)
            new[name] = whole
        return new

    def _weight(self, name: str) -> Tensor:
        """Return a tensor of the smaller network, as it is by now."""
        return self._new.get(name, self.small[name].detach())

    def _moments(
        self, one: Pass, places: tuple[int, ...], operands: tuple[Sequence[Tensor], Sequence[Tensor]]
    ) -> tuple[Moments, Moments] | None:
        """Sum up what the gates get of inputs, of states or of both; None where that makes too many unknowns."""
        names = [one.weights[place] for place in places]
        n_unknowns = sum(self._weight(name).shape[1] for name in names)
        if n_unknowns > MAX_UNKNOWNS:
            return None
        n_rows = -(-max(_MIN_ROWS, 8 * n_unknowns) // len(self.batches))
        keep = torch.from_numpy(self.cut.keep(self.groups.facts.state_axes[names[0]][0]).copy())
        places_of = {name: number for number, name in enumerate(self._names)}

        def drawn(number: int) -> tuple[Tensor, Tensor, Tensor]:
            shape = operands[places[0]][number].shape[:2]
            chosen = draw_positions(shape.numel(), n_rows, self._generator)
            samples = sample_numbers(shape[one.batch], self.split.sizes[number])
            samples = samples[torch.unravel_index(chosen, shape)[one.batch]]
            params, wanted, inputs = self._dense_given[number]["params"], [], []
            for place in places:
                source = self._at_steps(one, place, self._dense[number][one.before if place else one.source])
                chosen, rows = chosen.to(source.device), keep.to(source.device)
                dense = params[places_of[one.weights[place]]].detach()[rows]
                wanted.append(source[chosen].double() @ dense.double().mT)
                if one.biases:
                    wanted.append(params[places_of[one.biases[place]]].detach()[rows].double().expand_as(wanted[-1]))
                inputs.append(self._at_steps(one, place, operands[place][number])[chosen])
            total = torch.stack(wanted).sum(0)
            return torch.cat(inputs, 1).unsqueeze(0), total.unsqueeze(0), self.split.is_held_out(samples, number)

        return sum_apart(map(drawn, self.batches), (1, n_unknowns, int(keep.sum())))

    def _at_steps(self, one: Pass, place: int, value: Tensor) -> Tensor:
        """Return what each step reads, shape (steps * batch, numbers); backwards, the last has the first state."""
        if place == _STATES and self._is_backward(one):
            value = value.roll(-1, 1 - one.batch)
        return value.flatten(0, 1)

    def _error(self, one: Pass, outputs: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
        """Return the squared error of what a layer gives on samples held out, relative to its variance."""
        total = torch.zeros(4, dtype=torch.float64)
        for number, (got, expected) in enumerate(zip(outputs, wanted, strict=True)):
            samples = sample_numbers(got.shape[one.batch], self.split.sizes[number])
            index = self.split.is_held_out(samples, number).nonzero().squeeze(1).to(got.device)
            y, x = (value.index_select(one.batch, index).double() for value in (expected, got))
            finite = y.isfinite() & x.isfinite()
            y, x = y[finite], x[finite]
            total += torch.stack([(x - y).square().sum(), y.square().sum(), y.sum(), finite.sum()]).double().cpu()
        if is_distributed():
            total = sum_over_processes(total)
        error, square, value, count = map(float, total)
        return error / max(square - value * value / max(count, 1.0), torch.finfo(torch.float64).tiny)


def recurrent_obstacle(node: fx.Node, parts: StoredParts) -> str:
    """Say why a recurrent call cannot be fitted; "" if it can."""
    given = bind_arguments(node)
    if "params" not in given or "input" not in given:
        return "it is a cell of a recurrent layer"
    held = [parts.behind(weight) if weight.op == "get_attr" else None for weight in given["params"]]
    if any(part is None or parts.n_reads(part) > 1 for part in held):
        return "its weights are computed, or read by several calls"
    return ""


def _arguments(node: fx.Node, values: Mapping[str, Any], number: int) -> dict[str, Any]:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: values[operand.name][number])
    return arguments_by_name(node.target, args, kwargs)
