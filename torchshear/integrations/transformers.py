"""A pruning session in a training by the Trainer of transformers."""

import json
import os
from pathlib import Path
from typing import Any, Final

import torch

from torchshear._making import PruneResult
from torchshear.errors import ArgumentError, CheckpointError, MissingLibraryError, first_line
from torchshear.options import Form
from torchshear.storage._reading import as_path
from torchshear.storage._writing import atomic_path
from torchshear.training._session import PruningSession
from torchshear.training._trainer_hooks import TrainerHooks

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except (ImportError, RuntimeError) as error:  # the latter of libraries that do not fit together
    raise MissingLibraryError(
        f"torchshear.integrations.transformers needs transformers, which cannot be imported ({error}): pip install "
        f"transformers accelerate."
    ) from error

__all__ = ["PruningCallback"]

_FILE: Final = "torchshear_session.pt"
_STATE: Final = "trainer_state.json"


class PruningCallback(TrainerCallback):
    """Prunes the model of a transformers Trainer while it trains: tells a session where the training is.

    Steps of the optimizer are the session's steps, not batches whose gradients are gathered. Gradients are read, and
    those of the regularizer added, in `on_pre_optimizer_step`: after they are clipped. The history has the losses that
    the trainer logs. The session's state is written beside each checkpoint's, as `torchshear_session.pt`, and is taken
    up again by `trainer.train(resume_from_checkpoint=...)`.

    Args:
        session: a session of the trainer's model or of a module of it.
        resume_from: folder of the checkpoint that training resumes from, if it is not in `output_dir`, since a trainer
            does not tell its callbacks.
        form: form of the result, as for `torchshear.prune`.

    Raises:
        ArgumentError: `session` is no session, `resume_from` is no path, or the form is none.

    Example:
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[PruningCallback(session)])
    """

    def __init__(
        self, session: PruningSession, resume_from: str | os.PathLike[str] | None = None, form: Form = "auto"
    ) -> None:
        self._hooks = TrainerHooks(session, form)
        self._resume_from = None if resume_from is None else as_path(resume_from, "the folder of a checkpoint")
        self._epoch = 0

    @property
    def result(self) -> PruneResult:
        """The small model, proved, with the history of the training.

        Raises:
            ArgumentError: the training has not ended.
        """
        return self._hooks.result

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the session's training, or go on with it."""
        if args.load_best_model_at_end:
            raise ArgumentError(
                "load_best_model_at_end=True puts weights of an earlier step in the model when training ends, which "
                "were pruned less than the session asks for; leave it away."
            )
        if state.global_step:
            self._resume(args, state)
        self._hooks.begin(kwargs["model"], [kwargs["optimizer"]])
        self._epoch = int(state.epoch + 1e-6)  # it counts batches as parts of an epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin an epoch."""
        self._hooks.begin_epoch(self._epoch)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a step; the one before ends here if no loss was logged behind it."""
        self._hooks.end_step()
        self._hooks.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the gradients, and add those of the regularizer."""
        is_scaled = getattr(kwargs["optimizer"], "scaler", None) is not None
        self._hooks.before_optimizer(1.0 if is_scaled else None)  # the trainer has undone the scale to clip

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a step of the optimizer."""
        self._hooks.after_optimizer()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End a step with the loss that is logged behind it."""
        loss = kwargs.get("logs", {}).get("loss")
        if loss is not None:
            self._hooks.end_step(float(loss))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End an epoch."""
        self._hooks.end_epoch()
        self._epoch += 1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the session's state into the checkpoint that was just written."""
        self._hooks.end_step()
        if args.should_save:
            saved = {"global_step": state.global_step, "session": self._hooks.session.state_dict()}
            with atomic_path(_checkpoint(args, state) / _FILE) as path:
                torch.save(saved, path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the training, and make the small model."""
        self._hooks.end(kwargs["model"])

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Load the session's state from the checkpoint that the trainer has loaded."""
        given = self._resume_from or args.resume_from_checkpoint
        folder = Path(given) if given else _checkpoint(args, state)
        advice = "Give the folder that training resumes from: PruningCallback(session, resume_from=folder)."
        if not (folder / _FILE).is_file():
            raise CheckpointError(
                f"{str(folder)!r} holds no {_FILE}: the checkpoint was written without this callback, or lies "
                f"elsewhere. {advice}"
            )
        try:
            saved = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
            step, session_state = saved["global_step"], saved["session"]
            logged = TrainerState.load_from_json(str(folder / _STATE)).log_history
        except Exception as error:  # files may be damaged in any way
            raise CheckpointError(
                f"{str(folder)!r} cannot be read: {first_line(error)}. Resume from another."
            ) from error
        if step != state.global_step or json.dumps(logged) != json.dumps(state.log_history):
            raise CheckpointError(
                f"{str(folder)!r} is not the checkpoint that the trainer has loaded, which is of step "
                f"{state.global_step}. {advice}"
            )
        self._hooks.session.load_state_dict(session_state)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Folder of the trainer's checkpoint at its step."""
    return Path(args.output_dir, f"checkpoint-{state.global_step}")
