"""Compensation of a cut: a shrunk model comes nearer to its original, by any of the methods."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import Tensor, nn

from torchshear._arguments import check_kind, check_one_of
from torchshear.calibration import Progress
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError
from torchshear.graph import ExampleInputs
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import outside_inference_mode
from torchshear.options import CalibrationOptions, Compensation, CompensationMethod, checked_call
from torchshear.pruners import channel_means
from torchshear.speedup import Fold, Refit, refit
from torchshear.speedup.compensation._fold import fold_in_place
from torchshear.speedup.compensation._frontier import DEFAULT_MEMORY
from torchshear.speedup.compensation._recalibrate import check_recalibration, recalibrate_for
from torchshear.speedup.shrinking._prepared_cut import analyze_planned


@checked_call
def compensate(  # noqa: PLR0913 - independent options, given by name
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    loader: Iterable[Any] | None = None,
    method: CompensationMethod = "refit",
    *,
    args: tuple[Any, ...] | Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    batches: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Progress = True,
) -> nn.Module:
    """Bring a shrunk model nearer to its original without training and without labels.

    Args:
        model: the original; it is left as it is.
        small: the model that the plan made of it; it is left as it is.
        plan: the plan between them.
        loader: gives batches of inputs, as for `torchshear.collect`; targets are ignored. None for "constants".
        method: "refit" fits every layer in closed form to give what it gave before, see `torchshear.speedup.refit`;
            "statistics" gives batch norms new statistics, see `torchshear.recalibrate`; "means" and "constants" fold
            what removed channels held, on average or without input, into biases, see
            `torchshear.speedup.fold_constants`.
        args: example arguments to trace with, if the plan does not describe them.
        kwargs: example keyword arguments, likewise.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        memory: bytes that activations may take in memory, for "refit"; see `torchshear.speedup.refit`.
        progress: see `torchshear.collect`.

    Returns:
        A copy of `small` with other weights or statistics.

    Raises:
        ArgumentError: the method is unknown; data is missing, or is given to a method that uses none; or as the
            functions named above.
        DataError: the data does not fit the model, or is too little.
        PlanError: the plan is for another model.
        VerificationError: the result does not compute what was fitted or folded; nothing is returned then.
        WeightError: a model is on the meta device.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> result = torchshear.prune(model, torch.randn(1, 4), ratio=0.5)
        >>> data = [torch.randn(64, 4) for _ in range(4)]
        >>> small = torchshear.compensate(model, result.model, result.plan, data, batches=4, progress=False)
        >>> small[0].out_features
        4
    """
    check_one_of("method", method, get_args(CompensationMethod))
    check_kind("small", small, nn.Module, "the shrunk model")
    if (loader is None) != (method == "constants"):
        raise ArgumentError(
            f"method={method!r} {'runs data; give batches as loader' if loader is None else 'runs no data'}=; leave "
            f"loader= away for 'constants' alone."
        )
    data = CalibrationOptions(loader, batches=batches, memory=memory)
    return compensate_by(method, model, small, plan, replace(data, progress=progress), args, kwargs).model


@dataclass(frozen=True, slots=True, eq=False)
class Compensated:
    """A shrunk model after its compensation, with the record of a fold or a refit."""

    model: nn.Module
    fold: Fold | None = None
    refit: Refit | None = None


@outside_inference_mode()
def compensate_by(
    method: Compensation,
    model: nn.Module,
    small: nn.Module,
    plan: PruningPlan,
    data: CalibrationOptions,
    args: tuple[Any, ...] | Tensor | None,
    kwargs: Mapping[str, Any] | None,
) -> Compensated:
    """Compensate by a method, see `compensate`; for "none" the shrunk model comes back as it is.

    Raises:
        TorchshearError: as `compensate`.
    """
    loader, batches, memory = () if data.loader is None else data.loader, data.batches, data.memory
    progress = data.progress
    if method == "none":
        return Compensated(small)
    if method == "refit":
        fitted, record = refit(
            model, small, plan, loader, args=args, kwargs=kwargs, batches=batches, memory=memory, progress=progress
        )
        return Compensated(fitted, refit=record)
    if method == "statistics":
        example = None if args is None and kwargs is None else ExampleInputs.of(() if args is None else args, kwargs)
        return Compensated(recalibrate_for(example, small, loader, batches, progress))
    means = None
    if method == "means":
        means = channel_means(analyze_planned(model, plan, args, kwargs), loader, batches, progress)
    copy = copy_model(small)
    return Compensated(copy, fold_in_place(model, copy, plan, args, kwargs, means))


def check_compensation(method: Compensation, model: nn.Module, batches: int | None) -> None:
    """Raise what a method raises of a model before it is traced: "statistics" needs batch norms that hold some."""
    if method == "statistics":
        check_recalibration(model, batches)
