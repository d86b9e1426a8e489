"""Pruning in iterations on a copy of the model: in each a little more goes, and a function of the user fine-tunes."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from torch import nn

from torchshear._evaluation import score_model
from torchshear._making import PruneResult
from torchshear.compat.nni._first_call import Call, first_call
from torchshear.compat.nni._in_place import TrainingData
from torchshear.compat.nni._training_config import Algorithm, request_options, resolve_for, training_config
from torchshear.compat.nni._user_training import check_function
from torchshear.configs import ResolvedConfig
from torchshear.configs._entry import Entry
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import ArgumentError
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._copy import copy_model
from torchshear.pruners import Ratio
from torchshear.pruners._collecting import collect
from torchshear.pruners._planning import plan_units
from torchshear.pruners.criteria._criterion import declared_needs
from torchshear.pruners.masks import Masks, applied_masks
from torchshear.pruners.schedules import Lottery, Schedule
from torchshear.pruners.selection._request import Request
from torchshear.training import LotteryTicket, prune_in_rounds
from torchshear.training._session import PruningSession
from torchshear.training._snapshot import resolved_config

Indices = npt.NDArray[np.int64]


class Iterations:
    """Iterations of pruning and fine-tuning, made once.

    Args:
        model: the model; it is left as it is.
        entries: what its layers lose in the end.
        algorithm: by what units are ranked.
        schedule: by="event", an event for each iteration.
        inputs: example inputs; None: those with which the fine-tuner or the evaluator first calls a model.
        finetuner: called with the model of each iteration, or None.
        evaluator: called with the model of each iteration, gives a number; or None.
        speedup: whether each iteration really makes the model smaller.
        resets: whether weights are set back to those that were given at each event, and train behind all but the last.
        data: batches for criteria that look at data.
    """

    def __init__(  # noqa: PLR0913 - pieces of one call, each a choice of its own
        self,
        model: nn.Module,
        entries: tuple[Entry, ...],
        algorithm: Algorithm,
        schedule: Schedule,
        inputs: Call | None,
        *,
        finetuner: Callable[[nn.Module], object] | None,
        evaluator: Callable[[nn.Module], float] | None,
        speedup: bool,
        resets: bool,
        data: TrainingData,
    ) -> None:
        check_function("finetuner", finetuner, "a model")
        check_function("evaluator", evaluator, "a model")
        data.check(algorithm)
        assert algorithm.criterion is not None, "each algorithm has one"
        if declared_needs(algorithm.criterion) and data.data is None:
            raise ArgumentError(
                f"{algorithm.criterion!r} looks at data; give batches as data=, and a loss as loss_fn=."
            )
        self._of_weights = algorithm.pattern == "1x1"
        if speedup and self._of_weights:
            raise ArgumentError("speedup=True: single weights make nothing smaller on the way; leave it away.")
        self.model, self._entries, self._algorithm, self._schedule = model, entries, algorithm, schedule
        self._inputs, self._finetuner, self._evaluator = inputs, finetuner, evaluator
        self._speedup, self._resets, self._data = speedup, resets, data
        self._resolved: ResolvedConfig | None = None
        self._result: PruneResult | None = None
        self._masks: Masks | None = None
        self.score: float | None = None

    @property
    def n_iterations(self) -> int:
        """Number of the last iteration."""
        return self._schedule.n_steps

    @property
    def resolved(self) -> ResolvedConfig:
        """The config as it applies to each layer and channel group."""
        self.shrink()
        assert self._resolved is not None, "found before anything is pruned"
        return self._resolved

    def masks(self) -> Masks:
        """Masks of what the last iteration keeps of each parameter of the model that was given."""
        self.shrink()
        assert self._masks is not None, "made with the result"
        return self._masks

    def inputs(self) -> Call:
        """The example inputs."""
        if self._inputs is None:
            run = self._finetuner or self._evaluator
            found = None if run is None else first_call(copy_model(self.model), run)
            if found is None:
                raise ArgumentError(
                    "neither finetuner nor evaluator calls the model that it is given; give example inputs as "
                    "dummy_input= or args=."
                )
            self._inputs = found
        return self._inputs

    def shrink(self) -> PruneResult:
        """Carry the iterations out, once; return the small model of the last one."""
        if self._result is None:
            self._result = self._prune_weights() if self._of_weights else self._prune_channels()
        return self._result

    def _trains(self, position: int) -> bool:
        """Return whether the model is fine-tuned behind an event."""
        if self._resets:
            return position < self.n_iterations
        return position > 0 or not isinstance(self._schedule, Lottery)

    def _prune_channels(self) -> PruneResult:
        args, kwargs = self.inputs()
        groups = analyze(trace(self.model, args, kwargs))
        self._resolved = resolve_for(self.model, self._entries, groups, self._algorithm)
        final, options = request_options(self._resolved, groups, self._algorithm)
        least = options.pop("min_ratio", 0.0)
        schedule, positions = self._schedule, list(self._schedule.events)
        most = max(final.values()) if isinstance(final, Mapping) else final
        shares = [schedule.ratio(position, most) for position in positions]

        def choose(groups: ChannelGroups, share: float, gone: Mapping[str, Indices]) -> PruningPlan:
            position = positions[shares.index(share)]
            ratio: Ratio = share
            if isinstance(final, Mapping):
                ratio = {name: schedule.ratio(position, own) for name, own in final.items()}
            request = Request(ratio=ratio, min_ratio=schedule.ratio(position, least), **options)
            own, statistics = self._data, None
            if own.data is not None:
                statistics = collect(groups, own.data, own.loss_fn, own.batches or 32, False, options["criterion"])
            return plan_units(groups, request, None, statistics, gone=gone)

        coming = iter(positions)

        def fine_tune(model: nn.Module) -> None:
            if self._trains(next(coming)) and self._finetuner is not None:
                self._finetuner(model)

        found = prune_in_rounds(
            self.model,
            args,
            kwargs,
            tasks=shares,
            pruner=choose,
            fine_tune=fine_tune,
            evaluate=self._evaluator,
            shrink=self._speedup,
            reset_weights=self._resets,
        )
        self.score = found.rounds[-1].score
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        kept = found.result.plan.masks().items()
        self._masks = Masks.of({name: mask for name, mask in kept if name in names})
        return found.result

    def _prune_weights(self) -> PruneResult:
        (args, kwargs), own = self.inputs(), copy_model(self.model)
        config = training_config(self._entries, self._algorithm)
        if self._resets:
            ticket = LotteryTicket(own, args, kwargs, rounds=self.n_iterations, config=config)
            session, begin = ticket.session, ticket.begin_round
        else:
            session = PruningSession(own, args, kwargs, schedule=self._schedule, config=config)
            begin = session.on_event
        self._resolved = resolved_config(session)
        for position in self._schedule.events:
            begin()
            if self._trains(position) and self._finetuner is not None:
                self._finetuner(own)
            if self._evaluator is not None:
                self.score = score_model(self._evaluator, own, f"the model of iteration {position}")
        self._masks = applied_masks(own)
        session.on_train_begin()
        session.on_train_end()
        return session.finish()
