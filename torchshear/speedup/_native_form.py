"""Whether the user's own module, with smaller tensors and other sizes, is what the rewritten graph is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchshear.dependency import Cut
from torchshear.graph import (
    Cache,
    ExampleInputs,
    Graph,
    as_if_exporting,
    caches_of,
    copy_model,
    failure_of,
    forget,
    locate,
)
from torchshear.graph._run import graph_values
from torchshear.speedup._compare import random_like
from torchshear.speedup._judge import Fault, Trial, find_fault, run_trial
from torchshear.speedup._native import native_copy
from torchshear.speedup._repair import repair
from torchshear.speedup._rewrite import changed_integers, implied_arguments, rewrite_graph
from torchshear.speedup._sizes import Sizes, choices, explain


def native_form(
    model: nn.Module, cut: Cut, tensors: Mapping[str, Tensor], sliced: Mapping[str, Tensor]
) -> tuple[nn.Module | None, str]:
    """A copy of the user's module that equals the rewritten graph.

    Both are compared in float64 on the example and on random inputs, also with the branches that code takes while it
    is exported. Where they differ, the sizes that the modules keep in attributes are searched.

    Args:
        model: the original.
        cut: the units that go.
        tensors: canonical name -> tensor of the original.
        sliced: canonical name -> shrunk tensor.

    Returns:
        The copy, or None; and why.
    """
    unsaid = implied_arguments(cut.groups.graph.fx_graph, cut.groups.facts, cut)
    if unsaid:
        node, name = unsaid[0]
        more = f" and {len(unsaid) - 1} more" if len(unsaid) > 1 else ""
        return None, (
            f"{locate(node)}{more}: {name!r} is not given, so the operator derives it from a size that changes; no "
            f"attribute can keep it at its value"
        )
    making = _Making.of(model, cut, tensors, sliced)
    try:
        work = making.native({})
    except Exception as error:  # a module that cannot be deep-copied says so with any exception
        return None, f"the model cannot be copied: {type(error).__name__}: {error}"
    sizes, fault = making.find_sizes(work)
    native = making.native(sizes)
    if fault is not None:
        return None, _reason(fault, making)
    failure = _failure_in_training(native, model, cut.groups.graph)
    if failure is not None:
        return None, failure
    changed = f", with other values of {explain(sizes)}" if sizes else ""
    return native, f"its own module with smaller tensors{changed}; equal to the rewritten graph on all inputs tried"


@dataclass(frozen=True, slots=True)
class _Making:
    """All that making and trying a native form needs."""

    model: nn.Module
    cut: Cut
    replacements: dict[int, Tensor]
    sliced: Mapping[str, Tensor]
    rewritten: torch.fx.Graph
    caches: tuple[Cache, ...]

    @classmethod
    def of(cls, model: nn.Module, cut: Cut, tensors: Mapping[str, Tensor], sliced: Mapping[str, Tensor]) -> "_Making":
        graph = cut.groups.graph
        replacements = {id(tensors[name]): tensor for name, tensor in sliced.items()}
        replacements |= {id(own): sliced[name] for name, own in own_constants(model, graph) if name in sliced}
        rewritten = rewrite_graph(graph.fx_graph, cut.groups.facts, cut)
        return cls(model, cut, replacements, sliced, rewritten, caches_of(model, graph.inputs))

    @property
    def graph(self) -> Graph:
        return self.cut.groups.graph

    def native(self, sizes: Sizes) -> nn.Module:
        changes = changed_integers(self.graph.fx_graph, self.cut.groups.facts, self.cut)
        native = native_copy(self.model, self.replacements, changes, sizes)
        forget(native, self.caches)
        return native

    def find_sizes(self, work: nn.Module) -> tuple[Sizes, Fault | None]:
        """Sizes with which a copy is right, and what is wrong nevertheless."""
        for module in work.modules():
            module.training = False
        own = next((t.dtype for t in self.sliced.values() if t.is_floating_point()), torch.float32)
        quick = find_fault(work, run_trial(self._inputs, own, self._values(own), remember=False))
        forget(work, self.caches)
        wide = copy_model(work, {}).to(torch.float64)  # a copy, since the first one has the tensors of the result
        try:
            trials = self._trials(torch.float64, remember=quick is not None)
            faults = [find_fault(wide, trial) for trial in trials]
            refused = any(f is not None and not f.check and f.message != (quick and quick.message) for f in faults)
        except (RuntimeError, TypeError, NotImplementedError):
            refused = True
        if refused:  # an operator refuses float64
            wide, trials = work, self._trials(own, remember=quick is not None)
            faults = [find_fault(wide, trial) for trial in trials]
        if not any(faults):
            return {}, None
        if quick is None:
            trials = self._trials(trials[0].dtype, remember=True)
        found = repair(wide, choices(self.model, self.graph, self.cut), self._possible(trials))
        return found.sizes, found.fault

    @property
    def _inputs(self) -> ExampleInputs:
        """The example; at most two samples of it where the batch is free."""
        graph = self.graph
        batch = graph.inputs.batch_size()
        return graph.inputs.with_batch(2) if graph.batch_hint is not None and batch and batch > 2 else graph.inputs

    def _trials(self, dtype: torch.dtype, remember: bool) -> list[Trial]:
        """The example, also as if it were exported, and random inputs, with one sample more where the batch is free.

        One input is not enough: an activation may be saturated throughout, a size may fit one batch by accident.
        """
        inputs, values = self._inputs, self._values(dtype)
        batch = inputs.batch_size()
        more = inputs.with_batch(batch + 1) if self.graph.batch_hint is not None and batch else inputs
        example = run_trial(inputs, dtype, values, remember)
        return [
            example,
            replace(example, exporting=True),
            run_trial(random_like(more, seed=1), dtype, values, remember),
        ]

    def _values(self, dtype: torch.dtype) -> Callable[[list[Any]], Iterator[Any]]:
        """A function that gives the values of all nodes of the rewritten graph on flat inputs."""
        state = {
            name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
            for name, tensor in self.sliced.items()
        }
        return lambda leaves: (value for _, value in graph_values(self.rewritten, state, leaves))

    def _possible(self, trials: list[Trial]) -> list[Trial]:
        """Trials without those that the original does not run on either."""
        with as_if_exporting():
            refused = failure_of(self.model, self.graph.inputs, "eval") is not None
        return [trial for trial in trials if not (trial.exporting and refused)]


def _reason(fault: Fault, making: _Making) -> str:
    """Say which module, and which line of it, is wrong on the smaller tensors."""
    where = f"module {fault.modules[0]!r}" if fault.modules[0] else "the model"
    changes = changed_integers(making.graph.fx_graph, making.cut.groups.facts, making.cut)
    places = [locate(change.node) for change in changes]
    lines = dict.fromkeys(place.source for place in places if place.module == fault.modules[0] and place.source)
    source = f"; sizes change at {', '.join(list(lines)[:3])}" if lines and fault.check else ""
    return f"{where}: {fault.message}{source}"


def own_constants(model: nn.Module, graph: Graph) -> list[tuple[str, Tensor]]:
    """Plain tensor attributes of the model's modules that the graph holds as constants."""
    found: list[tuple[str, Tensor]] = []
    for name, entry in graph.state.items():
        if entry.kind == "constant":
            owner: Any = model
            for part in name.split("."):
                owner = getattr(owner, part, None)
            if isinstance(owner, Tensor):
                found.append((name, owner))
    return found


def _failure_in_training(native: nn.Module, model: nn.Module, graph: Graph) -> str | None:
    """Why a native form does not run in train mode though its original does, or None."""
    inputs: ExampleInputs = random_like(graph.inputs, seed=0)
    batch = inputs.batch_size()
    if graph.batch_hint is not None and batch == 1:
        inputs = inputs.with_batch(2)  # batch norms need two values a channel
    failure = failure_of(native, inputs, "train")
    if failure is None or failure_of(model, inputs, "train") is not None:
        return None
    return f"its own forward does not run in train mode on the smaller tensors ({failure})"
