"""NNI's slim pruner, which may train before it prunes."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count
from torchshear.compat.nni._first_call import example_inputs, first_call
from torchshear.compat.nni._pruner import Pruner
from torchshear.compat.nni._user_training import Trainer, call_trainer, check_function, check_optimizer
from torchshear.configs import ConfigList
from torchshear.errors import ArgumentError
from torchshear.graph.model._checks import check_module
from torchshear.pruners.regularizers import Regularized, ScaleL1
from torchshear.training._masked_model import MaskedModel
from torchshear.training._penalty import TrainingPenalty


class SlimPruner(Pruner):
    """Removes the channels with the least scales of batch norms, over all selected norms together.

    score of channel c = mean over the norms of its group of |gamma_c|

    so that channels of coupled norms stand beside those of one norm alone. Of all units of the selected layers together
    the share `sparsity` goes; a layer loses 99 % at most. Entries that ask the same share are one pool.

    It says something of models that were trained with a penalty on the scales. With `trainer`, `compress` does that
    first, on the very model that is given, with the penalty

        scale * sum over the selected norms, over channels c, of |gamma_c|

    whose gradients are added to those of the loss at each step of `optimizer`; masks are then laid on that model, which
    `compress` returns. Without a trainer it masks a copy, as all one-shot pruners.

    Args:
        model: the model.
        config_list: entries of NNI.
        args: example positional arguments; with a trainer those of its first call are taken where there are none.
        kwargs: example keyword arguments.
        dependency_aware: see `Pruner`.
        trainer: called with the model and of `optimizer`, `criterion` and `epoch` those that it names; trains an epoch.
        optimizer: an optimizer of the model, with which `trainer` trains.
        criterion: the loss that `trainer` is given.
        sparsifying_training_epochs: epochs of that training; 10 if not given.
        training_epochs: the later word for it.
        scale: weight of the penalty; 1e-4 if not given.
        dummy_input: NNI's word for example inputs, beside a trainer.
        **others: further arguments of `Pruner`.

    Raises:
        ArgumentError: see `Pruner`; words of the training are given without a trainer, or a trainer without an
            optimizer.

    Reference: Liu et al., ICCV 2017, arXiv:1708.06519.
    """

    criterion: ClassVar[str | None] = "bn_scale"
    is_global: ClassVar[bool] = True
    group_reduction: ClassVar[str] = "mean"

    def __init__(  # noqa: PLR0913 - keywords of NNI
        self,
        model: nn.Module,
        config_list: ConfigList,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
        dependency_aware: bool = False,
        *,
        trainer: Trainer | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        criterion: Callable[..., Any] | None = None,
        sparsifying_training_epochs: int | None = None,
        training_epochs: int | None = None,
        scale: float | None = None,
        dummy_input: Any = None,
        **others: Any,
    ) -> None:
        if isinstance(args, torch.optim.Optimizer) or (callable(args) and not isinstance(args, Tensor)):
            raise ArgumentError(
                f"args is {type(args).__name__}; expected example inputs. Give trainer=, optimizer= and criterion= by "
                f"name."
            )
        of_training = {
            "optimizer": optimizer,
            "criterion": criterion,
            "sparsifying_training_epochs": sparsifying_training_epochs,
            "training_epochs": training_epochs,
            "scale": scale,
        }
        if trainer is None:
            for name in (name for name, value in of_training.items() if value is not None):
                raise ArgumentError(f"{name}= goes with trainer=, which is not given; give it, or leave {name}= away.")
            others |= {} if dummy_input is None else {"dummy_input": dummy_input}  # is answered
            super().__init__(model, config_list, args, kwargs, dependency_aware, **others)
            return
        check_module(model)
        check_function("trainer", trainer, "a model, its optimizer, a criterion and an epoch")
        check_function("criterion", criterion, "an output and a target")
        check_optimizer(optimizer, model)
        if optimizer is None:
            raise ArgumentError("trainer= trains with an optimizer, to whose steps the penalty is added; give it.")
        if training_epochs is not None and sparsifying_training_epochs is not None:
            raise ArgumentError("training_epochs= and sparsifying_training_epochs= say the same; give one of them.")
        epochs = sparsifying_training_epochs if training_epochs is None else training_epochs
        self._n_epochs = 10 if epochs is None else epochs
        check_count("training_epochs", self._n_epochs)
        self._penalty = ScaleL1(1e-4 if scale is None else scale)
        self._trainer, self._trained_with = trainer, {"optimizer": optimizer, "criterion": criterion}
        self._optimizer = optimizer
        inputs = example_inputs(args, kwargs, dummy_input)
        if inputs is None:
            inputs = first_call(model, lambda model: call_trainer(trainer, model, **self._trained_with, epoch=0))
        if inputs is None:
            raise ArgumentError("trainer does not call the model it is given; give example inputs as args=.")
        super().__init__(model, config_list, *inputs, dependency_aware, **others)
        self._prepare = self._sparsify

    def _sparsify(self) -> None:
        """Train with a penalty on the scales of the selected norms."""
        assert self._groups is not None, "example inputs are there"
        groups = self._groups
        chosen = tuple(group for group in groups.prunable if group.name in self._resolved.ratios)
        unmasked = MaskedModel(self._model, groups, (), False)
        penalty = TrainingPenalty(self._penalty.bind(Regularized(chosen, {})), unmasked)
        n_steps = 0

        def add_penalty(*_: Any) -> None:
            nonlocal n_steps
            penalty.add_gradients(n_steps, 1.0)
            n_steps += 1

        was_training = self._model.training
        self._model.train()
        handle = self._optimizer.register_step_pre_hook(add_penalty)
        try:
            for epoch in range(self._n_epochs):
                call_trainer(self._trainer, self._model, **self._trained_with, epoch=epoch)
        finally:
            handle.remove()
            self._model.train(was_training)
        if not n_steps:
            raise ArgumentError("trainer made no step with optimizer=, so that the penalty has no effect.")
