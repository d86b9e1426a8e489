"""NNI's ADMM pruner."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count, check_one_of
from torchshear.compat.nni._first_call import example_inputs
from torchshear.compat.nni._in_place import InPlace, TrainingData
from torchshear.compat.nni._keywords import refuse_unknown
from torchshear.compat.nni._training_config import ALGORITHMS, read_training_config, training_config, value_of_all
from torchshear.compat.nni._training_pruner import TrainingPruner
from torchshear.compat.nni._user_training import Trainer, call_trainer, check_function, check_optimizer
from torchshear.configs import ConfigList
from torchshear.configs._values import Reader
from torchshear.errors import ArgumentError
from torchshear.graph.model._checks import check_module
from torchshear.pruners.regularizers import ADMM
from torchshear.pruners.schedules import OneShot
from torchshear.training._session import PruningSession

_BASES: Final = ("level", "l1", "l2", "fpgm")
_GRANULARITIES: Final = {"fine-grained": "level", "coarse-grained": "l2"}
_ARGUMENTS: Final = (
    "model, config_list, trainer, num_iterations (or iterations), epochs_per_iteration (or training_epochs), row (or "
    "rho), base_algo (or granularity), criterion, optimizer, args, kwargs, dummy_input"
)


def _positive(place: str, value: Any) -> float:
    """A positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ArgumentError(f"{place}={value!r:.60}; expected a positive number.")
    return float(value)


_FURTHER: Final[Mapping[str, Reader]] = {"rho": _positive}


class ADMMPruner(TrainingPruner):
    """Pulls weights towards the nearest ones that lack what is to go, in a training that it carries out; then prunes.

    `compress` calls `trainer` for `num_iterations` times `epochs_per_iteration` epochs, with the penalty

        row / 2 * ||W - Z + U||^2,    at first Z = W, U = 0; after each iteration Z <- nearest of W + U, U <- U + W - Z

    see `torchshear.regularizers.ADMM`; its gradients are added to those of the loss between backward and the
    optimizer's step, by `callback` if the trainer calls it, else by itself. At the end what `base_algo` ranks least
    goes. It works on the very model that is given; train it on with an optimizer of your own, its masks stay.

    Args:
        model: the model.
        config_list: entries of NNI.
        trainer: called with the model and of `optimizer`, `criterion`, `epoch` and `callback` those that it names;
            trains one epoch with that optimizer.
        num_iterations: projections.
        epochs_per_iteration: epochs from one projection to the next; 5 if not given.
        row: weight of the penalty; 1e-4 if not given.
        base_algo: by what units are ranked in the end: "level" (single weights), "l1", "l2" or "fpgm".
        criterion: the loss that `trainer` is given; the cross entropy if not given.
        optimizer: an optimizer of the model; if not given, Adam with lr=1e-3 and weight_decay=5e-5.
        training_epochs: the word of other versions for `epochs_per_iteration`.
        iterations: likewise for `num_iterations`.
        rho: likewise for `row`; also a key of the entries.
        granularity: likewise for `base_algo`: "fine-grained" for "level", "coarse-grained" for "l2".
        args: example positional arguments. Without any, those of the model's first call are taken.
        kwargs: example keyword arguments.
        dummy_input: NNI's word for the former.
        **unknown: none; words of NNI that have no meaning here are answered.

    Raises:
        ArgumentError: an argument is outside what is accepted, or two say the same; the config is wrong.

    Reference: Zhang et al., ECCV 2018, arXiv:1804.03294. NNI 2.0 moves weights by `row` beside the optimizer's step,
    whatever its learning rate; here, as in the paper, the penalty is a part of what is minimised.
    """

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        model: nn.Module,
        config_list: ConfigList,
        trainer: Trainer,
        num_iterations: int = 30,
        epochs_per_iteration: int | None = None,
        row: float | None = None,
        base_algo: str = "l1",
        criterion: Callable[..., Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        training_epochs: int | None = None,
        iterations: int | None = None,
        rho: float | None = None,
        granularity: str | None = None,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        dummy_input: Any = None,
        **unknown: object,
    ) -> None:
        refuse_unknown("ADMMPruner", unknown, _ARGUMENTS)
        check_module(model)
        if not callable(trainer):
            raise ArgumentError(f"trainer is {type(trainer).__name__}; expected a function of a model.")
        check_function("criterion", criterion, "an output and a target")
        check_optimizer(optimizer, model)
        if granularity is not None:
            check_one_of("granularity", granularity, tuple(_GRANULARITIES))
            base_algo = _GRANULARITIES[granularity]
        check_one_of("base_algo", base_algo, _BASES)
        algorithm = ALGORITHMS[base_algo]
        entries, words = read_training_config(config_list, algorithm, _FURTHER)
        if isinstance(num_iterations, torch.optim.Optimizer) or callable(num_iterations):
            raise ArgumentError(
                f"num_iterations is {type(num_iterations).__name__}; expected a whole number. Give optimizer= and "
                f"criterion= by name."
            )
        self._n_iterations = num_iterations if iterations is None else iterations
        check_count("num_iterations", self._n_iterations)
        epochs = _one_of("epochs_per_iteration", epochs_per_iteration, "training_epochs", training_epochs)
        self._n_epochs = 5 if epochs is None else epochs
        check_count("epochs_per_iteration", self._n_epochs)
        weight = _one_of("row", _one_of("row", row, "rho", rho), "rho in the entries", value_of_all(words, "rho"))
        weight = 1e-4 if weight is None else _positive("row", weight)
        self._regularizer = ADMM(rho=weight, every=self._n_epochs, by="epoch", most=max(1.0, weight))
        self._model, self._trainer = model, trainer
        self._criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        if next(model.parameters(), None) is None:
            raise ArgumentError(f"{type(model).__name__} has no parameters; there is nothing to train and to prune.")
        self._optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=5e-5)
        self._has_trained = False
        inputs = example_inputs(args, kwargs, dummy_input)
        data = TrainingData(None, None, None)
        self._config = training_config(entries, algorithm)
        super().__init__(InPlace(model, algorithm, self._make, self._optimizer, inputs, data))

    def _make(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> PruningSession:
        return PruningSession(
            self._model,
            args,
            kwargs,
            schedule=OneShot(at=self._n_iterations * self._n_epochs, by="epoch"),
            config=self._config,
            regularizer=self._regularizer,
            optimizer=self._optimizer,
            **options,
        )

    def compress(self) -> nn.Module:
        """Train, once, and prune at the end.

        Returns:
            The very model that was given, on which masks lie.

        Raises:
            ArgumentError: the config does not fit the model; `trainer` does not call the model, or makes no step with
                the optimizer that it is given.
            CaptureError: torch.export cannot capture the model.
        """
        if self._has_trained:
            return self._model
        way = self._in_place("compress()")
        way.prepare()
        self._has_trained = True
        was_training = self._model.training
        self._model.train()
        given = {"optimizer": self._optimizer, "criterion": self._criterion, "callback": self._announce_step}
        for number in range(self._n_iterations * self._n_epochs):
            way.epoch(number)
            call_trainer(self._trainer, self._model, **given, epoch=number % self._n_epochs)
            assert way.session is not None
            if way.hooks is not None and not way.hooks.n_steps:
                raise ArgumentError(
                    "trainer made no step with the optimizer that it is given, so that the penalty has no effect; "
                    "train with that one, or give yours as optimizer=."
                )
        if way.hooks is not None:
            way.hooks.end()
        self._model.train(was_training)
        return self._model

    def _announce_step(self) -> None:
        """Add the gradients of the penalty, between backward and the optimizer's step."""
        hooks = self._in_place("callback").hooks
        if hooks is not None:
            hooks.before_step()


def _one_of(first: str, value: Any, second: str, other: Any) -> Any:
    """Return the one of two words for the same that is given."""
    if value is not None and other is not None:
        raise ArgumentError(f"{first} and {second} say the same; give one of them.")
    return other if value is None else value
