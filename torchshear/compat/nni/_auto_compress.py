"""NNI's AutoCompress pruner."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count, check_number
from torchshear._making import PruneResult
from torchshear.compat.nni._keywords import refuse_unknown
from torchshear.compat.nni._searching import SearchingPruner
from torchshear.compat.nni._user_training import Trainer, TrainingHooks, call_trainer, check_function
from torchshear.configs import ConfigList
from torchshear.dependency.groups._analyze import analyze
from torchshear.errors import ArgumentError
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._copy import copy_model
from torchshear.pruners.regularizers import ADMM
from torchshear.pruners.schedules import OneShot
from torchshear.report import make_report
from torchshear.searching import Annealing, SearchResult
from torchshear.training._session import PruningSession

_ARGUMENTS: Final = (
    "model, config_list, trainer, evaluator, dummy_input, num_iterations (or total_iteration), optimize_mode, "
    "base_algo, start_temperature, stop_temperature, cool_down_rate, perturbation_magnitude, admm_num_iterations, "
    "admm_epochs_per_iteration (or admm_training_epochs), row, criterion, make_optimizer, args, kwargs, options"
)


class AutoCompressPruner(SearchingPruner):
    """Alternates: annealing finds the share of each group, ADMM trains towards it, and the model really shrinks.

    Of a target P in N rounds, round i leaves (1 - P)^(i / N) of the channels that the config selects. In each round

    1. simulated annealing looks for the shares, see `torchshear.searching.Annealing`;
    2. `trainer` trains with a pull towards weights that lack them, see `torchshear.regularizers.ADMM`;
    3. what weighs least in the end goes for real, proved to be what the trained model computes without it.

    The model that is given is left as it is. NNI selects convolutions alone whatever the config says, takes no `row`
    over into its penalty, and hands back a model without plan or proof; here `shrink()` has both, for the original.

    Args:
        model: the model.
        config_list: entries of NNI; where they ask for different shares, their mean by channels counts.
        trainer: called with the model and of `optimizer`, `criterion`, `epoch` and `callback` those that it names;
            trains one epoch with that optimizer.
        evaluator: called with a candidate of the annealing; gives a number.
        dummy_input: example inputs; NNI's word for `args` and `kwargs`.
        num_iterations: number of rounds.
        optimize_mode: "maximize" or "minimize" the number.
        base_algo: how channels are ranked: "l1", "l2" or "fpgm".
        start_temperature: temperature at the beginning of an annealing.
        stop_temperature: temperature at its end.
        cool_down_rate: factor of each accepted move.
        perturbation_magnitude: largest change of a share in the first move.
        admm_num_iterations: projections in a round.
        admm_epochs_per_iteration: epochs from one projection to the next.
        row: weight of the penalty.
        total_iteration: the word of other versions for `num_iterations`.
        admm_training_epochs: likewise for `admm_epochs_per_iteration`.
        criterion: the loss that `trainer` is given; the cross entropy if not given.
        make_optimizer: called with the parameters of each round's model, which are new ones; gives an optimizer. If not
            given, Adam with lr=1e-3 and weight_decay=5e-5.
        args: example positional arguments. Without any, `evaluator` is called once with a copy of the model, and what
            it calls that with is taken.
        kwargs: example keyword arguments.
        options: further keywords of `torchshear.search`, for each annealing.
        **unknown: none; words of NNI that have no meaning here are answered.

    Raises:
        ArgumentError: an argument is outside what is accepted, or two say the same.

    Reference: Liu et al., AutoCompress, AAAI 2020, arXiv:1907.03141.
    """

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        model: nn.Module,
        config_list: ConfigList,
        trainer: Trainer,
        evaluator: Callable[..., float],
        dummy_input: Any = None,
        num_iterations: int = 3,
        optimize_mode: str = "maximize",
        base_algo: str = "l1",
        start_temperature: float = 100.0,
        stop_temperature: float = 20.0,
        cool_down_rate: float = 0.9,
        perturbation_magnitude: float = 0.35,
        admm_num_iterations: int = 30,
        admm_epochs_per_iteration: int = 5,
        row: float = 1e-4,
        *,
        total_iteration: int | None = None,
        admm_training_epochs: int | None = None,
        criterion: Callable[..., Any] | None = None,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **unknown: object,
    ) -> None:
        refuse_unknown("AutoCompressPruner", unknown, _ARGUMENTS)
        if not callable(trainer):
            raise ArgumentError(f"trainer is {type(trainer).__name__}; expected a function of a model.")
        check_function("criterion", criterion, "an output and a target")
        check_function("make_optimizer", make_optimizer, "parameters")
        self._n_rounds = num_iterations if total_iteration is None else total_iteration
        check_count("num_iterations", self._n_rounds)
        self._n_projections = admm_num_iterations
        check_count("admm_num_iterations", self._n_projections)
        self._n_epochs = admm_epochs_per_iteration if admm_training_epochs is None else admm_training_epochs
        check_count("admm_epochs_per_iteration", self._n_epochs)
        check_number("row", row)
        self._penalty = ADMM(rho=row, every=self._n_epochs, by="epoch", most=max(1.0, row))
        self._trainer = trainer
        self._criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self._make_optimizer = make_optimizer
        self._made: PruneResult | None = None
        self._searches: list[SearchResult] = []
        super().__init__(
            model,
            config_list,
            evaluator,
            optimize_mode,
            base_algo,
            method=Annealing(
                start=start_temperature,
                stop=stop_temperature,
                cooling=cool_down_rate,
                perturbation=perturbation_magnitude,
            ),
            args=args,
            kwargs=kwargs,
            dummy_input=dummy_input,
            options=options,
        )

    def compress(self) -> nn.Module:
        """Go through all rounds, once; return the model of the last one, smaller for real.

        Raises:
            TorchshearError: as `torchshear.search` and `torchshear.PruningSession`.
        """
        if self._made is not None:
            return self._made.model
        args, kwargs = self._example()
        model, plan, searches = self._model, None, list[SearchResult]()
        groups = analyze(trace(model, args, kwargs))
        ratios = self._ratios(model, groups)
        total = sum(groups[name].width for name in ratios)
        share = sum(groups[name].width * ratio for name, ratio in ratios.items()) / total
        for number in range(1, self._n_rounds + 1):
            now = analyze(trace(model, args, kwargs))
            chosen = self._ratios(model, now)
            left = sum(now[name].width for name in chosen)
            target = total * (1 - share) ** (number / self._n_rounds)
            searches.append(self._search(model, now, chosen, ratio=1 - target / left))
            cut = searches[-1].result.plan
            lost = {one.name: 1 - len(one.kept) / now[one.name].width for one in cut.groups}
            result = self._train(model, {name: ratio for name, ratio in lost.items() if ratio})
            model, plan = result.model, result.plan if plan is None else plan.then(result.plan)
        assert plan is not None, "there is a round"
        self._searches = searches
        self._made = replace(result, plan=plan, report=make_report(plan, result.report.form))
        return self._made.model

    def _train(self, model: nn.Module, lost: Mapping[str, float]) -> PruneResult:
        """Train a copy of a model towards lost shares of its groups, and take them."""
        twin = copy_model(model).train()
        parameters = list(twin.parameters())
        optimizer = (
            torch.optim.Adam(parameters, lr=1e-3, weight_decay=5e-5)
            if self._make_optimizer is None
            else self._make_optimizer(parameters)
        )
        session = PruningSession(
            twin,
            *self._example(),
            ratio=lost,
            criterion=self._base_algo,
            group_reduction="filters",
            schedule=OneShot(at=self._n_projections * self._n_epochs, by="epoch"),
            regularizer=self._penalty,
            optimizer=optimizer,
        )
        hooks = TrainingHooks(session, optimizer)
        given = {"optimizer": optimizer, "criterion": self._criterion, "callback": hooks.before_step}
        for number in range(self._n_projections * self._n_epochs):
            hooks.epoch(number)
            call_trainer(self._trainer, twin, **given, epoch=number % self._n_epochs)
        if not hooks.n_steps:
            raise ArgumentError("trainer made no step with the optimizer that it is given; train with that one.")
        hooks.end()
        return session.finish()

    @property
    def found(self) -> SearchResult:
        """The annealing of the last round."""
        return self.searches[-1]

    @property
    def searches(self) -> tuple[SearchResult, ...]:
        """The annealing of each round; made by the first use or by `compress`."""
        self.compress()
        return tuple(self._searches)

    def shrink(self) -> PruneResult:
        """Return the result of the last round, with a plan for the model that was given.

        Its proof is that of the last round: the small model is what that round trained, with its cut weights zero.
        """
        self.compress()
        assert self._made is not None, "made by compress"
        return self._made
