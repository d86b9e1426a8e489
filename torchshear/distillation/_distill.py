"""A short distillation of a shrunk model: it learns from the original's layers and outputs, without labels."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear._arguments import check_count, check_kind, quote
from torchshear.calibration import Progress
from torchshear.calibration._batches import Batch, CallForm, read_batches
from torchshear.calibration._progress import check_progress, with_progress
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.distillation._checkpoint import RunCheckpoint
from torchshear.distillation._losses import LayerPairs, output_loss
from torchshear.errors import ArgumentError, DataError, WeightError, first_line
from torchshear.graph.model._checks import check_module, signature_of
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import outside_inference_mode
from torchshear.graph.model._state import in_mode
from torchshear.options import checked_call

_WARM_UP: Final = 0.05  # share of the steps in which the learning rate rises
_MOST: Final = 1e9  # of any number
_SAVES: Final = 20  # times that a checkpoint is written


@dataclass(frozen=True, slots=True, eq=False)
class Distilled:
    """A distilled model and how near it came to the original.

    Attributes:
        model: a copy of the shrunk model with other weights; with its own where those were worse.
        error_before: squared error of its outputs on the first batch, which is held out, relative to their variance in
            the original.
        error_after: the same after the last step.
        n_steps: steps that were made, those before a resumption among them.
        is_kept: False where the error did not fall, and the model stayed as it was.
    """

    model: nn.Module
    error_before: float
    error_after: float
    n_steps: int
    is_kept: bool

    def __repr__(self) -> str:
        kept = "" if self.is_kept else ", not kept"
        return f"<Distilled: error {self.error_before:.3g} -> {self.error_after:.3g} in {self.n_steps} steps{kept}>"


@checked_call
@outside_inference_mode()
def distill(  # noqa: PLR0913 - independent options, given by name
    small: nn.Module,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    steps: int = 500,
    plan: PruningPlan | None = None,
    learning_rate: float = 3e-4,
    weight_decay: float = 0.0,
    temperature: float = 2.0,
    layer_weight: float = 1.0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress = True,
) -> Distilled:
    """Train a shrunk model for some minutes to give what its original gives, layer by layer and in the end.

    A short, plain loop: AdamW with a cosine schedule, bfloat16 on a GPU that has it. The loss of a step is

        T^2 KL(softmax(y / T), softmax(y' / T))  +  w mean over layers of  ||h - h'||^2 / var(h)

    where y and h are outputs and layers of the original; outputs that are no logits count by their squared error over
    their variance. Both models run in eval mode: batch norms keep their statistics, and nothing is dropped. The first
    batch is held out; it tells whether the result is nearer to the original. For anything longer use a trainer of your
    own: the result is a plain module.

    Args:
        small: the shrunk model, best after `compensate`; it is left as it is.
        model: the original, on the same device; it is left as it is.
        loader: gives batches, as for `torchshear.collect`; targets are ignored. It is run through again as often as
            needed, its first batch apart.
        steps: how many batches to learn from.
        plan: the plan between the models. With it, layers that lost outputs are compared at those that are left;
            without, only layers that lost none.
        learning_rate: the largest learning rate.
        weight_decay: weight decay of AdamW.
        temperature: T.
        layer_weight: w; 0 for outputs alone.
        checkpoint: a file in safetensors that is written now and then. A call with the same settings goes on from it,
            after as many batches as it has seen.
        progress: see `torchshear.collect`.

    Returns:
        The model and its errors before and after.

    Raises:
        ArgumentError: a number is outside what is accepted; the models are on several devices; no weight takes
            gradients; the checkpoint is of another run.
        CheckpointError: the checkpoint cannot be read.
        DataError: the loader has less than two batches, ends for good, or gives what does not fit; or the loss becomes
            NaN.
        WeightError: a model is on the meta device, or in half precision.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> small = torchshear.prune(model, torch.randn(1, 4), ratio=0.5).model
        >>> data = [torch.randn(64, 4) for _ in range(4)]
        >>> torchshear.distill(small, model, data, steps=20, progress=False).n_steps
        20

    Reference: Hinton et al., arXiv:1503.02531; layers as in Jiao et al., EMNLP 2020, arXiv:1909.10351.
    """
    _check_numbers(steps, learning_rate, weight_decay, temperature, layer_weight)
    check_progress(progress)
    if plan is not None:
        check_kind("plan", plan, PruningPlan, "the plan between the models")
    device = _check_models(small, model)
    pupil = copy_model(small)
    weights = {name: weight for name, weight in pupil.named_parameters() if weight.requires_grad}
    if not weights:
        raise ArgumentError(
            "no weight of the shrunk model takes gradients; set requires_grad of those that shall learn."
        )
    optimizer = torch.optim.AdamW(weights.values(), lr=learning_rate, weight_decay=weight_decay)
    settings = {"steps": steps, "learning_rate": learning_rate, "weight_decay": weight_decay}
    settings |= {"temperature": temperature, "layer_weight": layer_weight}
    state = RunCheckpoint(checkpoint, weights, optimizer, settings)
    layers = LayerPairs(pupil, model, plan) if layer_weight else None
    form = CallForm(signature_of(model))
    batches = _endless(loader, form, device)
    is_mixed = device.type == "cuda" and torch.cuda.is_bf16_supported()
    modes = [(module, module.training) for module in pupil.modules()]
    pupil.eval()
    held_out = next(batches)
    with torch.no_grad():
        before = _relative_error(*_both(pupil, model, held_out))
    done = state.load()
    work = with_progress(islice(batches, done, steps), steps - done, "distilling", progress)
    for step, batch in enumerate(work, done + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
            loss = output_loss(*_both(pupil, model, batch, layers), temperature)
            if layers is not None:
                loss = loss + layer_weight * layers.loss()
        if not math.isfinite(float(loss.detach())):
            raise DataError(
                f"the loss is {float(loss.detach())} at step {step}; expected a finite number. Lower learning_rate="
                f"{learning_rate}, or check the data."
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % max(1, steps // _SAVES) == 0 or step == steps:
            state.save(step)
    with torch.no_grad():
        after = _relative_error(*_both(pupil, model, held_out))
    for module, is_training in modes:
        module.training = is_training
    is_kept = after <= before
    return Distilled(pupil if is_kept else copy_model(small), before, after, steps, is_kept)


def _schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a rise, and then half a cosine."""
    rise = max(1, round(_WARM_UP * steps))
    return step / rise if step <= rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def _check_numbers(steps: int, rate: float, decay: float, temperature: float, layer_weight: float) -> None:
    check_count("steps", steps)
    for name, value, is_zero_allowed in (
        ("learning_rate", rate, False),
        ("weight_decay", decay, True),
        ("temperature", temperature, False),
        ("layer_weight", layer_weight, True),
    ):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= _MOST or (value == 0 and not is_zero_allowed):  # a NaN is not either
            least = "of at least" if is_zero_allowed else "above"
            raise ArgumentError(f"{name}={quote(value)}; expected a number {least} 0, and at most {_MOST:g}.")


def _check_models(small: nn.Module, model: nn.Module) -> torch.device:
    """Return the device of both models."""
    devices = set()
    for name, one in (("small", small), ("model", model)):
        check_kind(name, one, nn.Module, "a module")
        check_module(one)
        if any(isinstance(module, torch.jit.ScriptModule) for module in one.modules()):
            raise ArgumentError(f"{name} holds compiled TorchScript; give the module that was scripted.")
        for key, tensor in (*one.named_parameters(), *one.named_buffers()):
            if tensor.is_meta:
                raise WeightError(f"{key!r} of {name} is on the meta device and has no values; load the weights first.")
            if tensor.dtype in (torch.float16, torch.bfloat16) and one is small:
                raise WeightError(
                    f"{key!r} is {tensor.dtype}, in which small steps are lost; distill small.float(), and convert it "
                    f"afterwards."
                )
            devices.add(tensor.device)
    if len(devices) > 1:
        raise ArgumentError(f"the models are on {', '.join(sorted(map(str, devices)))}; expected one device.")
    return devices.pop() if devices else torch.device("cpu")


def _endless(loader: Iterable[Any], form: CallForm, device: torch.device) -> Iterator[Batch]:
    """Give the first batch of a loader, and then all others, over and over.

    Raises:
        DataError: the loader has less than two batches, or cannot be run through again.
    """
    try:
        iter(loader)
    except (TypeError, NotImplementedError) as error:
        raise DataError(f"the loader is {type(loader).__name__}; expected something that gives batches.") from error
    n_seen = 0
    while True:
        n_before = n_seen
        for number, given in enumerate(loader):
            if number or not n_seen:
                n_seen += 1
                yield from read_batches([given], 1, form, device)
        if n_seen - n_before < (2 if n_before == 0 else 1):
            raise DataError(
                f"the loader gave {n_seen} batches and then no more; expected at least two, of which the first is held "
                f"out, and a loader that can be run through again (a list or a DataLoader, no iterator)."
            )


def _both(
    pupil: nn.Module, model: nn.Module, batch: Batch, layers: LayerPairs | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the floating outputs of both models, those of the shrunk one with gradients if they are taken.

    Args:
        pupil: the shrunk model, in eval mode.
        model: the original, which is left as it is.
        batch: the batch.
        layers: keeps what layers give, or None.

    Raises:
        DataError: a model does not run on the batch, or the outputs do not go together.
    """
    with torch.no_grad(), in_mode(model, "eval"), layers.watch("model") if layers else nullcontext():
        wanted = _outputs(model, batch)
    with layers.watch("pupil") if layers else nullcontext():
        given = _outputs(pupil, batch)
    if not wanted or [y.shape for y in wanted] != [x.shape for x in given]:
        shapes = [[tuple(one.shape) for one in outputs] for outputs in (wanted, given)]
        raise DataError(f"the original gives {shapes[0]} and the shrunk model {shapes[1]}; expected the same outputs.")
    return given, wanted


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return the floating outputs of a model."""
    try:
        output = model(*batch.args, **batch.kwargs)
    except Exception as error:  # a model's own code may fail in any way on data that does not fit
        raise DataError(
            f"{type(model).__name__} does not run on a batch: {type(error).__name__}: {first_line(error)}. Expected "
            f"a loader of what its forward takes."
        ) from error
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _relative_error(given: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the squared error of outputs, relative to their variance over the batch."""
    pairs = [(x.double(), y.double()) for x, y in zip(given, wanted, strict=True)]
    error = sum(float((x - y).square().sum()) for x, y in pairs)
    variance = sum(float((y - y.mean(0)).square().sum()) for _, y in pairs)
    return error / variance if variance else error
