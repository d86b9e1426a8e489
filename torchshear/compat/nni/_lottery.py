"""NNI's lottery ticket pruner."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count, check_flag
from torchshear.compat.nni._first_call import example_inputs
from torchshear.compat.nni._gradual import best_of
from torchshear.compat.nni._in_place import InPlace, TrainingData
from torchshear.compat.nni._iterations import Iterations
from torchshear.compat.nni._keywords import refuse_beside, refuse_unknown
from torchshear.compat.nni._training_config import find_algorithm, read_training_config, training_config, value_of_all
from torchshear.compat.nni._training_pruner import TrainingPruner
from torchshear.compat.nni._user_training import check_optimizer
from torchshear.configs import ConfigList
from torchshear.configs._values import integer
from torchshear.errors import ArgumentError
from torchshear.graph.model._checks import check_module
from torchshear.pruners.schedules import Lottery
from torchshear.training import LotteryTicket
from torchshear.training._session import PruningSession

_ARGUMENTS: Final = (
    "model, config_list, optimizer, lr_scheduler, reset_weights, pruning_algorithm, total_iteration, finetuner, "
    "evaluator, speedup, reset_weight, args, kwargs, dummy_input"
)


class LotteryTicketPruner(TrainingPruner):
    """Finds the small network that learns from the weights of the start as the dense one does.

    In the form of NNI 2.0 the user trains in rounds 0 to n, n being `prune_iterations` of the config:

        for _ in pruner.get_prune_iterations():
            pruner.prune_iteration_start()
            ...                                 # train

    At the begin of round k the least of what was trained goes, until 1 - (1 - P)^(k / n) is gone; then weights,
    buffers, optimizer and scheduler are set back to the start. It works on the very model that is given. From 2.5 on,
    with `total_iteration`, it works on a copy: `compress` calls `finetuner` and prunes, n times, and the ticket that
    `get_best_result` gives has the weights of the start, to be trained.

    Args:
        model: the model, with the weights of the start.
        config_list: entries of NNI, with `prune_iterations` in the form of NNI 2.0.
        optimizer: trains the model, and is set back.
        lr_scheduler: is set back.
        reset_weights: whether anything is set back; if not, rounds only prune what was trained.
        pruning_algorithm: "level" (single weights), "l1", "l2", "fpgm" or "slim".
        total_iteration: n, for iterations on a copy.
        finetuner: called with the model of each iteration.
        evaluator: called with the model of each iteration, gives a number.
        speedup: whether each iteration makes the model smaller.
        reset_weight: the later word for `reset_weights`.
        args: example positional arguments. Without any, those of the model's first call are taken.
        kwargs: example keyword arguments.
        dummy_input: NNI's word for the former.
        **unknown: none; words of NNI that have no meaning here are answered.

    Raises:
        ArgumentError: an argument is outside what is accepted, or goes with the other form; the config is wrong, or
            entries differ in `prune_iterations`.

    Reference: Frankle and Carbin, ICLR 2019, arXiv:1803.03635.
    """

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
        reset_weights: bool = True,
        pruning_algorithm: str = "level",
        *,
        total_iteration: int | None = None,
        finetuner: Callable[[nn.Module], object] | None = None,
        evaluator: Callable[[nn.Module], float] | None = None,
        speedup: bool = False,
        reset_weight: bool | None = None,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        dummy_input: Any = None,
        **unknown: object,
    ) -> None:
        refuse_unknown("LotteryTicketPruner", unknown, _ARGUMENTS)
        check_module(model)
        check_optimizer(optimizer, model)
        resets = reset_weights if reset_weight is None else reset_weight
        check_flag("reset_weights", resets)
        check_flag("speedup", speedup)
        if lr_scheduler is not None and not callable(getattr(lr_scheduler, "load_state_dict", None)):
            raise ArgumentError(f"lr_scheduler is {type(lr_scheduler).__name__}; expected what can be set back.")
        algorithm = find_algorithm("pruning_algorithm", pruning_algorithm)
        if pruning_algorithm in ("taylorfo", "apoz", "mean_activation"):
            raise ArgumentError(f"pruning_algorithm={pruning_algorithm!r} looks at data; expected one that does not.")
        inputs, no_data = example_inputs(args, kwargs, dummy_input), TrainingData(None, None, None)
        self._model, self._config_list, self._resets = model, config_list, bool(resets)
        self._optimizer, self._scheduler = optimizer, lr_scheduler
        self._ticket: LotteryTicket | None = None
        self._n_begun = 0
        if total_iteration is not None:
            check_count("total_iteration", total_iteration)
            refuse_beside("total_iteration=", {"optimizer": optimizer, "lr_scheduler": lr_scheduler})
            entries, _ = read_training_config(config_list, algorithm, {})
            options: dict[str, Any] = {"finetuner": finetuner, "evaluator": evaluator, "speedup": speedup}
            schedule = Lottery(end=total_iteration)
            iterations = Iterations(
                model, entries, algorithm, schedule, inputs, resets=self._resets, data=no_data, **options
            )
            super().__init__(iterations)
            return
        iterating = {"finetuner": finetuner, "evaluator": evaluator, "speedup": speedup or None}
        refuse_beside("rounds that you train, without total_iteration,", iterating)
        entries, words = read_training_config(config_list, algorithm, {"prune_iterations": integer(1)})
        rounds = value_of_all(words, "prune_iterations")
        if rounds is None:
            raise ArgumentError("config_list says no prune_iterations; expected it in each entry, or total_iteration=.")
        self._n_rounds = int(rounds)
        if self._resets and optimizer is None:
            raise ArgumentError("reset_weights=True sets the optimizer back with the weights; give it as optimizer=.")
        self._config = training_config(entries, algorithm)
        super().__init__(InPlace(model, algorithm, self._make, optimizer, inputs, no_data))

    def _make(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> PruningSession:
        beside = {"optimizer": self._optimizer, "config": self._config, **options}
        if self._resets:
            self._ticket = LotteryTicket(
                self._model, args, kwargs, rounds=self._n_rounds, scheduler=self._scheduler, **beside
            )
            session = self._ticket.session
        else:
            session = PruningSession(self._model, args, kwargs, schedule=Lottery(end=self._n_rounds), **beside)
        if self._n_begun:
            self._begin_round(session)
        return session

    def _begin_round(self, session: PruningSession) -> None:
        session.on_event() if self._ticket is None else self._ticket.begin_round()

    def compress(self) -> nn.Module:
        """Begin; with `total_iteration` carry all iterations out.

        Returns:
            The very model that was given, on which masks lie from its first call on; with `total_iteration` the ticket.

        Raises:
            ArgumentError: the config does not fit the model.
            CaptureError: torch.export cannot capture the model.
        """
        if isinstance(self._way, Iterations):
            return self._way.shrink().model
        self._way.prepare()
        return self._model

    def get_prune_iterations(self) -> range:
        """Return the numbers of the rounds, from 0, the dense one, on.

        Raises:
            ArgumentError: the pruner works in iterations of its own.
        """
        self._in_place("get_prune_iterations()")
        return range(self._n_rounds + 1)

    def prune_iteration_start(self) -> None:
        """Begin a round: choose what goes by the weights as they are, and set back what is left.

        Raises:
            ArgumentError: all rounds have begun, the model was not trained, or the pruner works in iterations.
        """
        way = self._in_place("prune_iteration_start()")
        if self._n_begun > self._n_rounds:
            raise ArgumentError(f"all {self._n_rounds} rounds behind round 0 have begun; call shrink().")
        way.prepare()
        if way.has_begun or self._n_begun:
            self._begin_round(way.session)
        self._n_begun += 1

    def get_best_result(self) -> tuple[int, nn.Module, dict[str, Tensor], float | None, ConfigList]:
        """Return the last iteration, as `AGPPruner.get_best_result` does.

        Raises:
            ArgumentError: the pruner works on a model that trains.
        """
        return best_of(self._way, self._config_list)
