"""A run over batches: the graph is interpreted, and sums are taken of its values and gradients."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.calibration._batches import describe
from torchshear.calibration._dense_loss import DenseLoss, Loss, LossFunction
from torchshear.calibration._functions import Functions
from torchshear.calibration._gates import Gates
from torchshear.calibration._output_gradients import OutputGradients
from torchshear.calibration._processes import n_processes
from torchshear.calibration._recurrent import is_recurrent, passes
from torchshear.calibration._recurrent import run as run_recurrent
from torchshear.calibration._samples import SampleSplit, batch_dimension, count_samples, hold_out_alike
from torchshear.calibration._statistics import (
    MAX_GRAM,
    SUMS_OF_GRADIENTS,
    SUMS_OF_VALUES,
    SUMS_OF_WEIGHTS,
    Statistics,
    Sum,
)
from torchshear.calibration._sums import HeadAccumulator, RowAccumulator, ValueAccumulator
from torchshear.calibration._taps import GroupTaps, find_taps, sample_input
from torchshear.calibration._weight_calls import find_weight_calls
from torchshear.calibration._weight_source import weights_to_score
from torchshear.calibration._weight_sums import WeightAccumulators
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._purposes import HEADS, OWN_PURPOSES, READING_PURPOSES
from torchshear.dependency.groups._weights import computed_weights
from torchshear.errors import DataError, first_line
from torchshear.graph._location import locate
from torchshear.graph._nodes import is_written
from torchshear.graph._run import interpret
from torchshear.graph.model._process import run_exclusively


class Run:
    """Data going through a captured model, and what is summed of it.

    Args:
        groups: the channel groups of the model.
        loss_fn: gives a scalar from output and target, or is "dense"; None if `sums` needs no gradients.
        sums: what to sum.
        whole: names of groups that no gradient needs to reach, since they stay whole.
    """

    def __init__(
        self, groups: ChannelGroups, loss_fn: Loss | None, sums: frozenset[Sum], whole: frozenset[str] = frozenset()
    ) -> None:
        self.groups = groups
        self.graph = groups.graph
        self.fingerprint = self.graph.fingerprint  # takes a while
        self.sums = sums
        self.whole = whole
        self.loss_fn: LossFunction | None = None
        if loss_fn is not None and sums & (SUMS_OF_GRADIENTS | {"output_gradients"}):
            self.loss_fn = DenseLoss() if isinstance(loss_fn, str) else loss_fn
        self._is_optional = not sums & SUMS_OF_GRADIENTS  # then sums are worth something without gradients as well
        self.n_batches = self.n_samples = self._n_here = 0
        self._split: SampleSplit | None = None
        self._is_held_out: Tensor | None = None
        self.total_loss = 0.0
        taps = find_taps(groups)
        self.shown = {name: one.visible for name, one in taps.items()}
        self.by_layer = {name: found for one in taps.values() for name, found in one.by_layer.items()}
        self._activations = {node.name: node for node in self.graph if node.op == "call_function"}
        self.layers = tuple(find_weight_calls(groups))
        of_layers = self.layers if "output_gradients" in sums and self.loss_fn else ()
        self.output_gradients = OutputGradients(groups, of_layers, not isinstance(self.loss_fn, DenseLoss))
        self.values = self._value_sums()
        self.watched: dict[str, list[tuple[ValueAccumulator, str]]] = {}
        for (name, _), accumulator in self.values.items():
            node, _, through = name.partition(">")
            self.watched.setdefault(node, []).append((accumulator, through))
        self._source = sample_input(self.graph)
        self._read_state()
        self.gates = self._gates(taps)
        self.functions = Functions(self.graph, self.gates.names) if self.loss_fn else None
        seen = {name.partition(":")[0] for name in (*self.watched, *self.gates.names) if ":" in name}
        seen |= self.output_gradients.opened
        # Recurrent calls that are run layer by layer: those to be looked into, and all where there are gradients.
        self.opened = {n.name for n in self.graph if n.name in seen or (self.loss_fn and is_recurrent(n))}
        self._lines: dict[str, dict[int, int]] = {}
        self.rows = self._row_sums()
        self.heads = self._head_sums()
        given = weights_to_score(groups, None)
        weights = {name: given[name] for name in self.parameters}
        self.weights = WeightAccumulators(weights, sums, self._lines, n_processes())

    def _value_sums(self) -> dict[tuple[str, int], ValueAccumulator]:
        """(node, dimension) -> the sums of values in which groups show, and of those that layers read."""
        wanted: dict[tuple[str, int], set[Sum]] = {}
        nonnegative: set[tuple[str, int]] = set()
        for taps in (*self.shown.values(), *self.by_layer.values()):
            left_out: set[Sum] = set() if any(tap.has_zeros for tap in taps) else {"zeros"}
            for tap in taps:
                wanted.setdefault(tap.key, set()).update(self.sums & SUMS_OF_VALUES - left_out)
                nonnegative |= {tap.key} if tap.is_nonnegative else set()
        of_inputs: dict[Sum, Sum] = {"inputs": "squares", "means": "total"}
        of_read = {word for asked, word in of_inputs.items() if asked in self.sums}
        computed = self._batch_dimensions() if "grams" in self.sums else {}
        pruned = {m.name for group in self.groups.prunable for m in group.members if m.purposes & READING_PURPOSES}
        for layer in self.layers:
            if layer.dim is not None and layer.inputs is not None:
                asked = wanted.setdefault((layer.source, layer.dim), set())
                asked |= of_read
                if "grams" in self.sums and layer.weight in pruned and layer.source in computed:
                    n_inputs = self.graph.state[layer.weight].tensor.shape[layer.inputs]
                    asked |= {"grams"} if n_inputs <= MAX_GRAM else {"squares", "total"}
        found = {}
        for (name, dim), sums in wanted.items():
            batch_dim = computed[name] if "grams" in sums else None
            if sums:
                found[name, dim] = ValueAccumulator(dim, sums, (name, dim) in nonnegative, batch_dim or 0)
        return found

    def _batch_dimensions(self) -> dict[str, int | None]:
        """Name of a computed value -> the dimension that holds the batch, also inside recurrent calls."""
        found = {name: batch_dimension(node, self.graph.batch_hint) for name, node in self._activations.items()}
        for node in self._activations.values():
            for one in passes(node) if is_recurrent(node) else ():
                found |= {name: one.batch for name in (one.source, one.before) if ":" in name}
        return found

    def _read_state(self) -> None:
        """Find the tensors of the model that calls read: those to differentiate by, and those that stay as they are."""
        written: dict[str, bool] = {}
        for node in self.graph:
            if node.op == "get_attr":
                written[str(node.target)] = written.get(str(node.target), False) or is_written(node)
        self.shared = {name for name, one in written.items() if not one}
        state = self.graph.state
        read = [name for name in state if name in written and state[name].kind == "parameter"] if self.loss_fn else []
        self.parameters = tuple(name for name in read if state[name].tensor.is_floating_point())
        computed = {name: found for name, found in computed_weights(self.groups).items() if name in self.parameters}
        self.computed = {node.name: (name, node is found[0]) for name, found in computed.items() for node in found}

    def _gates(self, taps: dict[str, GroupTaps]) -> Gates:
        device = next((t.device for t in self.graph.inputs.tensors()), torch.device("cpu"))
        return Gates(self.groups, taps if "gates" in self.sums and self.loss_fn else {}, device)

    def _row_sums(self) -> dict[tuple[str, int], tuple[str, RowAccumulator]]:
        """(weight, dimension of its rows) -> (its bias, sums), for weights whose rows make units of a group."""
        bias_of = {layer.weight: layer.bias for layer in self.layers}
        found: dict[tuple[str, int], tuple[str, RowAccumulator]] = {}
        for group in self.groups.prunable if "rows" in self.sums else ():
            for member in group.members:
                if member.name in self.parameters and member.purposes & OWN_PURPOSES:
                    bias = bias_of.get(member.name, "")
                    fits = bias in self.parameters and self.graph.state[bias].shape == (member.size,)
                    found[member.name, member.dim] = (bias if fits else "", RowAccumulator(member.size))
                    self._lines.setdefault(member.name, {})[member.dim] = member.n_blocks
                    if fits:
                        self._lines.setdefault(bias, {})[0] = 0
        return found

    def _head_sums(self) -> dict[str, HeadAccumulator]:
        """Name of a group of attention heads -> sums, for groups that some layer reads."""
        found: dict[str, HeadAccumulator] = {}
        for group in self.groups.prunable if "heads" in self.sums else ():
            reading = [m for m in group.members if m.name in self.parameters and m.purposes & READING_PURPOSES]
            if group.role in HEADS and reading:
                columns = {(m.name, m.dim): (torch.from_numpy(m.positions), torch.from_numpy(m.units)) for m in reading}
                found[group.name] = HeadAccumulator(group.width, columns)
                for member in reading:
                    self._lines.setdefault(member.name, {})[member.dim] = member.n_blocks
        return found

    def count_samples(self, leaves: Sequence[Any], number: int) -> int:
        """Return the number of samples in a batch.

        Raises:
            DataError: there is none.
        """
        size = len(leaves[self._source[0]]) if self._source is not None else 1
        if not size:
            raise DataError(f"batch {number} holds no sample; expected at least one.")
        return size

    def hold_out(self, batches: Sequence[Sequence[Any]]) -> None:
        """Choose the samples that are held out of products of what layers read, from the inputs of all batches."""
        sizes = tuple(count_samples(self.graph, leaves) for leaves in batches)
        self._split = SampleSplit(sizes, hold_out_alike(self.graph, batches, sizes))

    def batch(self, leaves: list[Any], target: Any) -> None:
        """Run one batch forward, and backward where there is a loss."""
        size = self.count_samples(leaves, self.n_batches)
        takes_gradients = self.loss_fn is not None and not (self._is_optional and self.output_gradients.is_enough)
        with run_exclusively(), torch.set_grad_enabled(takes_gradients), torch.random.fork_rng(devices=[]):
            held: dict[str, Tensor] = {}
            self._n_here = size
            if self._split is not None:
                self._is_held_out = self._split.is_held_out(torch.arange(size), self.n_batches)
            self.gates.start(size)
            output: Any = None
            for _, value in interpret(
                self.graph.fx_graph,
                leaves,
                lambda name: self._load(name, held),
                self._apply,
                lambda node, value: self._follow(node, value, held),
            ):
                output = value
            result = pytree.tree_unflatten(pytree.tree_leaves(output), self.graph.out_spec)
            if takes_gradients and self._is_optional:
                self.output_gradients.take(lambda: self._loss(result, target), result, list(held.values()), size)
            elif takes_gradients:
                self._backward(self._loss(result, target), held)
                self.output_gradients.finish(size)
            if self.functions is not None:
                self.functions.finish()
        self.n_batches += 1
        self.n_samples += size

    def _check_values(self, node: fx.Node, accumulator: ValueAccumulator) -> None:
        if not accumulator.is_finite:
            place = locate(node)
            raise DataError(
                f"activations of batch {self.n_batches} are NaN or infinite behind {place.operator} in "
                f"{place.module or 'the model itself'!r}. Check the data, and the weights up to there."
            )

    def _apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            if node.name in self.opened:
                shows_sums = torch.is_grad_enabled() and node.name in self.output_gradients.opened
                return run_recurrent(
                    node, args, kwargs, lambda name, value: self._observe(node, name, value), shows_sums
                )
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (DataError, torch.OutOfMemoryError):
            raise
        except (IndexError, RuntimeError, ValueError) as error:  # as operators fail on data that does not fit
            place = locate(node)
            raise DataError(
                f"the model does not run on batch {self.n_batches}: {place.operator} in "
                f"{place.module or 'the model itself'!r}: {type(error).__name__}: {first_line(error)}. Check the data: "
                f"indices in range, and the same number of samples in every input."
            ) from error

    def _follow(self, node: fx.Node, value: Any, held: dict[str, Tensor]) -> Any:
        """Give the value to go on with behind a node."""
        if self.functions is not None:
            value = self.functions.result(node, value)
        if isinstance(value, Tensor):
            value = self._observe(node, node.name, value)
        if node.name in self.computed and self.loss_fn is not None:  # gradients are by the weight that is read
            name, is_first = self.computed[node.name]
            if is_first:
                held[name] = value if value.requires_grad else value.requires_grad_()
            value = held[name]
        if self.functions is not None:
            self.functions.keep(node, value)
        return value

    def _observe(self, node: fx.Node, name: str, value: Tensor) -> Tensor:
        """Count a value in where it is to be; gives the value to go on with."""
        value = self.gates.watch(name, value)
        self.output_gradients.watch(name, value, self._n_here)
        for accumulator, through in self.watched.get(name, ()):
            seen = self._apply_activation(through, value) if through else value
            accumulator.add(seen, self._is_held_out)
            self._check_values(node, accumulator)
        return value

    def _apply_activation(self, activation: str, value: Tensor) -> Tensor:
        """Apply an activation of the graph to another value than its own operand."""
        node = self._activations[activation]
        with torch.no_grad():
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: value.detach().clone())  # it may write to it
            result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return result

    def _load(self, name: str, held: dict[str, Tensor]) -> Tensor:
        if name in held:
            return held[name]
        tensor = self.graph.state[name].tensor.detach()
        tensor = tensor if name in self.shared else tensor.clone()
        if name in self.parameters:
            held[name] = tensor.requires_grad_()
        return tensor

    def _loss(self, output: Any, target: Any) -> Tensor:
        assert self.loss_fn is not None
        where = f"of batch {self.n_batches}"
        try:
            loss = self.loss_fn(output, target)
        except Exception as error:
            error.add_note(f"loss_fn was called with the output and the target {where}: {describe(target)}")
            raise
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise DataError(f"the loss {where} is {what}; expected a scalar tensor. Take the mean over the samples.")
        if loss.is_complex():
            raise DataError(f"the loss {where} is of dtype {loss.dtype}; expected a real number.")
        if not loss.requires_grad:
            raise DataError(f"the loss {where} does not depend on the model's outputs by differentiable operations.")
        if not math.isfinite(float(loss.detach())):
            raise DataError(f"the loss {where} is {float(loss.detach())}; expected a finite number. Check the data.")
        self.total_loss += float(loss.detach())
        return loss.reshape(())

    def _backward(self, loss: Tensor, held: dict[str, Tensor]) -> None:
        inputs = [*held.values(), *self.gates.leaves]
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, inputs, allow_unused=True)
        found = dict(zip(held, gradients, strict=False))
        self._check_reach(found)
        with torch.no_grad():
            products, bad = self.weights.add({name: found.get(name) for name in self.parameters})
            self._check_finite(bad)
            for key, (bias, rows) in self.rows.items():
                if key in products:
                    rows.add(products[key], products.get((bias, 0)))
            for heads in self.heads.values():
                heads.add(products)
            self.gates.finish()

    def _check_reach(self, gradients: dict[str, Tensor | None]) -> None:
        for group in self.groups.prunable:
            own = [m.name for m in group.members if m.name in gradients]
            if own and group.name not in self.whole and all(gradients[name] is None for name in own):
                raise DataError(
                    f"no gradient of the loss reaches group {group.name!r} ({', '.join(own[:3])}); expected a loss "
                    f"that depends on all outputs, or exclude={group.name!r} where it stays whole."
                )

    def check(self) -> None:
        """Raise DataError if the data said nothing: gradients that are all zero, at each weight and in each batch."""
        if self.loss_fn is not None and self.parameters and not (self._is_optional or self.weights.has_gradient):
            raise DataError(
                f"the gradients of the loss are zero at all weights, in all of {self.n_batches} batches, so that no "
                f"unit can be told from another. Check the loss, and that the model gives more than constants."
            )

    def _check_finite(self, bad: set[str]) -> None:
        for group in self.groups.prunable if bad else ():
            own = bad.intersection(member.name for member in group.members)
            if own:
                raise DataError(
                    f"gradients of batch {self.n_batches} are NaN or infinite at {min(own)!r}, of group "
                    f"{group.name!r}. Scale the loss, or leave out the samples that make them so."
                )

    def result(self) -> Statistics:
        """All sums, frozen."""
        return Statistics(
            fingerprint=self.fingerprint,
            n_batches=self.n_batches,
            n_samples=self.n_samples,
            values={key: sums.result() for key, sums in self.values.items() if sums.count},
            weights=self.weights.result() if self.sums & SUMS_OF_WEIGHTS else {},
            rows={key: sums.result() for key, (_, sums) in self.rows.items()},
            gates=self.gates.result(),
            heads={name: sums.result() for name, sums in self.heads.items()},
            taps=self.shown,
            by_layer=self.by_layer,
            layers=self.layers,
            output_gradients=self.output_gradients.result(),
            sums=self.sums,
            loss=self.total_loss / self.n_batches
            if self.loss_fn and self.n_batches and not self._is_optional
            else None,
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        halves = {
            str(e.tensor.dtype) for e in self.graph.state.values() if e.tensor.dtype in (torch.float16, torch.bfloat16)
        }
        if halves:
            yield f"the model computes in {', '.join(sorted(halves))}; sums are float32"
        if self.output_gradients.problem:
            yield self.output_gradients.problem
