"""Proof by comparison: the shrunk model computes what the masked model computes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear.dependency import ChannelGroups, Cut, PruningPlan
from torchshear.errors import VerificationError, WeightError
from torchshear.graph import (
    ExampleInputs,
    Graph,
    PartRun,
    caches_of,
    copy_model,
    failure_of,
    forget,
    locate,
    output_leaves,
    whole_of,
)
from torchshear.graph._parts import parts_of
from torchshear.graph._precision import computing_in, to_float64
from torchshear.graph._run import graph_output, graph_values
from torchshear.speedup._compare import random_like, relative_error, tolerance
from torchshear.speedup._reference import gather, masked_values, mixes
from torchshear.speedup._rewrite import rewrite_graph
from torchshear.speedup._shrink import analysis_of, recorded_run
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

    Of a plan for parts, each call of each part is compared: those that the original makes of them in a run on the
    example inputs, or the captured ones if none are given; then the shrunk model is run whole.

    Both are computed in float64 in eval mode; float32 where an operator refuses float64. Outputs that shrink are
    compared at the positions that they keep. Nothing is changed.

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
        VerificationError: the outputs differ; names the first value in the graph that does. Or a model with smaller
            parts does not run whole.
    """
    example = ExampleInputs.of(args, kwargs)
    if plan.parts is None:
        return _verify(model, small, plan, example, seed)
    run, recorded = recorded_run(model, plan, args or None, kwargs or None)
    parts = parts_of(run)
    assert parts is not None
    result = _verify(run, PartRun(small, parts), plan, recorded, seed)
    _check_whole(small, plan, example)
    return result


def _verify(model: nn.Module, small: nn.Module, plan: PruningPlan, example: ExampleInputs, seed: int) -> Verification:
    trials = [example, random_like(example, seed)]
    masked = _against_masked_module(model, small, plan, trials)
    if masked.is_equal:
        return Verification("masked", masked.error, masked.dtype, len(trials))
    groups = analysis_of(model, plan, *((example.args, example.kwargs) if plan.parts is None else (None, None)))
    cut = Cut(groups, plan.kept)
    if groups.graph.parts is not None:  # a graph of parts takes the calls that it was captured with, and no others
        model, small = (PartRun(whole_of(one), groups.graph.parts) for one in (model, small))
        trials = [groups.graph.inputs, random_like(groups.graph.inputs, seed)]
    if masked.is_sound and not mixes(cut):
        raise VerificationError(_first_difference(model, cut, trials[0], masked.dtype, masked.error))
    _check_graph(model, groups.graph, trials)
    return _against_graph(model, small, plan, cut, trials)


def _check_whole(small: nn.Module, plan: PruningPlan, example: ExampleInputs) -> None:
    """See that a model runs whole with its smaller parts, where its example inputs are known.

    Raises:
        VerificationError: it does not.
    """
    if not (example.args or example.kwargs) or any(tensor.is_meta for tensor in small.parameters()):
        return
    failure = failure_of(small, example, "eval")
    if failure is not None:
        raise VerificationError(
            f"each part of {plan.model_type} equals the masked one, but the model no longer runs whole: {failure}. Its "
            f"code outside the parts depends on what is inside them; name smaller modules as parts."
        )


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Outcome of comparing with the masked module: `is_sound` if it ran and the reference is finite."""

    error: float
    limit: float
    dtype: torch.dtype
    is_sound: bool

    @property
    def is_equal(self) -> bool:
        return self.is_sound and self.error <= self.limit


def _against_masked_module(
    model: nn.Module, small: nn.Module, plan: PruningPlan, trials: list[ExampleInputs]
) -> _Comparison:
    """Compare with the user's own module, parameters zeroed; in float64, or in its own dtype if that does not run."""
    own = own_dtype(small)
    result = _Comparison(float("inf"), 0.0, torch.float64, False)
    for dtype in dict.fromkeys((torch.float64, own)):
        try:
            reference, candidate = _masked_copy(model, plan, trials[0], dtype), eval_copy(small, trials[0], dtype)
            error, limit, finite = 0.0, 0.0, True
            for trial in trials:
                inputs = to_float64(trial) if dtype is torch.float64 else trial
                expected = kept_outputs(plan, outputs_of(reference, inputs, dtype))
                actual = outputs_of(candidate, inputs, dtype)
                finite = finite and _is_finite(expected)
                error, limit = max(error, relative_error(expected, actual)), tolerance(expected)
            result = _Comparison(error, limit, dtype, finite)
            break
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            continue  # an operator refuses this dtype, or shapes do not fit: the graphs will tell
    return result


def _is_finite(outputs: list[Any]) -> bool:
    """Whether there are no NaN; those come of parameters that are zero, as in 0 / 0."""
    return not any(isinstance(v, Tensor) and v.is_floating_point() and bool(v.isnan().any()) for v in outputs)


def own_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating parameter; float32 if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _check_graph(model: nn.Module, graph: Graph, trials: list[ExampleInputs]) -> None:
    """The captured graph may stand for the model only if it computes, uncut, what the model does.

    Raises:
        VerificationError: it does not.
        WeightError: nor could it, since its weights are NaN or infinite.
    """
    own = own_dtype(model)
    state = {name: entry.tensor.detach() for name, entry in graph.state.items()}
    state |= {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()] if name in state}
    reference = eval_copy(model, trials[0], own)
    for trial in trials:
        with torch.no_grad(), computing_in(own):
            output = graph_output(graph.fx_graph, state, leaves_of(trial.copy()))
        expected = outputs_of(reference, trial, own)
        error = relative_error(expected, output_leaves(output))
        if error > tolerance(expected):
            _check_state({name: t for name, t in state.items() if graph.state[name].kind == "parameter"})
            raise VerificationError(
                f"the captured graph is not the model: on the example inputs they differ by {error:.2g} relative. Its "
                f"forward depends on what a graph cannot hold, such as randomness or the batch size in Python."
            )


def _check_state(state: Mapping[str, Tensor]) -> None:
    """Raise WeightError if numbers of the model are NaN or infinite, which are equal to nothing."""
    for name, tensor in state.items():
        n_bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if n_bad:
            raise WeightError(f"{name!r} is NaN or infinite in {n_bad} places; load the trained weights.")


def _masked_copy(model: nn.Module, plan: PruningPlan, example: ExampleInputs, dtype: torch.dtype) -> nn.Module:
    masked = eval_copy(model, example, dtype)
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, mask in plan.masks().items():
            if name in tensors:
                tensors[name].masked_fill_(~mask.to(tensors[name].device), 0)
    return masked


def eval_copy(model: nn.Module, example: ExampleInputs, dtype: torch.dtype) -> nn.Module:
    """A copy in eval mode, without what its modules keep of parameters that may be about to change."""
    twin = copy_model(model)
    forget(twin, caches_of(model, example))
    for module in twin.modules():
        module.training = False
    return twin.to(dtype) if dtype is torch.float64 else twin


def outputs_of(model: nn.Module, inputs: ExampleInputs, dtype: torch.dtype) -> list[Any]:
    """Flat outputs of a model that computes in a dtype; the inputs and the random state are left as they are."""
    inputs = inputs.copy()
    with torch.no_grad(), computing_in(dtype), torch.random.fork_rng(devices=[]):
        return output_leaves(model(*inputs.args, **inputs.kwargs))


def kept_outputs(plan: PruningPlan, leaves: list[Any]) -> list[Any]:
    """Outputs of the original, those that shrink at their kept positions."""
    leaves = list(leaves)
    for output in plan.outputs:
        for dim, kept in output.kept.items():
            leaves[output.index] = leaves[output.index].index_select(
                dim, torch.from_numpy(kept.copy()).to(leaves[output.index].device)
            )
    return leaves


def _against_graph(
    model: nn.Module, small: nn.Module, plan: PruningPlan, cut: Cut, trials: list[ExampleInputs]
) -> Verification:
    """Compare with the masked network computed node by node on kept positions."""
    dtype = widest(small, trials)
    errors = []
    for trial in trials:
        inputs = to_float64(trial) if dtype is torch.float64 else trial
        try:
            expected = kept_outputs(plan, _masked_outputs(model, cut, inputs, dtype))
        except (IndexError, RuntimeError):  # an axis that holds the batch as well may need the captured one
            inputs = _at_capture(cut, inputs)
            expected = kept_outputs(plan, _masked_outputs(model, cut, inputs, dtype))
        actual = outputs_of(eval_copy(small, trial, dtype), inputs, dtype)
        error = relative_error(expected, actual)
        if error > tolerance(actual):
            raise VerificationError(_first_difference(model, cut, inputs, dtype, error))
        errors.append(error)
    return Verification("kept positions", max(errors), dtype, len(trials))


def _at_capture(cut: Cut, inputs: ExampleInputs) -> ExampleInputs:
    """The inputs with the batch that the graph was captured with."""
    hint = cut.groups.graph.batch_hint
    return inputs if hint is None else inputs.with_batch(hint)


def widest(small: nn.Module, trials: list[ExampleInputs]) -> torch.dtype:
    """float64 if the shrunk model runs in it, else the model's own dtype."""
    try:
        outputs_of(eval_copy(small, trials[0], torch.float64), to_float64(trials[0]), torch.float64)
    except (RuntimeError, TypeError, NotImplementedError):
        return own_dtype(small)
    return torch.float64


def state_in(model: nn.Module, groups: ChannelGroups, dtype: torch.dtype) -> dict[str, Tensor]:
    """The original tensors by canonical name, floating ones in `dtype`."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: named.get(name, entry.tensor).detach() for name, entry in groups.graph.state.items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def leaves_of(inputs: ExampleInputs) -> list[Any]:
    """Arguments and keyword arguments, flat, in the order of a captured graph."""
    return pytree.tree_leaves((inputs.args, inputs.kwargs))


def _masked_outputs(model: nn.Module, cut: Cut, inputs: ExampleInputs, dtype: torch.dtype) -> list[Any]:
    graph = cut.groups.graph
    state = state_in(model, cut.groups, dtype)
    output: Any = None
    with torch.no_grad(), computing_in(dtype):
        for _, value in masked_values(graph, cut, state, leaves_of(inputs)):
            output = value
    return output_leaves(output)


def _first_difference(model: nn.Module, cut: Cut, inputs: ExampleInputs, dtype: torch.dtype, error: float) -> str:
    """Run the masked and the rewritten graph side by side and name the first value that is not the same."""
    groups = cut.groups
    inputs = _at_capture(cut, to_float64(inputs) if dtype is torch.float64 else inputs)
    state = state_in(model, groups, dtype)
    small_state = slice_state(cut, state)
    rewritten = rewrite_graph(groups.graph.fx_graph, groups.facts, cut)
    with torch.no_grad(), computing_in(dtype):
        left = masked_values(groups.graph, cut, state, leaves_of(inputs))
        right = {
            node.name: (node, value)
            for node, value in _until_failure(graph_values(rewritten, small_state, leaves_of(inputs)))
        }
        for node, value in left:
            axes = groups.facts.axes.get(node.name)
            kept = gather(value, axes, cut) if isinstance(value, Tensor) and isinstance(axes, tuple) else value
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
