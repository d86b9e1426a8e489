"""The public proof: outputs and gradients of a shrunk model against those of the masked model, in both modes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count, check_kind
from torchshear.calibration._batches import CallForm, check_batches, read_batches
from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError, DataError, VerificationError
from torchshear.graph import ExampleInputs
from torchshear.graph._graph import PartRun, whole_model
from torchshear.graph._run import run_failure
from torchshear.graph.model._checks import signature_of
from torchshear.graph.model._process import run_exclusively
from torchshear.graph.model._state import Mode
from torchshear.speedup.shrinking._prepared_cut import analyze_planned, planned_run
from torchshear.speedup.shrinking._whole_model import TrainingCut
from torchshear.speedup.verification._model_pair import ModelPair
from torchshear.speedup.verification._proof import Proof


@dataclass(frozen=True, slots=True)
class Verification:
    """Comparisons that were made, and how closely both models agreed.

    Attributes:
        reference: "masked" for the original module with the cut parameters set to zero; "kept positions" where an
            operator computes over an axis that is cut (norms, softmax, means), for the original graph with masked
            parameters in which those operators, and no others, see the kept positions only.
        max_error: largest difference of any element of an output, relative to that element and to the ordinary values
            of its output.
        dtype: dtype in which both were computed.
        n_inputs: number of inputs compared: the example, random ones, and random ones with random weights.
        operators: the calls that were compared on kept positions only, with module and source line.
        modes: the modes in which outputs and gradients were compared.
        max_gradient_error: largest difference of a gradient of a parameter, likewise; None where none was compared.
        left_out: what could not be compared, and why.
    """

    reference: Literal["masked", "kept positions"]
    max_error: float
    dtype: torch.dtype
    n_inputs: int
    operators: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ("eval",)
    max_gradient_error: float | None = None
    left_out: tuple[str, ...] = ()


@run_exclusively()
def verify(
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    data: Iterable[Any] | None = None,
    batches: int | None = None,
) -> Verification:
    """Prove that a shrunk model computes what the masked model computes.

    Both run on the example inputs and on random ones of the same shapes, in float64, or in their own dtype where an
    operator refuses that. Compared are outputs in eval and in train mode, with equal random numbers, and gradients of
    all parameters; outputs that shrink at the positions that they keep. Both models are left as they were.

    Of a plan for parts of a model, each call of each part is compared, as the original makes it in a run on the example
    inputs, or as it was captured if none are given; then the shrunk model is run whole.

    Args:
        model: the original model.
        small: the shrunk one.
        plan: the plan between them.
        args: example positional arguments, a tensor for one; without any, those of the plan.
        kwargs: example keyword arguments.
        seed: seed of the random inputs and weights.
        data: a loader whose batches are compared as well, with the model's own weights. They have the forms that
            `torchshear.collect` takes, and hold the arguments of the example. Where an operator computes over an axis
            that is cut, they have the shapes of the example but for the number of samples.
        batches: number of batches of the data to compare; None: the first 8, or all where there are fewer.

    Returns:
        The reference that was used and the largest relative difference, at most 1e-9 in float64.

    Raises:
        ArgumentError: the example inputs are empty or without values, or data is given for parts of a model.
        DataError: the loader gives fewer batches, or a batch does not fit the model.
        VerificationError: outputs or gradients differ; the message names the first value in the graph that does. Or a
            model with smaller parts does not run whole.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, torch.randn(1, 4))), ratio=0.5)
        >>> torchshear.verify(model, torchshear.shrink(model, plan), plan).max_error < 1e-9
        True
    """
    check_kind("small", small, nn.Module, "the shrunk model")
    check_count("seed", seed, least=0)
    check_batches(batches)
    seed, example = int(seed), ExampleInputs.of(args, kwargs)
    given = example if example.args or example.kwargs else None
    groups = analyze_planned(model, plan, *((given.args, given.kwargs) if given is not None else (None, None)))
    if data is None:
        return verify_analyzed(model, small, plan, groups, given, seed=seed)
    if groups.graph.parts is not None:
        raise ArgumentError("data is given for a plan of parts, whose inputs it does not hold; leave data out.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    form = CallForm(signature_of(model), given or groups.graph.inputs)
    extra: list[ExampleInputs] = []
    for number, batch in enumerate(read_batches(data, batches, form, device, most=8)):
        extra.append(ExampleInputs(batch.args, batch.kwargs))
        failure = run_failure(model, extra[-1], "eval")
        if failure is not None:
            raise DataError(f"the model does not run on batch {number} of data: {failure}")
    return verify_analyzed(model, small, plan, groups, given, seed=seed, extra=extra)


def verify_analyzed(
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    groups: ChannelGroups,
    given: ExampleInputs | None,
    *,
    seed: int = 0,
    extra: Sequence[ExampleInputs] = (),
    training: TrainingCut | None = None,
) -> Verification:
    """Prove a shrunk model as `verify` does, with an analysis that is at hand.

    Args:
        model: the original model.
        small: the shrunk one.
        plan: the plan between them.
        groups: the analyzed network.
        given: the example inputs; None for those of the plan.
        seed: seed of the random inputs and weights.
        extra: further inputs to compare outputs on.
        training: the original captured in train mode, if it has been.

    Raises:
        VerificationError: see `verify`.
    """
    example = given if given is not None else planned_run(model, plan, None, None)[1]
    parts = groups.graph.parts
    if parts is None:
        pair = ModelPair(model, small, plan, groups, example, seed, training)
    else:
        whole, smaller = (PartRun(whole_model(one), parts) for one in (model, small))
        pair = ModelPair(whole, smaller, plan, groups, groups.graph.inputs, seed)
    result = Proof(pair).run(extra)
    is_on_meta = any(tensor.is_meta for tensor in small.parameters())
    if parts is not None and given is not None and (given.args or given.kwargs) and not is_on_meta:
        failure = run_failure(small, given, "eval")
        if failure is not None:
            raise VerificationError(
                f"each part of {plan.model_type} equals the masked one, but the model no longer runs whole: {failure}. "
                f"Its code outside the parts depends on what is inside them; name smaller modules as parts."
            )
    return Verification(
        reference="kept positions" if result.excused else "masked",
        max_error=result.max_error,
        dtype=pair.dtype,
        n_inputs=3 + len(extra),
        operators=result.excused,
        modes=result.modes,
        max_gradient_error=result.max_gradient_error,
        left_out=tuple(pair.left_out),
    )
