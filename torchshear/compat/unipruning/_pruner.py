"""UniPruning as a pruner: channels are zeroed every few epochs of a training, and removed at the end."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count, check_flag, check_kind
from torchshear._making import PruneResult, shrink_planned
from torchshear.compat.unipruning._config import UniPruningConfig, read_unipruning_config
from torchshear.compat.unipruning._mask_file import plan_from_unipruning_mask, write_unipruning_mask
from torchshear.compat.unipruning._planning import NetworkRuns
from torchshear.compat.unipruning._zeroed_file import read_zeroed, write_zeroed
from torchshear.dependency.groups._analyze import analyze
from torchshear.errors import ArgumentError, OutputError
from torchshear.graph.capture._trace import trace
from torchshear.pruners.schedules import Repeated
from torchshear.storage._reading import as_path
from torchshear.training._session import PruningSession
from torchshear.training._snapshot import plan_now


class UniPruner:
    """UniPruning of MindSpore Golden Stick: every `frequency` epochs the channels that weigh least are zeroed.

    At epochs 0, f, 2f, ... runs of channels are ranked network-wide, see `plan_unipruning`, and zeroed until no more
    than the target is left: the whole of it from the first time on, as there. In between, weights train on under masks.
    Each time the search is made anew. It begins with a trained model or with one that is not.

        pruner = UniPruner({"target_sparsity": 0.75, "frequency": 9, "pruning_step": 32, "filter_lower_threshold": 32,
                            "input_size": [16, 3, 224, 224], "output_path": "out", "exp_name": "first"})
        model = pruner.apply(model)
        callback, = pruner.callbacks()
        ...                                     # the hooks of the callback in the training loop
        result = pruner.convert()               # small and proved

    Args:
        config: a configuration of UniPruning, see `read_unipruning_config`. With `output_path` each search writes a
            checkpoint and a mask into the folder `output_path/exp_name`, which is made; names are as there.
        soft: True: what is zeroed keeps its value below the mask, and is judged by it at the next search, so that it
            may come back. False: what went stays away.
        use_gamma: whether norms of channels are multiplied by the scales of batch norms; the code of UniPruning does
            not.

    Attributes:
        config: the settings.
        session: the `PruningSession` that does the work, for hooks of steps and `torchshear.integrations`; None before
            `apply`, and where `prune_flag` is 0.

    Raises:
        ArgumentError: the configuration has an unknown key or a value out of range.

    Reference: UniPruning of MindSpore Golden Stick. There channels are zeroed without masks; their gradients are zero
    all the same, and they move by what momentum is left alone.
    """

    def __init__(
        self, config: Mapping[str, Any] | UniPruningConfig, *, soft: bool = True, use_gamma: bool = True
    ) -> None:
        check_flag("soft", soft)
        check_flag("use_gamma", use_gamma)
        self.config = config if isinstance(config, UniPruningConfig) else read_unipruning_config(config)
        self.session: PruningSession | None = None
        self._soft, self._use_gamma = soft, use_gamma
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def __repr__(self) -> str:
        now = "not applied" if self._model is None else "prune_flag=0" if self.session is None else str(self.session)
        return f"<UniPruner to {self.config.params_kept:.1%} of the parameters, {now}>"

    def apply(
        self,
        model: nn.Module,
        args: tuple[Any, ...] | Tensor | None = None,
        kwargs: Mapping[str, Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> nn.Module:
        """Lay masks on a model, which is changed in place and returned; its parameters are the same objects.

        Args:
            model: the model to train.
            args: example positional arguments; None: random numbers of the shape `input_size`.
            kwargs: example keyword arguments.
            optimizer: the optimizer, to be written into checkpoints.

        Raises:
            ArgumentError: it was applied already; the optimizer is of another model; the model keeps the target dense.
            CaptureError: torch.export cannot capture the model.
            PlanError: the target cannot be reached.
            MaskError: masks lie on the model already, or a weight is computed.
        """
        check_kind("model", model, nn.Module, "a torch.nn.Module")
        if self._model is not None:
            raise ArgumentError("apply() came twice; make a new UniPruner for another model.")
        if optimizer is not None:
            _check_optimizer(optimizer, model)
        config = self.config
        if config.is_on:
            least = max(config.run, config.min_width)
            session = PruningSession(
                model,
                self._example(model) if args is None and kwargs is None else () if args is None else args,
                kwargs,
                schedule=Repeated(frequency=config.frequency),
                target_params=config.params_kept,
                criterion=NetworkRuns(run=config.run, min_width=config.min_width, use_gamma=self._use_gamma),
                min_width=least,
                soft=self._soft,
            )
            self.session = session
        self._model, self._optimizer = model, optimizer
        return model

    def _example(self, model: nn.Module) -> Tensor:
        """Random numbers of the shape that the configuration gives, of the type and place of the model."""
        parameter = next((one for one in model.parameters() if one.is_floating_point()), torch.zeros(()))
        numbers = torch.randn(self.config.input_size, generator=torch.Generator().manual_seed(0))
        return numbers.to(parameter.device, parameter.dtype)

    def callbacks(self) -> list["ZeroingCallback"]:
        """Return the callback whose hooks go into the training loop, in a list.

        Raises:
            ArgumentError: it came before `apply`.
        """
        self._applied()
        return [ZeroingCallback(self)]

    def _applied(self) -> nn.Module:
        if self._model is None:
            raise ArgumentError("the pruner has no model yet; call apply(model) first.")
        return self._model

    def write(self, epoch: int) -> None:
        """Write checkpoint and mask of an epoch, if the configuration has an `output_path`; by one process only.

        Args:
            epoch: number of the epoch with which a training that reads the checkpoint goes on.

        Raises:
            ArgumentError: it came before `apply`, or the epoch is no whole number.
            OutputError: a file cannot be written; what was there before is unchanged.
        """
        check_count("epoch", epoch, 0)
        model, session, config = self._applied(), self.session, self.config
        if session is None or config.output_path is None or _rank() > 0:
            return
        folder = as_path(config.output_path, "output_path") / config.exp_name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {str(folder)!r}: {error.strerror or error}.") from error
        stem = f"{config.exp_name}_zeroed_rank{config.rank}_epoch{epoch}"
        write_unipruning_mask(plan_now(session), folder / f"{stem}_mask.json")
        write_zeroed(folder / f"{stem}.ckpt", epoch, model, session, self._optimizer)

    def resume(self, checkpoint: str | os.PathLike[str]) -> int:
        """Go on where a checkpoint was written: model, optimizer and masks are as they were then.

        Args:
            checkpoint: a file `..._zeroed_rank0_epoch9.ckpt`.

        Returns:
            The epoch to go on with.

        Raises:
            ArgumentError: it came before `apply` or in a training; the file is of another model, another optimizer or
                other settings.
            CheckpointError: the file cannot be read.
        """
        model, session = self._applied(), self.session
        if session is None:
            raise ArgumentError("prune_flag=0: nothing is zeroed, and no checkpoint is written or read.")
        return read_zeroed(as_path(checkpoint, "the path of a checkpoint"), model, session, self._optimizer)

    def convert(
        self,
        model: nn.Module | None = None,
        mask: str | os.PathLike[str] | None = None,
        args: tuple[Any, ...] | Tensor | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> PruneResult:
        """Make the small network, and prove that it computes what the zeroed one does.

        Args:
            model: a model of the same class without masks, with weights of its own, as the "weights" of a checkpoint;
                None for the one that was trained.
            mask: with a model, the file of its mask.
            args: with a model, example positional arguments; None: random numbers of the shape `input_size`.
            kwargs: with a model, example keyword arguments.

        Raises:
            ArgumentError: only one of model and mask is given; there is none, and training has not ended or zeroed
                nothing.
            PlanError: the mask is damaged, or of another network.
            VerificationError: the small network is not equal to the zeroed one.
        """
        if (model is None) != (mask is None):
            raise ArgumentError(
                "convert() takes a model with the file of its mask, or neither; one of them is missing."
            )
        if model is not None and mask is not None:
            check_kind("model", model, nn.Module, "a torch.nn.Module")
            inputs = self._example(model) if args is None and kwargs is None else () if args is None else args
            plan = plan_from_unipruning_mask(analyze(trace(model, inputs, kwargs)), mask)
            return shrink_planned(model, plan, inputs, kwargs)
        self._applied()
        if self.session is None:
            raise ArgumentError("prune_flag=0: nothing was zeroed, and there is nothing to convert.")
        return self.session.finish()


class ZeroingCallback:
    """Callback of a `UniPruner`: hooks for the training loop.

    They are `on_train_begin`, for each epoch `on_epoch_begin(epoch)` and `on_epoch_end`, then `on_train_end`. Those of
    steps are of `pruner.session`, and may be left away.

    Args:
        pruner: the pruner, which was applied.
    """

    def __init__(self, pruner: UniPruner) -> None:
        check_kind("pruner", pruner, UniPruner, "a UniPruner that was applied")
        self._pruner, self._session = pruner, pruner.session
        self._next = 0

    def on_train_begin(self) -> None:
        """Begin, or go on after `resume`.

        Raises:
            ArgumentError: it came out of order.
        """
        if self._session is not None:
            self._session.on_train_begin()

    def on_epoch_begin(self, epoch: int) -> None:
        """Begin an epoch; every `frequency` epochs channels are zeroed, and the files written.

        Args:
            epoch: its number, from 0.

        Raises:
            ArgumentError: it came out of order.
            OutputError: a file cannot be written.
        """
        if self._session is None:
            return
        before = len(self._session.history.renewals)
        self._session.on_epoch_begin(epoch)
        self._next = epoch + 1
        if len(self._session.history.renewals) > before:
            self._pruner.write(epoch)

    def on_epoch_end(self) -> None:
        """End an epoch.

        Raises:
            ArgumentError: it came out of order.
        """
        if self._session is not None:
            self._session.on_epoch_end()

    def on_train_end(self) -> None:
        """End the training; a search that is due comes now, and the files are written once more.

        Raises:
            ArgumentError: it came out of order.
            OutputError: a file cannot be written.
        """
        if self._session is not None:
            self._session.on_train_end()
            self._pruner.write(self._next)


def _rank() -> int:
    """Number of this process in a distributed training; 0 where there is none."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _check_optimizer(optimizer: object, model: nn.Module) -> None:
    """Raise ArgumentError for what is no optimizer of a model."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(f"optimizer is {type(optimizer).__name__}; expected a torch.optim.Optimizer, or None.")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise ArgumentError("optimizer= holds none of the model's parameters; make it of model.parameters().")
