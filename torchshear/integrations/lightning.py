"""A pruning session in a training by Lightning's Trainer."""

from typing import Any

import torch
from torch import Tensor

from torchshear._making import PruneResult
from torchshear.errors import ArgumentError, CheckpointError, MissingLibraryError
from torchshear.options import Form
from torchshear.training._session import PruningSession
from torchshear.training._trainer_hooks import TrainerHooks

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except (ImportError, RuntimeError) as error:  # the latter of libraries that do not fit together
    raise MissingLibraryError(
        f"torchshear.integrations.lightning needs lightning, which cannot be imported ({error}): pip install lightning."
    ) from error

__all__ = ["PruningCallback"]


class PruningCallback(Callback):
    """Prunes the model of a Lightning Trainer while it trains: tells a session where the training is.

    Steps of the optimizer are the session's steps, not batches whose gradients are gathered. Gradients are read, and
    those of the regularizer added, in Lightning's `on_before_optimizer_step`: before they are clipped, and after a
    scaler has undone its scale. Optimization may be automatic or manual. The session's state is in the checkpoints of
    the trainer, and is taken up again by `trainer.fit(ckpt_path=...)`.

    Args:
        session: a session of the LightningModule or of a module of it, made before `fit` and without `optimizer=`.
        form: form of the result, as for `torchshear.prune`.

    Raises:
        ArgumentError: `session` is no session or was made with `optimizer=`, or the form is none.

    Example:
        trainer = Trainer(max_epochs=10, callbacks=[PruningCallback(session)])
    """

    def __init__(self, session: PruningSession, form: Form = "auto") -> None:
        self._hooks = TrainerHooks(session, form)
        if session._optimizer is not None:
            raise ArgumentError(
                "the session was made with optimizer=; Lightning computes gradients within the step of the optimizer, "
                "where the session would take it for one that no hook announced. Leave optimizer= away."
            )
        self._stage = ""
        self._optimizer: Any = None
        self._handle: Any = None
        self._losses: list[Tensor] = []

    @property
    def result(self) -> PruneResult:
        """The small model, proved, with the history of the training.

        Raises:
            ArgumentError: the training has not ended.
        """
        return self._hooks.result

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take note of what the trainer does; states of checkpoints are read to train on only."""
        self._stage = stage

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the session's training, or go on with it."""
        self._optimizer = self._hooks.begin(pl_module, trainer.optimizers)
        self._handle = self._optimizer.register_step_post_hook(lambda *_: self._hooks.after_optimizer())
        self._losses.clear()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        self._hooks.begin_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a step, unless gradients are being gathered; and an epoch that was begun before a stop."""
        self._hooks.begin_epoch(trainer.current_epoch)
        self._hooks.begin_step()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Read the gradients, and add those of the regularizer."""
        if getattr(optimizer, "optimizer", optimizer) is self._optimizer:
            self._hooks.before_optimizer(_scale(trainer.precision_plugin, self._optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a step, if the optimizer has made one, with the mean loss of its batches."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            n_gathered = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach() * n_gathered)  # Lightning has divided it
        if self._hooks.place == "at the optimizer":  # where the scaler left the step out
            self._hooks.after_optimizer()
        if self._hooks.place == "stepped":
            self._hooks.end_step(torch.stack(self._losses).mean() if self._losses else None)
            self._losses.clear()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End an epoch."""
        self._hooks.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the training, and make the small model."""
        self._release()
        self._hooks.end(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizer alone."""
        self._release()

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the session, for a checkpoint."""
        return self._hooks.session.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to train on from a checkpoint without a session's state."""
        if self._stage == "fit" and self.state_key not in checkpoint.get("callbacks", {}):
            raise CheckpointError(
                "the checkpoint holds no state of a pruning session: it was written by a training without this "
                "callback. Load its weights into the model before the session is made, and train without ckpt_path."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the session of a checkpoint was, if the trainer is about to train."""
        if self._stage == "fit":
            self._hooks.session.load_state_dict(state_dict)


def _scale(precision: Any, optimizer: Any) -> float | None:
    """Scale that gradients still have; 1 where a scaler has undone it, None without one."""
    scaler = getattr(precision, "scaler", None)
    if scaler is None:
        return None
    return float(scaler.get_scale()) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
