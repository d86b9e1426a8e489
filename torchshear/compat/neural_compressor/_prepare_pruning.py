"""Neural Compressor's `prepare_pruning`: pruning without hooks in the loop, or without any training."""

import inspect
from collections.abc import Iterable, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torchshear._arguments import check_kind
from torchshear.calibration import Loss
from torchshear.calibration._batches import CallForm, read_batches
from torchshear.compat.neural_compressor._config import WeightPruningConfig
from torchshear.compat.neural_compressor._manager import CompressionManager, as_example, in_order
from torchshear.errors import ArgumentError, DataError
from torchshear.pruners.criteria._criterion import needs_of
from torchshear.training._gradient_sums import SUMS_OF_TRAINING

_BATCHES = 32  # without an end_step


def prepare_pruning(
    model: nn.Module | WeightPruningConfig,
    config: WeightPruningConfig | nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    dataloader: Iterable[Any] | None = None,
    loss_func: Loss | None = None,
    *,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
) -> CompressionManager:
    """Prune a model in a loop without hooks, or by data without a training.

    With an optimizer the hooks come by themselves: a step begins with a call of the model in training mode, and ends
    with a step of the optimizer; `finish()` ends the training. Without one the pruning is done at once, by the batches
    of the loader, and the training of the manager is over.

    Args:
        model: the model, without masks.
        config: the config. Model and config may change places.
        optimizer: the optimizer of the training.
        dataloader: gives batches, see `torchshear.collect`, of which the first is the example, too. At most as many are
            run as the largest `end_step` says; 32 if none says more than 0.
        loss_func: called as `loss_func(output, target)`. None: the loss that the output of the model holds, as `loss`
            or first, as models of transformers give it with labels.
        args: example positional arguments; a tensor counts as one argument. Without a loader and example arguments the
            first call of the model in the training loop is taken for one.
        kwargs: example keyword arguments.

    Returns:
        The manager, whose `finish()` gives the small model, proved.

    Raises:
        ArgumentError: there is no model or no config, or neither optimizer nor data; a criterion needs data that is not
            given; the config does not fit the model; the optimizer is of another model.
        CaptureError: torch.export cannot capture the model.
        DataError: the data or the loss does not fit the model.
    """
    module, pruning = in_order(model, config)
    if optimizer is None and dataloader is None:
        raise ArgumentError(
            "prepare_pruning() has neither an optimizer nor a dataloader; give optimizer= of the training, or batches "
            "as dataloader=."
        )
    criteria = [one.entry.criterion or "l1" for one in pruning.pruners]
    needs = frozenset[Any]().union(*map(needs_of, criteria))
    n_batches = max(one.schedule.end for one in pruning.pruners) or _BATCHES
    if dataloader is not None:
        dataloader, n_batches = _first_batches(dataloader, n_batches)
        if as_example(args, kwargs) is None:
            device = next((one.device for one in module.parameters()), torch.device("cpu"))
            first = next(read_batches(dataloader, 1, CallForm(inspect.signature(module.forward)), device))
            args, kwargs = first.args, first.kwargs
    is_by_data = bool(needs - SUMS_OF_TRAINING if optimizer is not None else needs)
    if is_by_data and dataloader is None:
        raise ArgumentError(f"a pruner goes by {', '.join(criteria)}, which runs batches; give them as dataloader=.")
    given: dict[str, Any] = {}
    if is_by_data:
        given = {"data": dataloader, "loss_fn": own_loss if loss_func is None else loss_func, "batches": n_batches}
    if optimizer is None:
        manager = CompressionManager(module, pruning, args, kwargs, **given, at_once=True)
        manager.session.on_event()
        manager.callbacks.on_train_begin()
        manager.callbacks.on_train_end()
        return manager
    check_kind("optimizer", optimizer, torch.optim.Optimizer, "the optimizer of the training")
    manager = CompressionManager(module, pruning, args, kwargs, **given)
    _hook(manager, module, optimizer)
    return manager


def _first_batches(loader: Iterable[Any], count: int) -> tuple[Iterable[Any], int]:
    """Return a loader that can be run more than once, and how many batches to run: at most so many.

    Raises:
        ArgumentError: it gives no batches.
    """
    wrong = f"dataloader is {type(loader).__name__}; expected something that gives batches."
    if isinstance(loader, str | bytes | Tensor):
        raise ArgumentError(wrong)
    try:
        given = islice(loader, count)
    except (TypeError, NotImplementedError) as error:
        raise ArgumentError(wrong) from error
    try:
        size = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader of a data set that has no size
        size = None
    if size is None:
        loader = list(given)
        size = len(loader)
    if not size:
        raise ArgumentError("dataloader gives no batches; expected at least one.")
    return loader, min(size, count)


def own_loss(output: Any, _: Any) -> Tensor:
    """Return the loss that the output of a model holds.

    Raises:
        DataError: it holds none.
    """
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise DataError(
            "the output of the model holds no loss; give loss_func=, a function of output and target, or batches with "
            "labels by which the model computes one."
        )
    return found


def _hook(manager: CompressionManager, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have the hooks of a training come by calls of the model and steps of its optimizer, up to its end."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ArgumentError("optimizer= holds none of the model's parameters; make it of model.parameters().")
    callbacks = manager.callbacks

    def begin(module: nn.Module, _: Any) -> None:
        if module is model and module.training and not callbacks.is_in_step:
            callbacks.on_step_begin()

    callbacks.release_with([
        model.register_forward_pre_hook(begin),
        optimizer.register_step_pre_hook(lambda *_: callbacks.on_before_optimizer_step()),
        optimizer.register_step_post_hook(lambda *_: callbacks.on_after_optimizer_step()),
    ])  # fmt: skip
    callbacks.on_train_begin()
