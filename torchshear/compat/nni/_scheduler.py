"""NNI's scheduler of iterations, and the generators that say what each of them takes."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from torchshear._arguments import check_count, check_flag, check_kind
from torchshear.calibration import Loss
from torchshear.compat.nni._first_call import example_inputs
from torchshear.compat.nni._gradual import best_of
from torchshear.compat.nni._in_place import TrainingData
from torchshear.compat.nni._iterations import Iterations
from torchshear.compat.nni._named import LevelPruner
from torchshear.compat.nni._pruner import Pruner
from torchshear.compat.nni._training_config import Algorithm, find_algorithm, read_training_config
from torchshear.compat.nni._training_pruner import TrainingPruner
from torchshear.configs import ConfigList
from torchshear.errors import ArgumentError
from torchshear.graph.model._checks import check_module
from torchshear.pruners.schedules import AGP, Linear, Lottery, Schedule


class TaskGenerator:
    """Shares of the iterations of a `PruningScheduler`; see `AGPTaskGenerator`."""

    curve: ClassVar[type[Schedule]]

    def __init__(
        self,
        total_iteration: int,
        origin_model: nn.Module,
        origin_config_list: ConfigList,
        origin_masks: Mapping[str, Any] | None = None,
        log_dir: str = ".",
        keep_intermediate_result: bool = False,
    ) -> None:
        check_count("total_iteration", total_iteration)
        check_module(origin_model)
        check_kind("log_dir", log_dir, str, "a text, of which nothing is made: no files are written")
        check_flag("keep_intermediate_result", keep_intermediate_result)
        check_kind("origin_masks", {} if origin_masks is None else origin_masks, Mapping, "a mapping without masks")
        if origin_masks:
            raise ArgumentError("origin_masks= is given; expected a model without masks. Make them permanent first.")
        read_training_config(origin_config_list, LevelPruner, {})  # refused at once if nobody can read it
        self.model, self.config_list = origin_model, origin_config_list
        self.schedule = self.curve(end=total_iteration, by="event")


class AGPTaskGenerator(TaskGenerator):
    """Iterations 0 to `total_iteration`, most of what goes early; see `AGPPruner`.

    Args:
        total_iteration: the last iteration.
        origin_model: the model; it is left as it is.
        origin_config_list: entries of NNI.
        origin_masks: none.
        log_dir: without effect.
        keep_intermediate_result: without effect.

    Raises:
        ArgumentError: an argument is outside what is accepted.
    """

    curve: ClassVar[type[Schedule]] = AGP


class LinearTaskGenerator(TaskGenerator):
    """Iterations 0 to `total_iteration` by equal parts. Arguments are those of `AGPTaskGenerator`."""

    curve: ClassVar[type[Schedule]] = Linear


class LotteryTicketTaskGenerator(TaskGenerator):
    """Rounds 0 to `total_iteration` of lottery tickets. Arguments are those of `AGPTaskGenerator`."""

    curve: ClassVar[type[Schedule]] = Lottery


class PruningScheduler(TrainingPruner):
    """Prunes and fine-tunes a copy of a model in iterations, as `AGPPruner` does with `total_iteration`.

    Args:
        pruner: by what units are ranked: a class, as `L1NormPruner`, or a word of `pruning_algorithm`.
        task_generator: the model, and what each iteration takes.
        finetuner: called with the model of each iteration.
        speedup: whether each iteration makes the model smaller.
        dummy_input: example inputs. Without any, `finetuner` or `evaluator` is called up to its first call of a model.
        evaluator: called with the model of each iteration, gives a number.
        reset_weight: whether weights are set back to those of the model at each iteration, before they train.
        args: another word for `dummy_input`.
        kwargs: example keyword arguments.
        data: batches for criteria that look at data.
        loss_fn: called as `loss_fn(output, target)`, for criteria of gradients.
        batches: how many batches to run; None: the first 32, or all where there are fewer.

    Raises:
        ArgumentError: an argument is outside what is accepted, or the config is wrong.
    """

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        pruner: Algorithm | str,
        task_generator: TaskGenerator,
        finetuner: Callable[[nn.Module], object] | None = None,
        speedup: bool = False,
        dummy_input: Any = None,
        evaluator: Callable[[nn.Module], float] | None = None,
        reset_weight: bool = False,
        *,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        data: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        batches: int | None = None,
    ) -> None:
        if not isinstance(pruner, type):
            pruner = find_algorithm("pruner", pruner)
        if not issubclass(pruner, Pruner) or pruner.criterion is None:
            raise ArgumentError(f"pruner is {pruner.__name__}; expected a class that ranks units, as L1NormPruner.")
        check_kind("task_generator", task_generator, TaskGenerator, "one of this package, as AGPTaskGenerator")
        check_flag("reset_weight", reset_weight)
        check_flag("speedup", speedup)
        if reset_weight and pruner.pattern == "1x1" and not isinstance(task_generator.schedule, Lottery):
            raise ArgumentError("reset_weight=True with single weights goes with a LotteryTicketTaskGenerator.")
        entries, _ = read_training_config(task_generator.config_list, pruner, {})
        self._config_list = task_generator.config_list
        super().__init__(
            Iterations(
                task_generator.model,
                entries,
                pruner,
                task_generator.schedule,
                example_inputs(args, kwargs, dummy_input),
                finetuner=finetuner,
                evaluator=evaluator,
                speedup=speedup,
                resets=bool(reset_weight),
                data=TrainingData(data, loss_fn, batches),
            )
        )

    def compress(self) -> nn.Module:
        """Carry the iterations out, once; return the small model of the last one.

        Raises:
            ArgumentError: the config does not fit the model, or nothing calls it.
        """
        return self.shrink().model

    def get_best_result(self) -> tuple[int, nn.Module, dict[str, Tensor], float | None, ConfigList]:
        """Return the last iteration, as `AGPPruner.get_best_result` does."""
        return best_of(self._way, self._config_list)
