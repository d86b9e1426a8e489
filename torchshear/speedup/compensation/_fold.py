"""Constants of removed channels, folded into the biases of the layers that read them, and proved."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from torchshear._arguments import check_kind
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import VerificationError, WeightError
from torchshear.graph import ExampleInputs
from torchshear.graph._graph import PartRun, whole_model
from torchshear.graph._outputs import output_leaves
from torchshear.graph.model._meta import is_on_meta
from torchshear.graph.model._process import run_exclusively
from torchshear.speedup._random_values import random_like
from torchshear.speedup._relative_error import relative_error, tolerance
from torchshear.speedup._shrink import Shrunk
from torchshear.speedup.compensation._constant_network import ConstantNetwork, ReadValue
from torchshear.speedup.compensation._fold_record import Fold
from torchshear.speedup.compensation._fold_search import (
    ConstantSearch,
    FoldDecisions,
    Means,
    MeanSearch,
    read_before_write,
)
from torchshear.speedup.rewriting._slicing import is_touched, slice_state, writes_to_operand
from torchshear.speedup.shrinking._prepared_cut import analyze_planned
from torchshear.speedup.verification._runs import (
    copy_inputs,
    copy_without_caches,
    dtype_of,
    equal_conditions,
    flat_inputs,
    run_module,
    slice_outputs,
)
from torchshear.speedup.verification._state_cut import StateCut


@run_exclusively()
def fold_constants(
    model: nn.Module,
    shrunk: Shrunk,
    plan: PruningPlan,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    means: Means | None = None,
) -> Shrunk:
    """Fold the constants of removed channels into a shrunk model, and prove the result.

    A removed channel c counts as the constant k_c that it holds when everything that multiplies is zero on it and
    everything that adds stays: k = act(beta) behind a norm with shift beta, act(b) behind a layer with bias b alone,
    sums of those where branches meet. A layer with weight W that reads it gets

        b_j <- b_j + sum_c sum_taps W[j, c, tap] k_c

    If it has no bias but a batch norm right behind it, that sum is taken from the norm's running mean instead. A layer
    is left alone if the sum is not the same for every sample and position, which a run of the captured graph shows: if
    padding with zeros cuts it off at borders, or a channel is no constant (behind a softmax, or a gate that depends on
    data). It is also left alone if it has nothing to fold into: no parameter is added.

    With `means`, k_c is the mean over data of what the layer reads of channel c: the constant with the smallest squared
    error of the layer's output, taken channel by channel.

    Args:
        model: the original model.
        shrunk: what the plan made of it; the model in it is changed, if the result is proved.
        plan: the plan between them.
        args: example positional arguments to trace with, a tensor for one, if the plan does not describe them.
        kwargs: example keyword arguments, likewise.
        means: means of what layers of the original model read, from `torchshear.pruners.channel_means`; None for the
            constants that channels hold without any input.

    Returns:
        The same with `fold`, which lists what was folded and what was not.

    Raises:
        VerificationError: the folded model is not the original with constants on the removed channels.
        WeightError: the model is on the meta device.

    Reference: Ye et al., ICLR 2018, arXiv:1802.00124, section 3, there for channels whose scale is zero.
    """
    check_kind("shrunk", shrunk, Shrunk, "what shrink_to_form gave")
    if means is not None:
        check_kind("means", means, Mapping, "what torchshear.pruners.channel_means gave")
    return replace(shrunk, fold=fold_in_place(model, shrunk.model, plan, args, kwargs, means))


def fold_in_place(
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    means: Means | None = None,
) -> Fold:
    """Fold constants, or means, into a shrunk model, which is changed if the result is proved; see `fold_constants`.

    Raises:
        VerificationError: the folded model is not the original with constants on the removed channels.
        WeightError: the model is on the meta device.
    """
    groups = analyze_planned(model, plan, args, kwargs)
    if is_on_meta(model):
        raise WeightError("the model is on the meta device: without values there are no constants to fold.")
    graph, cut, changed = groups.graph, Cut(groups, plan.kept), small
    if graph.parts is not None:
        model, small = (PartRun(whole_model(one), graph.parts) for one in (model, small))
    inputs = [graph.inputs, random_like(graph.inputs, 0), random_like(graph.inputs, 1)]
    dtype = torch.float64
    try:
        run_module(copy_without_caches(small, inputs[0], dtype), inputs[0], dtype)
    except (RuntimeError, TypeError, NotImplementedError):
        dtype = dtype_of(small)
    inputs = [copy_inputs(one, dtype) for one in inputs]
    state = StateCut(groups, cut).state_of(model)
    wide = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    network = ConstantNetwork(graph, cut, wide)
    search = ConstantSearch(network) if means is None else MeanSearch(network, means)
    try:
        with equal_conditions(dtype):
            decisions = search.run([flat_inputs(one.copy()) for one in inputs[:2]])
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise VerificationError(
            f"constants of removed channels cannot be followed through the graph: {error}. Shrink without folding."
        ) from error
    folded = slice_state(cut, {name: network.state[name] + added for name, added in decisions.changes.items()})
    max_error = _prove_fold(small, plan, network, decisions, folded, inputs, dtype)
    _write_values(changed, folded)
    kind: Literal["constants", "means"] = "constants" if means is None else "means"
    return Fold(kind, tuple(decisions.folded), tuple(decisions.skipped), max_error, dtype)


def _prove_fold(
    small: nn.Module,
    plan: PruningPlan,
    network: ConstantNetwork,
    decisions: FoldDecisions,
    folded: Mapping[str, Tensor],
    inputs: Sequence[ExampleInputs],
    dtype: torch.dtype,
) -> float:
    """Compare the folded model with the network with constants, and return the largest difference.

    The folded values are taken before they are rounded to the dtype of the model.

    Raises:
        VerificationError: the difference is too large.
    """

    def compute(node: fx.Node, reads: Sequence[ReadValue]) -> list[Any]:
        """Compute a call behind the barrier that the search put before it."""
        touched = is_touched(node, network.facts, network.cut)
        barrier = decisions.barriers.get(node.name, decisions.default_barrier) if touched else None
        if barrier is None or not writes_to_operand(node):
            return [network.call(node, network.read_through(barrier, read)) for read in reads]
        values = [network.call(node, network.read_through(barrier, read_before_write(node, read))) for read in reads]
        through = [network.call(node, read) for read in reads]  # views of the same memory must hold the new values
        return [one.copy_(value) for one, value in zip(through, values, strict=True)]

    candidate = copy_without_caches(small, inputs[0], dtype)
    _write_values(whole_model(candidate), folded)
    worst = 0.0
    for one in inputs:
        with equal_conditions(dtype):
            (value,) = network.run([flat_inputs(one.copy())], compute)
        expected = slice_outputs(plan, output_leaves(value))
        actual = run_module(candidate, one, dtype).outputs
        error = relative_error(expected, actual)
        if error > tolerance(actual):
            raise VerificationError(
                f"with the constants of removed channels folded into {', '.join(sorted(folded)) or 'nothing'}, the "
                f"shrunk model differs by {error:.2g} relative from the original with those constants; expected at "
                f"most {tolerance(actual):.0e}. Shrink without folding."
            )
        worst = max(worst, error)
    return worst


def _write_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into the tensors of a model, in their own dtype."""
    named: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(value)
