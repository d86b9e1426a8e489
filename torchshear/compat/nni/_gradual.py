"""NNI's pruners that take more and more while a model trains: AGP and linear."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count, check_flag
from torchshear.calibration import Loss
from torchshear.compat.nni._first_call import example_inputs
from torchshear.compat.nni._in_place import InPlace, TrainingData
from torchshear.compat.nni._iterations import Iterations
from torchshear.compat.nni._keywords import refuse_beside, refuse_unknown
from torchshear.compat.nni._training_config import find_algorithm, read_training_config, training_config
from torchshear.compat.nni._training_pruner import TrainingPruner
from torchshear.compat.nni._user_training import Trainer, call_trainer, check_function, check_optimizer
from torchshear.configs import ConfigList
from torchshear.configs._values import Reader, fraction, integer
from torchshear.errors import ArgumentError
from torchshear.graph.model._checks import check_module
from torchshear.pruners.schedules import AGP, Linear, Schedule
from torchshear.pruners.schedules._several import Several
from torchshear.training._session import PruningSession

_TIMING: Final[Mapping[str, Reader]] = {
    "initial_sparsity": fraction,
    "start_epoch": integer(0),
    "end_epoch": integer(1),
    "frequency": integer(1),
}
_ARGUMENTS: Final = (
    "model, config_list, optimizer, trainer, criterion, num_iterations, epochs_per_iteration, pruning_algorithm, "
    "total_iteration, finetuner, evaluator, speedup, args, kwargs, dummy_input, data, loss_fn, batches"
)


class GradualPruner(TrainingPruner):
    """Takes more and more of a model while it trains; see `AGPPruner` and `LinearPruner`."""

    curve: ClassVar[type[Schedule]]

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: torch.optim.Optimizer | None = None,
        trainer: Trainer | None = None,
        criterion: Callable[..., Any] | None = None,
        num_iterations: int = 10,
        epochs_per_iteration: int = 1,
        pruning_algorithm: str = "level",
        *,
        total_iteration: int | None = None,
        finetuner: Callable[[nn.Module], object] | None = None,
        evaluator: Callable[[nn.Module], float] | None = None,
        speedup: bool = False,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        dummy_input: Any = None,
        data: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        batches: int | None = None,
        **unknown: object,
    ) -> None:
        refuse_unknown(type(self).__name__, unknown, _ARGUMENTS)
        check_module(model)
        check_optimizer(optimizer, model)
        check_function("trainer", trainer, "a model, its optimizer, a criterion and an epoch")
        check_function("criterion", criterion, "an output and a target")
        check_flag("speedup", speedup)
        check_count("num_iterations", num_iterations)
        check_count("epochs_per_iteration", epochs_per_iteration)
        algorithm = find_algorithm("pruning_algorithm", pruning_algorithm)
        self._model, self._config_list, self._inputs = model, config_list, example_inputs(args, kwargs, dummy_input)
        self._optimizer, self._trainer, self._criterion = optimizer, trainer, criterion
        own_data = TrainingData(data, loss_fn, batches)
        self._has_trained = False
        iterating = {"finetuner": finetuner, "evaluator": evaluator, "speedup": speedup or None}
        if total_iteration is not None:
            check_count("total_iteration", total_iteration)
            refuse_beside("total_iteration=", {"optimizer": optimizer, "trainer": trainer, "criterion": criterion})
            entries, _ = read_training_config(config_list, algorithm, {})
            schedule = self.curve(end=total_iteration, by="event")
            options: dict[str, Any] = {"finetuner": finetuner, "evaluator": evaluator, "speedup": speedup}
            iterations = Iterations(
                model, entries, algorithm, schedule, self._inputs, resets=False, data=own_data, **options
            )
            super().__init__(iterations)
            return
        refuse_beside("a model that trains, without total_iteration,", iterating)
        entries, words = read_training_config(config_list, algorithm, _TIMING, "final_sparsity")
        n_epochs = num_iterations * epochs_per_iteration
        timings = {
            label: {"end_epoch": n_epochs, "frequency": epochs_per_iteration, **own} for label, own in words.items()
        }
        schedules = {label: self._by_epochs(label, own) for label, own in timings.items()}
        self._n_epochs = max((int(own["end_epoch"]) for own in timings.values()), default=n_epochs)
        self._schedule = Several(schedules.values() or [self.curve(end=n_epochs, by="epoch")])
        self._config = training_config(entries, algorithm, schedules)
        super().__init__(InPlace(model, algorithm, self._make, optimizer, self._inputs, own_data))

    def _by_epochs(self, label: str, timing: Mapping[str, Any]) -> Schedule:
        """The schedule of an entry; NNI prunes before `end_epoch`, and a schedule here up to its end."""
        start, end = timing.get("start_epoch", 0), timing["end_epoch"]
        if end <= start:
            raise ArgumentError(f"{label}: end_epoch={end} and start_epoch={start}; expected an end behind the start.")
        initial = timing.get("initial_sparsity", 0.0)
        return self.curve(start=start, end=end - 1, frequency=timing["frequency"], initial=initial, by="epoch")

    def _make(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> PruningSession:
        return PruningSession(
            self._model,
            args,
            kwargs,
            schedule=self._schedule,
            config=self._config,
            optimizer=self._optimizer,
            **options,
        )

    def compress(self) -> nn.Module:
        """Begin; with `trainer` train all epochs, with `total_iteration` carry all iterations out.

        Returns:
            The very model that was given, on which masks lie from its first call on; with `total_iteration` the small
            model of the last iteration.

        Raises:
            ArgumentError: the config does not fit the model; `trainer` does not call the model.
            CaptureError: torch.export cannot capture the model.
        """
        way = self._way
        if isinstance(way, Iterations):
            return way.shrink().model
        way.prepare()
        if self._trainer is not None and not self._has_trained:
            self._has_trained = True
            was_training = self._model.training
            self._model.train()
            for epoch in range(self._n_epochs):
                way.epoch(epoch)
                call_trainer(
                    self._trainer, self._model, optimizer=self._optimizer, criterion=self._criterion, epoch=epoch
                )
            assert way.session is not None
            self._model.train(was_training)
        return self._model

    def update_epoch(self, epoch: int) -> None:
        """Say that an epoch begins: masks are renewed if the schedule says so.

        Args:
            epoch: its number, from 0.

        Raises:
            ArgumentError: it is no whole number; the pruner works in iterations.
        """
        self._in_place("update_epoch()").epoch(epoch)

    def get_best_result(self) -> tuple[int, nn.Module, dict[str, Tensor], float | None, ConfigList]:
        """Return the last iteration, whose model is the smallest.

        Returns:
            Its number; its small model; what it keeps of each parameter of the model that was given; the evaluator's
            number of it, or None; and the config list.

        Raises:
            ArgumentError: the pruner works on a model that trains.
        """
        return best_of(self._way, self._config_list)


class AGPPruner(GradualPruner):
    """Automated gradual pruning: most goes early, s + (s0 - s) (1 - t)^3 at the share t of the way.

    In the form of NNI 2.0 the user trains, and says at each epoch `update_epoch(epoch)`; entries have
    `initial_sparsity`, `final_sparsity`, `start_epoch`, `end_epoch` and `frequency`. From 2.3 on `compress` calls
    `trainer`, `num_iterations` times `epochs_per_iteration` epochs. In both it works on the very model that is given,
    whose parameters stay the same objects. From 2.5 on, with `total_iteration`, it works on a copy: `compress` prunes
    and calls `finetuner` for iterations 0 to `total_iteration`, and `get_best_result` gives the last one.

    Channels go with all that belongs to them, in all layers that are coupled, and what went stays away.

    Args:
        model: the model.
        config_list: entries of NNI.
        optimizer: trains the model; by its steps the gradients for "taylorfo" are read.
        trainer: called with the model and of `optimizer`, `criterion` and `epoch` those that it names.
        criterion: the loss that `trainer` is given.
        num_iterations: renewals of the masks.
        epochs_per_iteration: epochs from one renewal to the next.
        pruning_algorithm: "level" (single weights), "l1", "l2", "fpgm", "slim", "taylorfo", "apoz" or
            "mean_activation".
        total_iteration: the last iteration, for iterations on a copy.
        finetuner: called with the model of each iteration.
        evaluator: called with the model of each iteration, gives a number.
        speedup: whether each iteration makes the model smaller, so that fine-tuning is faster.
        args: example positional arguments. Without any, those of the model's first call are taken, and masks lie on it
            from then on.
        kwargs: example keyword arguments.
        dummy_input: NNI's word for the former.
        data: batches for "apoz", "mean_activation" and "taylorfo"; without any the latest batch of the training stands
            for the first two, and the gradients of the training for the third.
        loss_fn: called as `loss_fn(output, target)`, for "taylorfo" on `data`.
        batches: how many batches to run; None: the first 32, or all where there are fewer.
        **unknown: none; words of NNI that have no meaning here are answered.

    Raises:
        ArgumentError: an argument is outside what is accepted, or goes with another form; the config is wrong.

    Reference: Zhu and Gupta, 2017, arXiv:1710.01878.
    """

    curve: ClassVar[type[Schedule]] = AGP


class LinearPruner(GradualPruner):
    """Takes equal parts: s0 + (s - s0) t at the share t of the way. Forms and arguments are those of `AGPPruner`."""

    curve: ClassVar[type[Schedule]] = Linear


def best_of(
    way: InPlace | Iterations, config_list: ConfigList
) -> tuple[int, nn.Module, dict[str, Tensor], float | None, ConfigList]:
    """Return the last iteration as NNI returns the best one.

    Raises:
        ArgumentError: there are no iterations.
    """
    if isinstance(way, InPlace):
        raise ArgumentError("get_best_result() goes with total_iteration=; of a model that trains take shrink().")
    result = way.shrink()
    return way.n_iterations, result.model, dict(way.masks().tensors), way.score, config_list
