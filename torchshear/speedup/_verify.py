"""Proof by comparison: the shrunk model computes what the masked model computes."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear.dependency import ChannelGroups, Cut, PruningPlan
from torchshear.errors import VerificationError
from torchshear.graph import ExampleInputs, locate
from torchshear.speedup._compare import random_like, relative_error, to_float64, tolerance
from torchshear.speedup._reference import graph_values, masked_values
from torchshear.speedup._rewrite import rewrite_graph
from torchshear.speedup._shrink import analysis_of
from torchshear.speedup._state import slice_state


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared, and how closely it agreed.

    Attributes:
        reference: "masked" for the original module with the cut parameters set to zero; "kept positions" where an
            operator mixes positions (norms, softmax, means), for the original graph with those operators run on the
            kept positions only.
        max_error: largest difference of any output, relative to the output's largest absolute value.
        dtype: dtype in which both were computed.
        n_inputs: number of inputs compared: the example and random ones.
    """

    reference: Literal["masked", "kept positions"]
    max_error: float
    dtype: torch.dtype
    n_inputs: int


def verify(
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Verification:
    """Prove that a shrunk model is the masked model, on the example inputs and on random ones of their shapes.

    Both are computed in float64 in eval mode; float32 where an operator refuses float64. Nothing is changed.

    Args:
        model: the original model.
        small: the shrunk one.
        plan: the plan between them.
        args: example arguments.
        kwargs: example keyword arguments.
        seed: seed of the random inputs.

    Returns:
        The reference that was used and the largest relative difference, at most 1e-9 in float64.

    Raises:
        VerificationError: the outputs differ; names the first value in the graph that does.
    """
    example = ExampleInputs.of(args, kwargs)
    trials = [example, random_like(example, seed)]
    masked = _against_masked_module(model, small, plan, trials)
    if masked is not None:
        return masked
    groups = analysis_of(model, plan, args, kwargs)
    return _against_graph(model, small, Cut(groups, plan.kept), trials)


def _against_masked_module(
    model: nn.Module, small: nn.Module, plan: PruningPlan, trials: list[ExampleInputs]
) -> Verification | None:
    """Compare with the user's own module, parameters zeroed; None if they differ or float64 does not run."""
    try:
        reference, candidate = _masked_copy(model, plan), _eval_copy(small)
        errors = []
        for trial in map(to_float64, trials):
            expected, actual = _outputs(reference, trial), _outputs(candidate, trial)
            error = relative_error(expected, actual)
            if error > tolerance(expected):
                return None
            errors.append(error)
    except (RuntimeError, TypeError, NotImplementedError):  # an operator refuses float64, or shapes do not fit
        return None
    return Verification("masked", max(errors), torch.float64, len(trials))


def _masked_copy(model: nn.Module, plan: PruningPlan) -> nn.Module:
    masked = _eval_copy(model)
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, mask in plan.masks().items():
            if name in tensors:
                tensors[name].masked_fill_(~mask.to(tensors[name].device), 0)
    return masked


def _eval_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(torch.float64).eval()


def _outputs(model: nn.Module, inputs: ExampleInputs) -> list[Any]:
    inputs = inputs.map(lambda tensor: tensor.clone())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return pytree.tree_leaves(model(*inputs.args, **inputs.kwargs))


def _against_graph(model: nn.Module, small: nn.Module, cut: Cut, trials: list[ExampleInputs]) -> Verification:
    """Compare with the masked network computed node by node on kept positions."""
    dtype = _widest(small, trials)
    errors = []
    for trial in trials:
        inputs = to_float64(trial) if dtype is torch.float64 else trial
        expected = _masked_outputs(model, cut, inputs, dtype)
        actual = _outputs(_eval_copy(small) if dtype is torch.float64 else copy.deepcopy(small).eval(), inputs)
        error = relative_error(expected, actual)
        if error > tolerance(actual):
            raise VerificationError(_first_difference(model, cut, inputs, dtype, error))
        errors.append(error)
    return Verification("kept positions", max(errors), dtype, len(trials))


def _widest(small: nn.Module, trials: list[ExampleInputs]) -> torch.dtype:
    """float64 if the shrunk model runs in it, else the model's own dtype."""
    try:
        _outputs(_eval_copy(small), to_float64(trials[0]))
    except (RuntimeError, TypeError, NotImplementedError):
        return next((p.dtype for p in small.parameters() if p.is_floating_point()), torch.float32)
    return torch.float64


def _state(model: nn.Module, groups: ChannelGroups, dtype: torch.dtype) -> dict[str, Tensor]:
    """The original tensors by canonical name, floating ones in `dtype`."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: named.get(name, entry.tensor).detach() for name, entry in groups.graph.state.items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def _leaves(inputs: ExampleInputs) -> list[Any]:
    return pytree.tree_leaves((inputs.args, inputs.kwargs))


def _masked_outputs(model: nn.Module, cut: Cut, inputs: ExampleInputs, dtype: torch.dtype) -> list[Any]:
    graph = cut.groups.graph
    state = _state(model, cut.groups, dtype)
    output: Any = None
    with torch.no_grad():
        for _, value in masked_values(graph, cut, state, _leaves(inputs)):
            output = value
    return pytree.tree_leaves(output)


def _first_difference(model: nn.Module, cut: Cut, inputs: ExampleInputs, dtype: torch.dtype, error: float) -> str:
    """Run the masked and the rewritten graph side by side and name the first value that is not the same."""
    groups = cut.groups
    state = _state(model, groups, dtype)
    small_state = slice_state(cut, state)
    rewritten = rewrite_graph(groups.graph.fx_graph, groups.facts, cut)
    with torch.no_grad():
        left = masked_values(groups.graph, cut, state, _leaves(inputs))
        right = {
            node.name: (node, value)
            for node, value in _until_failure(graph_values(rewritten, small_state, _leaves(inputs)))
        }
        for node, value in left:
            kept = _kept_part(value, groups.facts.axes.get(node.name), cut)
            if node.name not in right:
                return f"the rewritten graph fails at {node.name!r}, {locate(node)}: its operator rule is wrong."
            if node.op == "call_function" and isinstance(kept, Tensor):
                difference = relative_error([kept], [right[node.name][1]])
                if difference > tolerance([kept]):
                    return (
                        f"the shrunk model differs from the masked model by {error:.2g} relative. The first value that "
                        f"differs is {node.name!r}, {locate(node)}, by {difference:.2g}. Expected at most "
                        f"{tolerance([kept]):.0e}: the rule of that operator does not describe this call."
                    )
    return (
        f"the shrunk model differs from the masked model by {error:.2g} relative, though its graph does not: the model "
        f"given is not what the plan makes of the original. Shrink the original with this plan again."
    )


def _until_failure(values: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    try:
        yield from values
    except (RuntimeError, TypeError, ValueError, IndexError):  # the node after the last one given is the one that fails
        return


def _kept_part(value: Any, axes: Any, cut: Cut) -> Any:
    if not isinstance(value, Tensor) or not isinstance(axes, tuple):
        return value
    for dim, axis in enumerate(axes):
        if cut.changes(axis):
            value = value.index_select(dim, torch.from_numpy(cut.keep(axis).nonzero()[0]).to(value.device))
    return value
