"""Constants of removed channels, folded into the biases of the layers that read them, and proved."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from torchshear._arguments import check_kind
from torchshear.dependency import Cut, PruningPlan
from torchshear.errors import VerificationError, WeightError
from torchshear.graph import ExampleInputs, PartRun, is_on_meta, output_leaves, run_exclusively, whole_model
from torchshear.speedup._result import Shrunk
from torchshear.speedup.comparing._random_inputs import random_like
from torchshear.speedup.comparing._relative_error import relative_error, tolerance
from torchshear.speedup.compensation._constants import ConstantNetwork, Decide, Look
from torchshear.speedup.compensation._fold_means import Means, find_places_of_means
from torchshear.speedup.compensation._fold_places import Places, find_places, kept_as_is
from torchshear.speedup.compensation._fold_record import Fold
from torchshear.speedup.rewriting._slicing import is_touched, slice_state, writes_to_operand
from torchshear.speedup.shrinking._whole_model import analysis_of
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
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    means: Means | None = None,
) -> Shrunk:
    """Fold the constants of removed channels into a shrunk model, and prove the result.

    A removed channel c is taken for the constant k_c that it holds when everything that multiplies is zero on it and
    everything that adds stays: k = act(beta) behind a norm with shift beta, act(b) behind a layer with bias b alone,
    sums of those where branches meet. A layer with weight W that reads it gets

        b_j <- b_j + sum_c sum_taps W[j, c, tap] k_c

    or, where it has no bias but a batch norm right behind it, that norm's running mean gets less by the same. It is
    done where the sum is the same for every sample and position, which is found by running the captured graph. It is
    not where padding with zeros cuts the sum off at borders, where a channel is no constant (behind a softmax, a gate
    that looks at data), or where there is nothing to fold into: no parameter is added.

    With `means`, k_c is what the layer reads of channel c on average over data: of all constants the one with the
    smallest squared error of what the layer gives, taken channel by channel.

    Args:
        model: the original model.
        shrunk: what the plan made of it; the model in it is changed, if the result is proved.
        plan: the plan between them.
        args: example arguments to trace with, if the plan does not describe them.
        kwargs: example keyword arguments, likewise.
        means: of what layers read of the original model, from `torchshear.pruners.channel_means`; None: constants that
            channels hold without any input.

    Returns:
        The same with `fold`, which says what was folded and what was not.

    Raises:
        VerificationError: the folded model is not the original with constants on the removed channels.
        WeightError: the model is on the meta device.

    Reference: Ye et al., ICLR 2018, arXiv:1802.00124, section 3, there for channels whose scale is zero.
    """
    check_kind("shrunk", shrunk, Shrunk, "what shrink_to_form gave")
    if means is not None:
        check_kind("means", means, Mapping, "what torchshear.pruners.channel_means gave")
    groups = analysis_of(model, plan, args, kwargs)
    if is_on_meta(model):
        raise WeightError("the model is on the meta device: without values there are no constants to fold.")
    graph, cut, small = groups.graph, Cut(groups, plan.kept), shrunk.model
    if graph.parts is not None:
        model, small = (PartRun(whole_model(one), graph.parts) for one in (model, small))
    trials = [graph.inputs, random_like(graph.inputs, 0), random_like(graph.inputs, 1)]
    dtype = _widest(small, trials[0])
    trials = [copy_inputs(trial, dtype) for trial in trials]
    network = ConstantNetwork(graph, cut, _in_dtype(StateCut(groups, cut).state_of(model), dtype))
    try:
        with equal_conditions(dtype):
            inputs = [flat_inputs(trial.copy()) for trial in trials[:2]]
            places = find_places(network, inputs) if means is None else find_places_of_means(network, inputs, means)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise VerificationError(
            f"constants of removed channels cannot be followed through the graph: {error}. Shrink with fold_bias=False."
        ) from error
    exact = slice_state(cut, {name: network.state[name] + added for name, added in places.changes.items()})
    worst = _proved(small, plan, network, places, exact, trials, dtype)
    _put(shrunk.model, exact)
    kind: Literal["constants", "means"] = "constants" if means is None else "means"
    return replace(shrunk, fold=Fold(kind, tuple(places.folded), tuple(places.skipped), worst, dtype))


def _in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def _widest(small: nn.Module, example: ExampleInputs) -> torch.dtype:
    """float64 if the shrunk model runs in it, else the model's own dtype."""
    try:
        run_module(copy_without_caches(small, example, torch.float64), example, torch.float64)
    except (RuntimeError, TypeError, NotImplementedError):
        return dtype_of(small)
    return torch.float64


def _proved(
    small: nn.Module,
    plan: PruningPlan,
    network: ConstantNetwork,
    places: Places,
    exact: Mapping[str, Tensor],
    trials: Sequence[ExampleInputs],
    dtype: torch.dtype,
) -> float:
    """Largest difference of the folded model from the network with constants.

    The folded values are taken before they are rounded to the dtype of the model.

    Raises:
        VerificationError: it is too large.
    """
    candidate = copy_without_caches(small, trials[0], dtype)
    _put(whole_model(candidate), exact)
    worst = 0.0
    for trial in trials:
        with equal_conditions(dtype):
            (value,) = network.walk([flat_inputs(trial.copy())], _as_found(network, places))
        expected = slice_outputs(plan, output_leaves(value))
        actual = run_module(candidate, trial, dtype).outputs
        error = relative_error(expected, actual)
        if error > tolerance(actual):
            raise VerificationError(
                f"with the constants of removed channels folded into {', '.join(sorted(exact)) or 'nothing'}, the "
                f"shrunk model differs by {error:.2g} relative from the original with those constants; expected at "
                f"most {tolerance(actual):.0e}. Shrink with fold_bias=False."
            )
        worst = max(worst, error)
    return worst


def _as_found(network: ConstantNetwork, places: Places) -> Decide:
    """Values of a call, behind the barrier that a search put before it."""

    def decide(node: fx.Node, looks: Sequence[Look]) -> list[Any]:
        touched = is_touched(node, network.cut.groups.facts, network.cut)
        barrier = places.barriers.get(node.name, places.others) if touched else None
        if barrier is None or not writes_to_operand(node):
            return [network.call(node, network.behind(barrier, look)) for look in looks]
        values = [network.call(node, network.behind(barrier, kept_as_is(node, look))) for look in looks]
        through = [network.call(node, look) for look in looks]  # who looks at the same memory must see it
        return [one.copy_(value) for one, value in zip(through, values, strict=True)]

    return decide


def _put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into the tensors of a model, in their own dtype."""
    named: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(value)
