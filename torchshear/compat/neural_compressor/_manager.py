"""The manager that Neural Compressor's `prepare_compression` gives: a model, hooks of its training, and the result."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchshear._arguments import check_flag, check_kind
from torchshear._making import PruneResult
from torchshear.calibration import Loss
from torchshear.compat.neural_compressor._callbacks import CallBacks, Example
from torchshear.compat.neural_compressor._config import WeightPruningConfig
from torchshear.compat.neural_compressor._lasso import PrunersLasso
from torchshear.compat.neural_compressor._names import fit_names
from torchshear.errors import ArgumentError, OutputError
from torchshear.options import Form
from torchshear.pruners.criteria._criterion import needs_of
from torchshear.pruners.masks import Masks
from torchshear.pruners.schedules import OneShot
from torchshear.pruners.schedules._several import Several
from torchshear.storage._reading import as_path
from torchshear.storage._writing import atomic_path
from torchshear.training._gradient_sums import SUMS_OF_TRAINING
from torchshear.training._session import PruningSession
from torchshear.training._training_config import LOCK, TrainingConfig

_logger = logging.getLogger(__name__)
_WEIGHTS: Final = "best_model.pt"  # as Neural Compressor calls it


class CompressionManager:
    """Model that is pruned while it trains, with the hooks of its training loop.

    `prepare_compression` and `prepare_pruning` make it. The model is changed in place, and its parameters stay the same
    objects. When the training ends it holds zeros where its masks were, under the names that it had before; `finish`
    gives the small model.

    Args:
        model: the model, without masks.
        config: the config.
        args: example positional arguments; a tensor counts as one argument. Without example arguments the first call of
            the model in the training loop is taken for one.
        kwargs: example keyword arguments.
        data: batches for criteria that look at data, see `torchshear.collect`.
        loss_fn: called as `loss_fn(output, target)`, for criteria of gradients on `data`.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        at_once: whether all goes when `session.on_event()` comes, and no pruner follows its schedule.

    Attributes:
        callbacks: the hooks.
        model: the model that trains.
        config: the config.

    Raises:
        ArgumentError: an argument is none of those above; with example arguments: the config does not fit the model.
        CaptureError: torch.export cannot capture the model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: WeightPruningConfig,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        data: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        batches: int | None = None,
        at_once: bool = False,
    ) -> None:
        check_kind("model", model, nn.Module, "a torch.nn.Module")
        check_kind("config", config, WeightPruningConfig, "a WeightPruningConfig")
        check_flag("at_once", at_once)
        self.model, self.config = model, config
        self._given: dict[str, Any] = {"data": data, "loss_fn": loss_fn, "batches": batches}
        self._at_once = OneShot(by="event") if at_once else None
        self.callbacks = CallBacks(model, self._make, as_example(args, kwargs))

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PruningSession:
        """Make the session by example arguments."""
        pruners = self.config.pruners
        labels = [one.entry.label for one in pruners]
        schedules = dict(zip(labels, (self._at_once or one.schedule for one in pruners), strict=True))
        stages = {one.entry.label: one.stage for one in pruners if one.stage and self._at_once is None}
        entries = fit_names([one.entry for one in pruners], self.model)
        session = PruningSession(
            self.model,
            args,
            kwargs,
            config=TrainingConfig(entries=entries, schedules=schedules, stages=stages),
            schedule=Several(tuple(schedules.values())),
            regularizer=None if self._at_once is not None else PrunersLasso.of(pruners),
            **self._given,
        )
        for entry in (one.entry for one in pruners):
            for note in entry.notes:
                _logger.info("%s: %s", entry.label, note)
        return session

    @property
    def session(self) -> PruningSession:
        """The session that does the work, for its history and state.

        Raises:
            ArgumentError: the model was not called in the training loop yet.
        """
        return self.callbacks.session

    def __repr__(self) -> str:
        return f"<CompressionManager of {type(self.model).__name__}, {self.config!r}>"

    def finish(self, form: Form = "auto") -> PruneResult:
        """Make the small model of the one that was trained, and prove that it computes the same.

        Channels and heads are removed, and what zeros of single weights leave without effect; other zeros stay zeros. A
        training that has begun is ended.

        Args:
            form: form of the result, as for `torchshear.prune`.

        Raises:
            ArgumentError: there was no training.
            VerificationError: the small model is not equal to the one with zeros; nothing is returned then.
        """
        if not self.callbacks.has_ended:
            self.callbacks.on_train_end()
        return self.session.finish(form)

    def save(self, root: str | os.PathLike[str]) -> None:
        """Write the model with its zeros, and its masks, into a folder, which is made if it is missing.

        "best_model.pt" holds the weights under the names that the model had without masks, for `load_state_dict` of
        `torch.load(path, weights_only=True)`; "masks.safetensors" is for `torchshear.pruners.masks.Masks.load`.

        Args:
            root: the folder.

        Raises:
            ArgumentError: the model was not called in the training loop yet.
            OutputError: a file cannot be written; what was there before is unchanged.
        """
        folder: Path = as_path(root, "the folder to save the model in")
        session = self.session
        dense, choice = session._masked.dense_copy(), session._renewer.choice
        names = session._masked.parameters
        masks = Masks.of({name: mask for name, mask in choice.masks.items() if name in names})
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {str(folder)!r}: {error.strerror or error}.") from error
        with atomic_path(folder / _WEIGHTS) as temporary:
            torch.save(dense.state_dict(), temporary)
        masks.save(folder / "masks.safetensors")


def prepare_compression(
    model: nn.Module | WeightPruningConfig,
    confs: WeightPruningConfig | Sequence[WeightPruningConfig] | nn.Module,
    *,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
) -> CompressionManager:
    """Prepare a model to be pruned while it trains, by the hooks of the manager's `callbacks` in the training loop.

    Args:
        model: the model, without masks.
        confs: a `WeightPruningConfig`, or a list of one. Model and config may change places.
        args: example positional arguments; a tensor counts as one argument. Without example arguments the first call of
            the model in the training loop is taken for one.
        kwargs: example keyword arguments.

    Returns:
        The manager.

    Raises:
        ArgumentError: there is no model or no config; a criterion needs data, as "retrain_free"; with example
            arguments: the config does not fit the model.
        CaptureError: torch.export cannot capture the model; without example arguments raised by its first call.
    """
    module, config = in_order(model, confs)
    for pruner in config.pruners:
        beyond = needs_of(pruner.entry.criterion or "l1") - SUMS_OF_TRAINING
        if beyond and pruner.entry.pattern != LOCK:
            raise ArgumentError(
                f"{pruner.entry.label}: {pruner.entry.criterion} runs batches without training; use "
                f"prepare_pruning(model, config, dataloader=..., loss_func=...)."
            )
    return CompressionManager(module, config, args, kwargs)


def as_example(args: object, kwargs: object) -> Example | None:
    """Return example arguments as a tuple and a mapping; None if there are none.

    Raises:
        ArgumentError: they are neither.
    """
    check_kind("args", args, (tuple, Tensor), "a tuple of example arguments, or a tensor")
    if kwargs is not None:
        check_kind("kwargs", kwargs, Mapping, "a mapping of example arguments by name, or None")
    given = (args,) if isinstance(args, Tensor) else tuple(args)  # type: ignore[arg-type]
    return (given, kwargs or {}) if given or kwargs else None  # type: ignore[return-value]


def in_order(first: object, second: object) -> tuple[nn.Module, WeightPruningConfig]:
    """Return a model and its config, whichever of them comes first; a list of one config is that.

    Raises:
        ArgumentError: there is not one of each.
    """
    one, other = (second, first) if isinstance(second, nn.Module) else (first, second)
    if isinstance(other, Sequence) and not isinstance(other, str):
        if len(other) != 1:
            raise ArgumentError(
                f"confs holds {len(other)} configs; expected one WeightPruningConfig. Distil and quantise what "
                f"finish() gives."
            )
        other = other[0]
    check_kind("model", one, nn.Module, "a torch.nn.Module")
    check_kind("the config", other, WeightPruningConfig, "a WeightPruningConfig")
    assert isinstance(one, nn.Module), "checked above"
    assert isinstance(other, WeightPruningConfig), "checked above"
    return one, other
