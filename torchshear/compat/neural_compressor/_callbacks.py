"""The hooks of a training loop as Neural Compressor has them: those that are left out are made up for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from torchshear._arguments import check_count
from torchshear.errors import ArgumentError
from torchshear.training._session import PruningSession
from torchshear.training._trainer_hooks import TrainerHooks

Example = tuple[tuple[Any, ...], Mapping[str, Any]]
Make = Callable[[tuple[Any, ...], Mapping[str, Any]], PruningSession]


class CallBacks:
    """Hooks of a `CompressionManager` for the training loop, in the order of Neural Compressor.

    `on_train_begin`; for each epoch `on_epoch_begin(epoch)`, for each batch `on_step_begin(step)`,
    `on_before_optimizer_step` between backward and the optimizer's step, `on_after_optimizer_step` and `on_step_end`,
    then `on_epoch_end`; `on_train_end`. Those of epochs and `on_step_end` may be left away, as its examples do. A step
    is a step of the optimizer, so that batches whose gradients are gathered are one.

    Without example inputs the model is captured in its first call behind `on_step_begin`, with what it is called with
    there, and masks lie on it from then on.

    Args:
        model: the model that trains.
        make: makes the session of example arguments.
        example: example arguments, or None.
    """

    def __init__(self, model: nn.Module, make: Make, example: Example | None) -> None:
        self._model, self._make = model, make
        self._hooks = None if example is None else TrainerHooks(make(*example), "auto")
        self._handles: list[RemovableHandle] = []
        self._has_begun = self._has_ended = self._is_in_step = False
        self._epoch = 0

    @property
    def session(self) -> PruningSession:
        """The session that does the work.

        Raises:
            ArgumentError: the model was not called in the loop yet, so that there is none.
        """
        return self._made().session

    def _made(self) -> TrainerHooks:
        """The hooks of the session.

        Raises:
            ArgumentError: there is none yet.
        """
        if self._hooks is None:
            raise ArgumentError(
                "the model was not called yet between on_step_begin() and on_before_optimizer_step(), and what it "
                "takes is not known; call it there, or give example inputs: prepare_compression(..., args=(x,))."
            )
        return self._hooks

    @property
    def has_ended(self) -> bool:
        """True once the training is over."""
        return self._has_ended

    @property
    def is_in_step(self) -> bool:
        """True from the begin of a step up to the step of the optimizer."""
        if self._hooks is None:
            return self._is_in_step
        return self._hooks.place in ("step", "at the optimizer")

    def on_train_begin(self) -> None:
        """Begin the training.

        Raises:
            ArgumentError: it came twice.
        """
        if self._has_begun:
            raise ArgumentError(
                "on_train_begin() came before. To train a pruned model on, prepare it anew, with pruning_type "
                "'pattern_lock' to keep its zeros."
            )
        self._has_begun = True
        if self._hooks is None:
            self._await_call()
        else:
            self._hooks.session.on_train_begin()

    def release_with(self, handles: Sequence[RemovableHandle]) -> None:
        """Take handles of hooks that are to be removed when the training ends."""
        self._handles.extend(handles)

    def _await_call(self) -> None:
        """Have the session made by the next call of the model in a step, with copies of its arguments."""

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is not self._model or not self._is_in_step:  # a copy has the hook as well
                return
            handle.remove()
            self._begin(*pytree.tree_map_only(Tensor, lambda one: one.detach().clone(), (args, kwargs)))

        handle = self._model.register_forward_pre_hook(capture, with_kwargs=True)
        self._handles.append(handle)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the session, and begin the step in which the model was called."""
        device = next((one.device.type for one in self._model.parameters()), "cpu")
        with torch.autocast(device, enabled=False):
            hooks = TrainerHooks(self._make(args, kwargs), "auto")
        self._hooks = hooks
        hooks.session.on_train_begin()
        hooks.begin_epoch(self._epoch)
        hooks.begin_step()

    def _in_training(self) -> TrainerHooks | None:
        """The hooks of the session, at a place where a step of the optimizer that began has been counted.

        Raises:
            ArgumentError: training has not begun, or is over.
        """
        if not self._has_begun or self._has_ended:
            what = "training is over" if self._has_ended else "on_train_begin() did not come yet"
            raise ArgumentError(f"a hook of the training loop came, and {what}.")
        if self._hooks is not None and self._hooks.place == "at the optimizer":
            self._hooks.after_optimizer()
        return self._hooks

    def on_epoch_begin(self, epoch: int) -> None:
        """Begin an epoch.

        Args:
            epoch: its number, from 0.

        Raises:
            ArgumentError: it is no whole number, or training has not begun or is over.
        """
        check_count("epoch", epoch, 0)
        hooks = self._in_training()
        self._epoch = int(epoch)
        if hooks is not None:
            hooks.end_epoch()
            hooks.begin_epoch(self._epoch)

    def on_step_begin(self, batch_id: int | None = None) -> None:
        """Begin a batch; at an event of a schedule masks are renewed.

        Args:
            batch_id: number of the batch, without effect: steps are counted by those of the optimizer.

        Raises:
            ArgumentError: training has not begun or is over; a criterion is made of gradients, and there are none.
        """
        if batch_id is not None:
            check_count("batch_id", batch_id, 0)
        hooks = self._in_training()
        self._is_in_step = True
        if hooks is not None:
            hooks.end_step()
            hooks.begin_epoch(self._epoch)
            hooks.begin_step()

    def on_after_compute_loss(
        self,
        input: Any,
        student_output: Any,
        student_loss: Tensor,
        teacher_output: Any = None,
    ) -> Tensor:
        """Return the loss as it is: distillation is not here.

        Args:
            input: without effect, as all others but the loss.
            student_output: without effect.
            student_loss: the loss.
            teacher_output: without effect.
        """
        return student_loss

    def on_before_optimizer_step(self, grad_scale: float | None = None) -> None:
        """Read the gradients of the step, and add those of a regularizer.

        Args:
            grad_scale: as for `torchshear.PruningSession.on_before_optimizer_step`.

        Raises:
            ArgumentError: the model was not called since `on_step_begin`, or training has not begun or is over.
            DataError: a gradient is NaN or infinite.
        """
        self._in_training()
        self._made().before_optimizer(grad_scale)

    def on_after_optimizer_step(self) -> None:
        """Count a step of the optimizer.

        Raises:
            ArgumentError: `on_before_optimizer_step` did not come.
        """
        self._made().after_optimizer()
        self._is_in_step = False

    def on_step_end(self) -> None:
        """End a batch."""
        hooks = self._in_training()
        if hooks is not None:
            hooks.end_step()

    def on_epoch_end(self) -> None:
        """End an epoch."""
        hooks = self._in_training()
        if hooks is not None:
            hooks.end_epoch()

    def on_before_eval(self) -> None:
        """Do nothing: masks hold in an evaluation as well."""

    def on_after_eval(self) -> None:
        """Do nothing."""

    def on_train_end(self) -> None:
        """End the training: what is due comes now, and the model has zeros where its masks were, which are taken off.

        Raises:
            ArgumentError: training has not begun, is over, or the model was never called in it.
        """
        self._in_training()
        hooks = self._made()
        hooks.end_epoch()
        for handle in self._handles:
            handle.remove()
        hooks.session.on_train_end()
        hooks.session._masked.settle()
        self._has_ended = True
