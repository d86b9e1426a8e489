"""Training by functions and optimizers of the user: they are called as NNI calls them, and a session is told of it."""

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from torchshear.errors import ArgumentError
from torchshear.training._session import PruningSession

Trainer = Callable[..., object]

_ORDER: Final = ("optimizer", "criterion", "epoch", "callback")
_OF_MANY: Final = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def call_trainer(trainer: Trainer, model: nn.Module, **given: Any) -> None:
    """Call the function that trains a model for an epoch.

    It may take the model, and of `optimizer`, `criterion`, `epoch` and `callback` those that it names, as in NNI 2.0
    to 2.4; or take them in this order under other names, as NNI 2.5 and later call it.

    Args:
        trainer: the function.
        model: the model.
        given: what it may be given, by name.
    """
    try:
        rest = list(inspect.signature(trainer).parameters.values())[1:]
    except (TypeError, ValueError):  # written in C
        rest = []
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in rest)
    needed = [one.name for one in rest if one.default is one.empty and one.kind not in _OF_MANY]
    if all(name in given for name in needed):
        names = [one.name for one in rest]
        trainer(model, **{name: value for name, value in given.items() if takes_all or name in names})
    else:
        trainer(model, *[given[name] for name in _ORDER if name in given][: len(needed)])


class TrainingHooks:
    """Tells a session of epochs, and by hooks on an optimizer of steps.

    Args:
        session: the session, of a training that begins now.
        optimizer: the optimizer; None if nobody is to be told of steps.

    Attributes:
        n_steps: steps of the optimizer that were made.
    """

    def __init__(self, session: PruningSession, optimizer: torch.optim.Optimizer | None) -> None:
        self._session = session
        self._is_in_epoch = self._is_in_step = False
        self.n_steps = 0
        self._handles = []
        if optimizer is not None:  # before the session lays its own, which demands that a step was announced
            self._handles = [
                optimizer.register_step_pre_hook(lambda *_: self.before_step()),
                optimizer.register_step_post_hook(lambda *_: self._after_step()),
            ]
        session.on_train_begin()

    def epoch(self, number: int) -> None:
        """Begin an epoch, and end the one before."""
        self._after_step()
        if self._is_in_epoch:
            self._session.on_epoch_end()
        self._session.on_epoch_begin(number)
        self._is_in_epoch = True

    def before_step(self) -> None:
        """Say that gradients are there and the optimizer's step comes; in a step that was announced nothing happens."""
        if self._is_in_step:
            return
        self._session.on_step_begin()
        self._session.on_before_optimizer_step()
        self._is_in_step = True

    def _after_step(self) -> None:
        if self._is_in_step:
            self._session.on_after_optimizer_step()
            self._session.on_step_end()
            self._is_in_step = False
            self.n_steps += 1

    def end(self) -> None:
        """End the training."""
        self._after_step()
        for handle in self._handles:
            handle.remove()
        if self._is_in_epoch:
            self._session.on_epoch_end()
        self._session.on_train_end()


def check_function(name: str, value: object, of: str) -> None:
    """Raise ArgumentError for what is neither a function nor None."""
    if value is not None and not callable(value):
        raise ArgumentError(f"{name} is {type(value).__name__}; expected a function of {of}, or None.")


def check_optimizer(value: object, model: nn.Module) -> None:
    """Raise ArgumentError for what is neither an optimizer of a model nor None."""
    if isinstance(value, str):
        raise ArgumentError(f"optimizer={value!r}; expected an optimizer. Give the criterion as pruning_algorithm=.")
    if value is not None and not isinstance(value, torch.optim.Optimizer):
        raise ArgumentError(f"optimizer is {type(value).__name__}; expected a torch.optim.Optimizer, or None.")
    held = {id(one) for group in value.param_groups for one in group["params"]} if value is not None else set()
    if value is not None and not any(id(one) in held for one in model.parameters()):
        raise ArgumentError("optimizer= holds none of the parameters of the model; make it of model.parameters().")
