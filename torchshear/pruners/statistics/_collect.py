"""Running data through a captured model to see how much each unit does."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear._distributed import agree_on_length
from torchshear.dependency import ChannelGroups, analyze
from torchshear.errors import ArgumentError, DataError, WeightError
from torchshear.graph import Graph
from torchshear.graph._run import interpret, is_only_read
from torchshear.pruners.statistics._batches import batches_of
from torchshear.pruners.statistics._distributed import all_reduced
from torchshear.pruners.statistics._statistics import Statistics
from torchshear.pruners.statistics._sums import GateAccumulator, RowAccumulator, ValueAccumulator, WeightAccumulator
from torchshear.pruners.statistics._taps import OWN, Tap, find_layers, find_taps

Loss = Callable[[Any, Any], Tensor]


def collect(
    network: Graph | ChannelGroups,
    loader: Iterable[Any],
    loss_fn: Loss | None = None,
    batches: int = 32,
    progress: bool = True,
) -> Statistics:
    """Run data through a model in eval mode, and sum up what criteria that look at data need.

    Nothing of the model changes: its weights stay as they are, and batch norms use their running statistics. Without a
    loss only forward passes are made, which is enough for criteria of activations. With one, gradients are taken as
    well; one batch is one backward pass, and the loss should be a mean over its samples. What is summed is summed in
    float32 at least, also for a model in half precision. Under `torch.distributed` every process gives its own data;
    sums are over all of them, so that all make the same plan.

    Args:
        network: the captured model or its channel groups.
        loader: gives batches: a tensor, a tuple of the positional arguments with or without a target behind them, a
            pair (inputs, target), or a dictionary with the keyword arguments. An endless one is stopped.
        loss_fn: called as `loss_fn(output, target)`, where the target of a batch without one is the batch itself;
            gives a scalar tensor. None: no gradients.
        batches: how many batches to run.
        progress: whether to draw a bar where the error stream is a terminal.

    Returns:
        The sums, for `torchshear.plan(..., statistics=...)`.

    Raises:
        ArgumentError: `batches` is not a positive integer, or the loss is not callable.
        DataError: the loader is empty, too short, or gives batches of another structure or size; the loss is not a
            scalar, or NaN or infinite, or so are gradients; no gradient reaches a group; processes have different
            numbers of batches.
        WeightError: the model is on the meta device.
    """
    groups = network if isinstance(network, ChannelGroups) else analyze(network)
    _check(groups.graph, loss_fn, batches)
    run = _Run(groups, loss_fn)
    error: DataError | None = None
    try:
        found = batches_of(loader, batches, groups.graph)
        console = Console(stderr=True)
        if progress and console.is_terminal:
            found = iter(track(found, "collecting", batches, console=console, transient=True))
        for leaves, target in found:
            run.batch(leaves, target)
    except DataError as failure:  # the other processes wait for this one to say so
        error = failure
    agree_on_length(run.n_batches, error, "collect")
    return all_reduced(run.result())


def _check(graph: Graph, loss_fn: Loss | None, batches: int) -> None:
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ArgumentError(f"batches={batches!r}; expected a positive integer.")
    if loss_fn is not None and not callable(loss_fn):
        raise ArgumentError(f"loss_fn is {type(loss_fn).__name__}; expected a function of output and target, or None.")
    if any(entry.tensor.is_meta for entry in graph.state.values()):
        raise WeightError("the model is on the meta device and cannot be run; load its weights to collect statistics.")


class _Run:
    """Sums of one call of `collect`."""

    def __init__(self, groups: ChannelGroups, loss_fn: Loss | None) -> None:
        self.groups = groups
        self.graph = groups.graph
        self.loss_fn = loss_fn
        self.n_batches = self.n_samples = 0
        self.total_loss = 0.0
        taps = find_taps(groups)
        self.shown = {name: one.activated or one.made for name, one in taps.items()}
        self.layers = tuple(find_layers(self.graph))
        self.values = {
            **{(tap.node, tap.dim): ValueAccumulator() for taps in self.shown.values() for tap in taps},
            **{(layer.source, layer.dim): ValueAccumulator() for layer in self.layers if layer.dim is not None},
        }
        self.watched: dict[str, list[int]] = {}
        for node, dim in self.values:
            self.watched.setdefault(node, []).append(dim)
        self.gated: dict[str, list[tuple[str, Tap]]] = {}
        for name, one in taps.items():
            for tap in one.made if loss_fn else ():
                self.gated.setdefault(tap.node, []).append((name, tap))
        self.gates = {name: GateAccumulator(groups[name].width) for name, one in taps.items() if loss_fn and one.made}
        read = {str(n.target): is_only_read(n) for n in self.graph if n.op == "get_attr"}
        self.shared = {name for name, only in read.items() if only}
        parameters = {n: e.tensor for n, e in self.graph.state.items() if e.kind == "parameter" and n in read}
        floating = {name: tensor for name, tensor in parameters.items() if tensor.is_floating_point()}
        self.weights = {name: WeightAccumulator(tensor) for name, tensor in floating.items() if loss_fn}
        self.rows = self._row_sums()

    def _row_sums(self) -> dict[str, tuple[int, str, RowAccumulator]]:
        """Weight -> (dimension of its rows, its bias, sums), for weights whose rows make units of a group."""
        bias_of = {layer.weight: layer.bias for layer in self.layers}
        found: dict[str, tuple[int, str, RowAccumulator]] = {}
        for group in self.groups.prunable:
            for member in group.members:
                if member.name in self.weights and member.roles & OWN:
                    length = self.weights[member.name].weight.shape[member.dim]
                    bias = bias_of.get(member.name, "")
                    fits = bias in self.weights and len(self.weights[bias].weight) == length
                    found[member.name] = (member.dim, bias if fits else "", RowAccumulator(length))
        return found

    def batch(self, leaves: list[Any], target: Any) -> None:
        """Run one batch forward, and backward where there is a loss."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
        size = tensors[0].shape[0] if tensors else 1
        with torch.set_grad_enabled(self.loss_fn is not None), torch.random.fork_rng(devices=[]):
            held: dict[str, Tensor] = {}
            gates = {name: self._fresh_gate(name, size) for name in self.gates}
            output: Any = None
            for node, value in interpret(
                self.graph.fx_graph,
                leaves,
                lambda name: self._load(name, held),
                lambda n, a, k: self._call(n, a, k, gates),
            ):
                output = value
                for dim in self.watched.get(node.name, ()) if isinstance(value, Tensor) else ():
                    self.values[node.name, dim].add(value, dim)
            if self.loss_fn is not None:
                result = pytree.tree_unflatten(pytree.tree_leaves(output), self.graph.out_spec)
                self._backward(self._loss(result, target), held, gates)
        self.n_batches += 1
        self.n_samples += size

    def _load(self, name: str, held: dict[str, Tensor]) -> Tensor:
        tensor = self.graph.state[name].tensor.detach()
        tensor = tensor if name in self.shared else tensor.clone()
        if name in self.weights:
            tensor = held.setdefault(name, tensor.requires_grad_())
        return tensor

    def _fresh_gate(self, group: str, size: int) -> Tensor:
        device = next((t.device for t in self.graph.inputs.tensors()), torch.device("cpu"))
        return torch.ones(size, self.groups[group].width, device=device, requires_grad=True)

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], gates: dict[str, Tensor]) -> Any:
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        for group, tap in self.gated.get(node.name, ()):
            value = _gated(value, gates[group], tap)
        return value

    def _loss(self, output: Any, target: Any) -> Tensor:
        assert self.loss_fn is not None
        loss = self.loss_fn(output, target)
        where = f"of batch {self.n_batches}"
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise DataError(f"the loss {where} is {what}; expected a scalar tensor. Take the mean over the samples.")
        if not loss.requires_grad:
            raise DataError(f"the loss {where} does not depend on the model's outputs by differentiable operations.")
        if not math.isfinite(float(loss.detach())):
            raise DataError(f"the loss {where} is {float(loss.detach())}; expected a finite number. Check the data.")
        self.total_loss += float(loss.detach())
        return loss.reshape(())

    def _backward(self, loss: Tensor, held: dict[str, Tensor], gates: dict[str, Tensor]) -> None:
        names = list(held)
        found = torch.autograd.grad(loss, [*held.values(), *gates.values()], allow_unused=True)
        gradients: dict[str, Tensor | None] = dict(zip(names, found, strict=False))
        self._check_gradients(gradients)
        products: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, accumulator in self.weights.items():
                gradient = gradients.get(name)
                if gradient is None:
                    accumulator.skip()
                else:
                    products[name] = accumulator.add(gradient)
            for name, (dim, bias, rows) in self.rows.items():
                if name in products:
                    rows.add(products[name], dim, products.get(bias))
            for (name, gate), gradient in zip(gates.items(), found[len(names) :], strict=True):
                self.gates[name].add(torch.zeros_like(gate) if gradient is None else gradient)

    def _check_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        bad = {name for name, g in gradients.items() if g is not None and not math.isfinite(float(g.sum()))}
        bad = {name for name in bad if not bool(torch.isfinite(gradients[name]).all())}  # type: ignore[arg-type]
        for group in self.groups.prunable:
            own = [m.name for m in group.members if m.name in gradients]
            if bad.intersection(own):
                raise DataError(
                    f"gradients of batch {self.n_batches} are NaN or infinite at {min(bad.intersection(own))!r}, of "
                    f"group {group.name!r}. Scale the loss, or leave out the samples that make them so."
                )
            if own and all(gradients[name] is None for name in own):
                raise DataError(
                    f"no gradient of the loss reaches group {group.name!r} ({', '.join(own[:3])}); expected a loss "
                    f"that depends on all outputs, or exclude the group from pruning."
                )

    def result(self) -> Statistics:
        """All sums, frozen."""
        return Statistics(
            fingerprint=self.graph.fingerprint,
            n_batches=self.n_batches,
            n_samples=self.n_samples,
            values={key: sums.result() for key, sums in self.values.items() if sums.count},
            weights={name: sums.result() for name, sums in self.weights.items()},
            rows={name: sums.result() for name, (_, _, sums) in self.rows.items()},
            gates={name: sums.result() for name, sums in self.gates.items()},
            taps=self.shown,
            layers=self.layers,
            loss=self.total_loss / self.n_batches if self.loss_fn and self.n_batches else None,
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        halves = {
            str(e.tensor.dtype) for e in self.graph.state.values() if e.tensor.dtype in (torch.float16, torch.bfloat16)
        }
        if halves:
            yield f"the model computes in {', '.join(sorted(halves))}; sums are float32"


def _gated(value: Tensor, gate: Tensor, tap: Tap) -> Tensor:
    """A value with units of a group multiplied by their gates, one for each sample where dimension 0 holds them."""
    samples, length = gate.shape[0], value.shape[tap.dim]
    factors = gate.index_select(1, torch.from_numpy(tap.units).to(gate.device))
    if len(tap.positions) != length or (tap.positions != range(length)).any():
        places = torch.from_numpy(tap.positions).to(gate.device)
        factors = torch.ones(samples, length, device=gate.device).index_copy(1, places, factors)
    shape = [1] * value.ndim
    shape[tap.dim] = length
    if tap.dim != 0 and value.shape[0] % samples == 0 and value.shape[0] >= samples:
        shape[0] = value.shape[0]
        factors = factors.repeat_interleave(value.shape[0] // samples, 0)
    else:  # the value is of no sample: what it adds to the loss of the batch counts once
        factors = factors[:1]
    return value * factors.reshape(shape).to(value.dtype)
