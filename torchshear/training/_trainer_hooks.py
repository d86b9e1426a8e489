"""Hooks of a session as a trainer's events come, which are fewer or more than those of a loop by hand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchshear._arguments import check_kind, check_one_of
from torchshear._making import PruneResult
from torchshear.errors import ArgumentError
from torchshear.options import Form
from torchshear.training._session import PruningSession


class TrainerHooks:
    """Calls the hooks of a session in their order, whatever of them a trainer tells.

    A step of the session lasts from the first of the batches whose gradients are gathered until behind the optimizer.
    Beginnings and ends that come twice, or that a trainer leaves out where it stops or resumes within an epoch, are
    left to the state of the session.

    Args:
        session: the session, whose training has not begun.
        form: form of the result, as for `torchshear.prune`.

    Raises:
        ArgumentError: `session` is no session, or the form is none.
    """

    def __init__(self, session: PruningSession, form: Form) -> None:
        check_kind("session", session, PruningSession, "a torchshear.PruningSession of the model that is trained")
        check_one_of("form", form, ("auto", "native", "traced"))
        self.session, self._form = session, form
        self._result: PruneResult | None = None

    @property
    def place(self) -> str:
        """Place of the session, as its order of hooks has it."""
        return self.session._order.place

    @property
    def result(self) -> PruneResult:
        """The small model, proved, once the training is over.

        Raises:
            ArgumentError: it is not.
        """
        if self._result is None:
            raise ArgumentError(
                "there is no result yet: it is made when the trainer ends its training. If it has ended, it has made "
                "no step, or not with this callback."
            )
        return self._result

    def begin(self, model: nn.Module, optimizers: Sequence[Any]) -> Any:
        """Begin, or go on after the session's state was loaded.

        Args:
            model: the model of the trainer.
            optimizers: its optimizers.

        Returns:
            The optimizer of the parameters that the session prunes.

        Raises:
            ArgumentError: the session is of another model, or of the model before it was moved to another device; not
                exactly one of the optimizers is of its parameters; it has begun already.
        """
        masked = self.session._masked
        held = {id(parameter) for parameter in model.parameters()}
        if not all(id(parameter) in held for parameter in masked.parameters.values()):
            raise ArgumentError(
                f"the session is of a {type(masked.model).__name__} that is not in the {type(model).__name__} of the "
                f"trainer; make it of the model that is given to the trainer, or of a module of it."
            )
        self._check_device()
        pruned = {id(masked.parameters[name]) for name in masked.masks}
        fitting = [one for one in optimizers if pruned & {id(p) for group in one.param_groups for p in group["params"]}]
        if len(fitting) != 1:
            raise ArgumentError(
                f"{len(fitting)} of {len(optimizers)} optimizers of the trainer hold parameters that the session "
                f"prunes; expected one, whose steps are those of the session."
            )
        self._result = None
        self.session.on_train_begin()
        return fitting[0]

    def _check_device(self) -> None:
        """Raise ArgumentError if the model was moved to another device since it was traced."""
        session = self.session
        traced = {tensor.device for tensor in session._renewer.goal.groups.graph.inputs.tensors()}
        now = {parameter.device for parameter in session._masked.parameters.values()}
        if traced and now and not traced & now:
            raise ArgumentError(
                f"the model is on {min(map(str, now))}, and was on {min(map(str, traced))} when the session was made; "
                f"move it, and the example inputs, to where it trains before that: model.to(device)."
            )

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, if none lasts."""
        if self.place == "training":
            self.session.on_epoch_begin(epoch)

    def begin_step(self) -> None:
        """Begin a step, if none lasts."""
        if self.place == "epoch":
            self.session.on_step_begin()

    def before_optimizer(self, grad_scale: float | None) -> None:
        """Have the session read the gradients of a step.

        Args:
            grad_scale: as for `PruningSession.on_before_optimizer_step`.
        """
        if self.place == "at the optimizer" and grad_scale is not None:
            self.after_optimizer()  # of a step that the scaler left out
        if self.place == "stepped":  # several steps of the optimizer in a batch
            self.end_step()
            self.begin_step()
        self.session.on_before_optimizer_step(grad_scale)

    def after_optimizer(self) -> None:
        """Count a step of the optimizer."""
        self.session.on_after_optimizer_step()

    def end_step(self, loss: float | Tensor | None = None) -> None:
        """End a step, if one lasts."""
        if self.place in ("step", "stepped"):
            self.session.on_step_end(loss)

    def end_epoch(self) -> None:
        """End an epoch and its step, if they last."""
        self.end_step()
        if self.place == "epoch":
            self.session.on_epoch_end()

    def end(self, model: nn.Module) -> None:
        """End the training, and make the result.

        Args:
            model: the model of the trainer.

        Raises:
            ArgumentError: no step was made.
            VerificationError: the small model is not equal to the masked one.
        """
        self.end_epoch()
        self.session.on_train_end()
        if not self.session._progress.n_steps:
            raise ArgumentError(
                "the trainer ended its training, and made no step of the optimizer in it; the session has pruned "
                "nothing. Check its data, and its number of epochs and steps."
            )
        with _own_forward(model):
            self._result = self.session.finish(self._form)


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Give a model the forward of its own while the block runs, without the autocast that Accelerate puts round it."""
    held = vars(model)
    wrapped = {name: held.pop(name) for name in ("forward", "_original_forward") if "_original_forward" in held}
    original = wrapped.get("_original_forward")
    if original is not None and getattr(original, "__func__", None) is not type(model).forward:
        held["forward"] = original
    try:
        yield
    finally:
        held.update(wrapped)
