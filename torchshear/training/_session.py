"""A session: a model that trains, what is asked of it, a schedule and perhaps a regularizer."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count
from torchshear._making import PruneResult
from torchshear.calibration import Loss
from torchshear.configs import ConfigList
from torchshear.dependency._alignment import Alignment
from torchshear.dependency.groups._analyze import analyze
from torchshear.errors import ArgumentError, first_line
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._process import outside_inference_mode
from torchshear.options import CalibrationOptions, Form, LatencyOptions, checked_call
from torchshear.pruners import Criterion, Ratio
from torchshear.pruners.masks._choose import Layers
from torchshear.pruners.masks._patterns import Reduce
from torchshear.pruners.regularizers import Regularizer
from torchshear.pruners.schedules import History, Schedule
from torchshear.speedup.latency import Device, LatencyTable
from torchshear.training._finishing import make_result
from torchshear.training._making import Asked, check_settings, make_goal
from torchshear.training._masked_model import MaskedModel, check_computed, check_optimizer, check_unmasked
from torchshear.training._order import HookOrder
from torchshear.training._penalty import TrainingPenalty, as_scale
from torchshear.training._progress import Progress
from torchshear.training._recorder import Recorder, Writer, check_writer, loss_as_number
from torchshear.training._renewing import MaskRenewer, check_needs
from torchshear.training._shrinking import Shrinker, check_shrinking
from torchshear.training._state import check_header, with_header
from torchshear.training._training_config import TrainingConfig


class PruningSession:
    """Prunes a model while it trains: hooks of the user's loop tell it where training is.

    The model is changed in place: from now on masks lie on all parameters of which something may go, as
    parametrizations. Parameters are the same objects as before, so that optimizers go on. Masks are renewed at the
    events of the schedule. `finish` gives the small model, and leaves this one as it is.

    Hooks, in this order: `on_train_begin`; for each epoch `on_epoch_begin(epoch)`, then for each batch
    `on_step_begin(step)`, `on_before_optimizer_step` (between backward and the optimizer's step),
    `on_after_optimizer_step` and `on_step_end`, then `on_epoch_end`; `on_train_end`. Where gradients of several batches
    are gathered, the two hooks at the optimizer come in the last of them. One step is one step of the optimizer.

    Args:
        model: the model, without masks or other parametrizations.
        args: example positional arguments; a tensor counts as one argument.
        kwargs: example keyword arguments.
        schedule: when something goes, and how much of what is asked for; see `torchshear.schedules`.
        ratio: share that goes in the end, as for `torchshear.plan`; with a pattern a number. 0.5 if nothing is asked.
        target_macs: multiply-accumulate operations that may be left in the end, in place of a ratio. The schedule runs
            over the share that is removed.
        target_params: parameters that may be left in the end, likewise.
        target_latency: time that may be left in the end, as for `torchshear.prune`, by a table that is measured first.
        device: how that is measured, or a table of one; given without such a target, the result is measured by it.
        pattern: units of single weights in place of channels: "1x1", "4x1", "2:4", "channelx1", "1xchannel" or "heads";
            see `torchshear.pruners.masks.choose_masks`. Or "lock", the zeros that there are at the event of `OneShot`.
        config: a config list of NNI or Neural Compressor, or the path of a file of one, in place of a ratio, a target
            and all that says what goes; it may ask for channels, single weights, blocks and N:M together. The shares of
            all entries follow the schedule; see docs/config-lists.md.
        criterion: what scores units; None: what a config says, else "l1". Criteria of gradients ("taylor", "taylor_bn",
            "snip", "snip_momentum", "gradient", "sensitivity") take those of the training, unless `data` is given;
            others that look at data need `data`.
        regularizer: presses units towards zero, see `torchshear.regularizers`. Add `penalty()` to the loss; if that is
            not done, `on_before_optimizer_step` adds its gradients.
        optimizer: the optimizer, by which steps are noticed that no hook announces.
        soft: whether what is masked may come back; below the mask it learns by the gradient of the masked weight.
        progressive: whether blocks of a pattern, or channels of a config, go in four stages from each event on, weights
            of least score first.
        shrink_every: renewals after which a smaller model takes the place of the one that trains, `model`; None: never.
        scope: units that are ranked against one another; see `torchshear.plan`, with a pattern `choose_masks`.
        min_ratio: share that each group or layer loses at least in the end.
        max_ratio: largest share that a group or layer may lose.
        group_reduction: how scores of a group's members become one; this and the next four as for `torchshear.plan`.
        normalize: whether scores are divided by their mean over the group.
        roles: role or roles that may shrink, None for all.
        exclude: patterns of names that stay whole.
        align: widths that the device runs well.
        min_width: the fewest units to keep in a group.
        layers: with a pattern, names of layers, or a mapping to a ratio each; None for all but tables of embeddings.
        reduce: with a pattern, how scores of a unit's weights become one.
        data: batches for criteria that look at data, which are run at each renewal; see `torchshear.collect`.
        loss_fn: called as `loss_fn(output, target)`, for criteria of gradients on `data`.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        writer: takes scalars by `add_scalar(tag, value, step)`, as a `SummaryWriter` of TensorBoard.

    Raises:
        KeywordError: an argument does not exist.
        ArgumentError: an argument is outside what is accepted, or contradicts another; the criterion needs data; the
            optimizer is of another model.
        CaptureError: torch.export cannot capture the model.
        PlanError: the ratio or target cannot be reached.
        MaskError: masks lie on the model already, or a weight is computed; the pattern fits no layer.
    """

    @checked_call
    @outside_inference_mode()
    def __init__(  # noqa: PLR0913 - independent options, given by name
        self,
        model: nn.Module,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        schedule: Schedule,
        ratio: Ratio | None = None,
        target_macs: float | None = None,
        target_params: float | None = None,
        target_latency: float | str | None = None,
        device: Device | LatencyTable | None = None,
        pattern: str | None = None,
        config: ConfigList | TrainingConfig | None = None,
        criterion: str | Criterion | None = None,
        regularizer: Regularizer | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        soft: bool = False,
        progressive: bool = False,
        shrink_every: int | None = None,
        scope: str = "auto",
        min_ratio: Ratio = 0.0,
        max_ratio: Ratio | None = None,
        group_reduction: str = "sum",
        normalize: str = "auto",
        roles: str | Collection[str] | None = None,
        exclude: str | Collection[str] = (),
        align: int | str | Alignment | None = None,
        min_width: int = 1,
        layers: Layers = None,
        reduce: Reduce | None = None,
        data: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        batches: int | None = None,
        writer: Writer | None = None,
    ) -> None:
        check_settings(schedule, regularizer, soft, progressive)
        check_writer(writer)
        asked = Asked(
            schedule=schedule,
            criterion=criterion,
            ratio=ratio,
            target_macs=target_macs,
            target_params=target_params,
            target_latency=target_latency,
            measuring=LatencyOptions.parse(target_latency, device, False),
            pattern=pattern,
            config=config,
            soft=soft,
            progressive=progressive,
            scope=scope,
            min_ratio=min_ratio,
            max_ratio=max_ratio,
            group_reduction=group_reduction,
            normalize=normalize,
            roles=roles,
            exclude=exclude,
            align=align,
            min_width=min_width,
            layers=layers,
            reduce=reduce,
        )
        check_shrinking(shrink_every, schedule, asked.single_weights, soft, optimizer)
        calibration = CalibrationOptions.parse(data, loss_fn, batches, "none")
        check_unmasked(model)
        self._inputs, self._measuring = (args, kwargs), asked.measuring
        groups = analyze(trace(model, args, kwargs))
        check_computed(groups)
        goal = make_goal(model, groups, asked, (args, kwargs))
        schedule.ratio(schedule.start, goal.target)  # refuses an initial ratio above it
        check_needs(goal, schedule, asked.criteria, calibration, regularizer)
        check_optimizer(optimizer, groups, goal.names)
        self._masked = MaskedModel(model, groups, goal.names, soft)
        self._renewer = MaskRenewer(goal, schedule, self._masked, asked.criteria, calibration, soft)
        self._regularizer, self._optimizer = regularizer, optimizer
        self._shrinker = Shrinker(shrink_every, optimizer, self._masked, self._renewer)
        self._penalty: TrainingPenalty | None = None
        self._saved_penalty: Mapping[str, Any] | None = None
        self._order, self._recorder = HookOrder(), Recorder(goal.target, goal.unit, writer)
        self._progress = Progress(self._renewer, self._shrinker, self._recorder)
        self._handle: Any = None

    @property
    def model(self) -> nn.Module:
        """The model to train: the one that was given, or with `shrink_every` the smaller one that took its place."""
        return self._masked.model

    @property
    def history(self) -> History:
        """Shares that were asked for and reached so far, losses, penalties and widths."""
        return self._recorder.history(self._renewer.shortfall() if self._order.place == "ended" else "")

    def __str__(self) -> str:
        """A line for people: where the training is, and how much is gone."""
        return f"step {self._progress.n_steps}, epoch {max(self._progress.epoch, 0)}: {self.history}"

    def __repr__(self) -> str:
        return f"<PruningSession of {type(self._masked.model).__name__}, {self}>"

    def penalty(self) -> Tensor:
        """Return the regularizer's penalty on the weights as they are, to be added to the loss; 0 without one.

        Raises:
            ArgumentError: it is called outside of a step.
            DataError: it is NaN or infinite.
        """
        if self._order.place != "step":
            raise ArgumentError("penalty() is for the loss of a step; call it behind on_step_begin(step).")
        if self._penalty is None:
            return next(iter(self._masked.parameters.values())).new_zeros(())
        return self._penalty.value(self._progress.n_steps)

    def on_train_begin(self) -> None:
        """Begin a training, or go on with one after `load_state_dict`.

        Raises:
            ArgumentError: it came out of order; the regularizer finds nothing to press.
            MaskError: the model has changed its structure.
        """
        self._order.come("on_train_begin")
        self._masked.check_structure()
        if self._optimizer is not None:
            self._handle = self._optimizer.register_step_pre_hook(lambda *_: self._order.check_optimizer_step())
        if self._regularizer is not None and self._penalty is None:
            bound = self._regularizer.bind(self._renewer.regularized(self._regularizer))
            if self._saved_penalty is not None:
                bound.load_state_dict(self._saved_penalty)
            self._penalty = TrainingPenalty(bound, self._masked)

    def on_epoch_begin(self, epoch: int) -> None:
        """Begin an epoch.

        Args:
            epoch: its number, from 0.

        Raises:
            ArgumentError: it came out of order, or `epoch` is no whole number.
        """
        check_count("epoch", epoch, 0)
        self._order.come("on_epoch_begin")
        self._progress.begin_epoch(int(epoch))

    def on_step_begin(self, step: int | None = None) -> None:
        """Begin a batch; at an event of the schedule masks are renewed.

        Args:
            step: number of the batch, which has no effect: steps are counted by those of the optimizer.

        Raises:
            ArgumentError: it came out of order; the criterion is made of gradients, and there are none; `step` is no
                whole number.
            MaskError: the model has changed its structure.
            WeightError: weights are NaN or infinite.
        """
        if step is not None:
            check_count("step", step, 0)
        self._order.come("on_step_begin")
        if self._penalty is not None:
            self._penalty.begin_step()
        self._progress.begin_step()

    def on_before_optimizer_step(self, grad_scale: float | None = None) -> None:
        """Read the gradients of the step, and add those of the penalty if the loss did not hold it.

        Args:
            grad_scale: scale of a gradient scaler that has not undone it yet. A step whose gradients are not finite is
                then left out, as the scaler leaves it out.

        Raises:
            ArgumentError: it came out of order, or the scale is no positive number.
            DataError: a gradient or the penalty is NaN or infinite.
        """
        scale = as_scale(grad_scale)
        self._order.come("on_before_optimizer_step")
        if self._penalty is not None:
            self._penalty.add_gradients(self._progress.n_steps, scale)
        self._renewer.count_gradients(grad_scale)

    def on_after_optimizer_step(self) -> None:
        """Count a step of the optimizer.

        Raises:
            ArgumentError: it came out of order.
        """
        self._order.come("on_after_optimizer_step")
        if self._penalty is not None:
            self._recorder.settled(self._penalty.after_step(self._progress.n_steps))
        self._progress.n_steps += 1

    def on_step_end(self, loss: float | Tensor | None = None) -> None:
        """End a batch.

        Args:
            loss: the loss of the batch, for the history; None to leave it out.

        Raises:
            ArgumentError: it came out of order, or the loss is no number.
            DataError: the loss is NaN or infinite.
        """
        told = loss_as_number(loss, self._progress.n_steps)
        self._order.come("on_step_end")
        self._recorder.stepped(self._progress.n_steps, told, math.nan if self._penalty is None else self._penalty.last)

    def on_epoch_end(self) -> None:
        """End an epoch.

        Raises:
            ArgumentError: it came out of order.
        """
        self._order.come("on_epoch_end")
        if self._penalty is not None:
            self._recorder.settled(self._penalty.after_epoch(self._progress.n_steps))

    def on_event(self) -> None:
        """Say that an event has come, for a schedule by events: the end of a round, as a user sees it.

        Raises:
            ArgumentError: it came out of order, or the schedule is by steps or epochs.
        """
        by = self._renewer.schedule.by
        if by != "event":
            raise ArgumentError(f"on_event() came, and the schedule is by {by}; give by='event'.")
        self._order.come("on_event")
        self._progress.come_to_event()

    def on_train_end(self) -> None:
        """End the training; an event that is due right behind the last step or epoch comes now.

        Raises:
            ArgumentError: it came out of order.
        """
        self._order.come("on_train_end")
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._progress.end()

    @outside_inference_mode()
    def finish(self, form: Form = "auto") -> PruneResult:
        """Make the small model of the one that was trained, and prove that it is the masked one.

        Args:
            form: form of the result, as for `torchshear.prune`.

        Returns:
            As `torchshear.prune`, with the `history` of the training, which says so if the schedule did not come to its
            end. Masks of single weights are zeros in it; channels and heads that they have ended are removed.

        Raises:
            ArgumentError: it came before `on_train_end`.
            MaskError: the model has changed its structure.
            VerificationError: the small model is not equal to the masked one; nothing is returned then.
        """
        self._order.come("finish")
        n_steps = self._progress.n_steps
        return make_result(self._masked, self._renewer, self._inputs, form, n_steps, self.history, self._measuring)

    def _asked(self) -> dict[str, Any]:
        """Return the settings, as plain data."""
        return self._renewer.describe() | {"regularizer": repr(self._regularizer), "shrink_every": self._shrinker.every}

    def state_dict(self) -> dict[str, Any]:
        """Return what the session needs to go on, beside model and optimizer: tensors, numbers and texts.

        Raises:
            ArgumentError: it is called between the hooks before and after a step of the optimizer.
        """
        if self._order.is_in_step:
            raise ArgumentError(
                "state_dict() came between on_before_optimizer_step() and on_after_optimizer_step(), when half of a "
                "step is counted; call it before or behind them."
            )
        state = self._progress.state_dict() | {
            "penalty": {} if self._penalty is None else self._penalty.penalty.state_dict(),
        }
        return with_header(self._asked(), self._renewer.goal.groups.graph.fingerprint, state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another session with the same settings was; model and optimizer have states of their own.

        Args:
            state: what `state_dict` gave.

        Raises:
            ArgumentError: it is none, is of another network or of a session with other settings, or is damaged; or
                training has begun already.
        """
        if self._order.place != "made":
            raise ArgumentError("load_state_dict() came after on_train_begin(); make a new session, and load it there.")
        check_header(state, self._asked(), self._renewer.goal.groups.graph.fingerprint)
        try:
            self._progress.load_state_dict(state)
            self._saved_penalty = dict(state["penalty"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ArgumentError(f"the state is damaged: {first_line(error)}; load another.") from error
