"""Fit of a recurrent layer: what its gates get from inputs and from states, layer after layer in each direction."""

from collections.abc import Iterable, Mapping, Sequence
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
from torchshear.graph._run import arguments_by_name
from torchshear.speedup.compensation._frontier import Frontier
from torchshear.speedup.compensation._least_squares import LinearFit, fit_linear, sum_apart
from torchshear.speedup.compensation._linear_layer import MAX_UNKNOWNS, draw_positions
from torchshear.speedup.compensation._refit_record import RefittedLayer
from torchshear.speedup.compensation._stored_parts import StoredParts

_MIN_ROWS: Final = 32768
_SAME: Final = 1e-10


@dataclass(frozen=True, slots=True)
class _Step:
    """A weight that is fitted, and to what: 0 for inputs and 1 for states; states may be those of the original."""

    place: int
    is_of_original: bool = False

    @property
    def name(self) -> str:
        return "states" if self.place else "inputs"


_STEPS: Final = (_Step(0), _Step(1, True), _Step(1), _Step(0), _Step(1))


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Outputs of a layer in one direction in each batch, and the states that its steps start from."""

    outputs: list[Tensor]
    states: list[Tensor]


class RecurrentFit:
    """Fit of one recurrent call.

    The gates of each layer and direction get W_ih x + b_ih of its inputs and W_hh h + b_hh of its states. Either is
    fitted by least squares to what it was in the original at the rows that are left, and kept where what the layer
    gives comes nearer on samples held out. States are those of the original that are left, and then those that the
    smaller layer comes to by itself. Layers above read what those below give by then.

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

    def run(self) -> tuple[dict[str, Tensor], list[RefittedLayer]]:
        """Fit all layers and directions, and return new tensors by canonical name with a record of each."""
        records = []
        inputs: list[Tensor] = [given["input"] for given in self._given]
        all_passes = passes(self.node)
        n_directions = 2 if self._given[0]["bidirectional"] else 1
        for first in range(0, len(all_passes), n_directions):
            outputs = []
            for one in all_passes[first : first + n_directions]:
                record, found = self._fit_pass(one, inputs, n_directions)
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

    def _fit_pass(self, one: Pass, inputs: list[Tensor], n_directions: int) -> tuple[RefittedLayer, list[Tensor]]:
        """Fit a layer in one direction, and return its record and what it gives then in each batch."""
        is_backward = one.number % n_directions == 1
        kept = torch.from_numpy(self.cut.keep(self.groups.facts.state_axes[one.weights[1]][1]).copy())
        wanted, dense_states = (
            [seen[name][..., kept.to(seen[name].device)] for seen in self._dense] for name in (one.name, one.before)
        )
        best = self._run_small(one, inputs, is_backward)
        before = error = self._error(one, best.outputs, wanted)
        helped: list[str] = []
        for step in _STEPS if before >= _SAME else ():
            states = dense_states if step.is_of_original else best.states
            fit = self._fit_weight(one, step.place, states if step.place else inputs)
            if fit is None or not fit.method:
                continue
            held = dict(self._new)
            self._new[one.weights[step.place]] = fit.weight[0].to(self.small[one.weights[step.place]])
            if one.biases:
                self._new[one.biases[step.place]] = fit.bias[0].to(self.small[one.biases[step.place]])
            tried = self._run_small(one, inputs, is_backward)
            found = self._error(one, tried.outputs, wanted)
            if found < error:
                best, error = tried, found
                helped += [step.name] if step.name not in helped else []
            else:
                self._new = held
        method = f"least squares of {' and '.join(helped)}" if helped else ""
        return RefittedLayer(one.weights[0], "recurrent", before, error, method), best.outputs

    def _weights(self, one: Pass, number: int) -> list[Tensor]:
        """Return the weights of a layer in one direction, with those that are fitted by now."""
        params = self._given[number]["params"]
        n_each = len(params) // len(passes(self.node))
        own = range(one.number * n_each, (one.number + 1) * n_each)
        return [self._new.get(self._names[place], params[place].detach()) for place in own]

    def _run_small(self, one: Pass, inputs: list[Tensor], is_backward: bool) -> _Run:
        """Run a layer of the smaller network in one direction on all batches."""
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

    def _fit_weight(self, one: Pass, place: int, operands: Sequence[Tensor]) -> LinearFit | None:
        """Fit what the gates get from inputs or from states; None where that is too large or no row is finite."""
        name, places = one.weights[place], {name: number for number, name in enumerate(self._names)}
        weight = self._new.get(name, self.small[name].detach())
        rows = torch.from_numpy(self.cut.keep(self.groups.facts.state_axes[name][0]).copy())
        bias = one.biases[place] if one.biases else ""
        shift = weight.new_zeros(len(weight))
        if bias:
            shift = self._new.get(bias, self.small[bias].detach())
        if weight.shape[1] > MAX_UNKNOWNS:
            return None
        n_rows = -(-max(_MIN_ROWS, 8 * weight.shape[1]) // len(self.batches))

        def drawn(number: int) -> tuple[Tensor, Tensor, Tensor]:
            params, operand = self._dense_given[number]["params"], operands[number]
            source = self._dense[number][one.before if place else one.source].flatten(0, 1)
            chosen = draw_positions(len(source), n_rows, self._generator)
            samples = sample_numbers(operand.shape[one.batch], self.split.sizes[number])
            samples = samples[torch.unravel_index(chosen, operand.shape[:2])[one.batch]]
            chosen = chosen.to(source.device)
            dense = params[places[name]].detach()[rows.to(source.device)]
            wanted = source[chosen].double() @ dense.double().mT
            if bias:
                wanted = wanted + params[places[bias]].detach()[rows.to(source.device)].double()
            inputs = operand.flatten(0, 1)[chosen]
            return inputs.unsqueeze(0), wanted.unsqueeze(0), self.split.is_held_out(samples, number)

        fitting, held_out = sum_apart(map(drawn, self.batches), (1, weight.shape[1], weight.shape[0]))
        if not fitting.n or not held_out.n:
            return None
        return fit_linear(fitting, held_out, weight.unsqueeze(0), shift.unsqueeze(0), bool(bias))

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
