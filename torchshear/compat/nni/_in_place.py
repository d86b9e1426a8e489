"""Pruning of the very model that is given, while whoever has it trains it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchshear._arguments import check_count, check_kind
from torchshear._making import PruneResult, shrink_planned
from torchshear.calibration import Loss
from torchshear.calibration._batches import check_batches
from torchshear.calibration._statistics import SUMS_OF_GRADIENTS
from torchshear.compat.nni._first_call import Call, LatestBatch, on_first_call
from torchshear.compat.nni._training_config import Algorithm
from torchshear.compat.nni._user_training import TrainingHooks
from torchshear.configs import ResolvedConfig
from torchshear.dependency.groups._analyze import analyze
from torchshear.errors import ArgumentError
from torchshear.graph.capture._trace import trace
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import outside_inference_mode
from torchshear.pruners.criteria._criterion import declared_needs
from torchshear.pruners.masks import Mask, Masks, applied_masks, make_permanent, plan_from_masks
from torchshear.speedup.shrinking._optimizer_state import plain_name
from torchshear.training._session import PruningSession
from torchshear.training._snapshot import plan_now, resolved_config


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """Batches for criteria that look at data, where the training's own are not to be taken.

    Attributes:
        data: batches, or None.
        loss_fn: called as `loss_fn(output, target)`.
        batches: how many batches to run; None: the first 32, or all where there are fewer.

    Raises:
        ArgumentError: no criterion looks at them, or a loss is missing.
    """

    data: Iterable[Any] | None
    loss_fn: Loss | None
    batches: int | None

    def check(self, algorithm: Algorithm) -> None:
        """Refuse data that nobody looks at, and gradients without a loss."""
        needs = _needs(algorithm)
        check_batches(self.batches)
        if self.data is None:
            for name in ("loss_fn", "batches"):
                if getattr(self, name) is not None:
                    raise ArgumentError(f"{name}= goes with data=; give batches of it, or leave {name}= away.")
            return
        check_kind("data", self.data, Iterable, "batches")
        if not needs:
            raise ArgumentError(f"data is given, and {algorithm.criterion!r} does not look at it. Leave data= away.")
        if needs & SUMS_OF_GRADIENTS and self.loss_fn is None:
            raise ArgumentError(f"{algorithm.criterion!r} looks at gradients; give a loss as loss_fn=, or no data.")


def _needs(algorithm: Algorithm) -> frozenset[Any]:
    assert algorithm.criterion is not None, "each algorithm has one"
    return declared_needs(algorithm.criterion)


class InPlace:
    """Pruning of the model that is given, by a session that is made as soon as example inputs are known.

    Args:
        model: the model, which is changed in place.
        algorithm: by what units are ranked.
        make: makes the session of the model, of example inputs and of further options.
        optimizer: the optimizer, by whose steps gradients are read; or None.
        inputs: example inputs; None: those of the model's first call.
        data: batches for criteria that look at data.
    """

    def __init__(
        self,
        model: nn.Module,
        algorithm: Algorithm,
        make: Callable[[tuple[Any, ...], dict[str, Any], dict[str, Any]], PruningSession],
        optimizer: torch.optim.Optimizer | None,
        inputs: Call | None,
        data: TrainingData,
    ) -> None:
        data.check(algorithm)
        if _needs(algorithm) & SUMS_OF_GRADIENTS and data.data is None and optimizer is None:
            raise ArgumentError(
                f"{algorithm.criterion!r} looks at the gradients of the training, by the steps of its optimizer; give "
                f"optimizer=, or data= and loss_fn=."
            )
        self.model, self._algorithm, self._make = model, algorithm, make
        self._optimizer, self._inputs, self._data = optimizer, inputs, data
        self._is_waiting = False
        self._epoch = 0
        self._session: PruningSession | None = None
        self.hooks: TrainingHooks | None = None

    @property
    def session(self) -> PruningSession:
        """The session.

        Raises:
            ArgumentError: the model was not called yet.
        """
        if self._session is None:
            raise ArgumentError(_NOT_CALLED if self._is_waiting else _NOT_COMPRESSED)
        return self._session

    @property
    def has_begun(self) -> bool:
        """True if there is a session."""
        return self._session is not None

    @property
    def resolved(self) -> ResolvedConfig:
        """The config as it applies to each layer and channel group."""
        return resolved_config(self.session)

    def prepare(self) -> None:
        """Make the session now, or before the first call of the model if there are no example inputs."""
        if self._session is not None or self._is_waiting:
            return
        if self._inputs is not None:
            self._begin(*self._inputs)
            return
        self._is_waiting = True
        on_first_call(self.model, self._begin)

    @outside_inference_mode()
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kinds = {parameter.device.type for parameter in self.model.parameters()} - {"meta"}
        with torch.enable_grad(), torch.autocast(next(iter(kinds), "cpu"), enabled=False):
            session = self._make(args, kwargs, self._data_options(args, kwargs))
        self._inputs, self._session = (args, kwargs), session
        self.hooks = TrainingHooks(session, self._optimizer)
        self.hooks.epoch(self._epoch)

    def _data_options(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Options of the session for criteria that look at data; where none is given, at batches of the training."""
        given, needs = self._data, _needs(self._algorithm)
        if given.data is not None:
            return {"data": given.data, "loss_fn": given.loss_fn, "batches": given.batches}
        if not needs or needs & SUMS_OF_GRADIENTS:
            return {}
        return {"data": LatestBatch(self.model, args, kwargs), "batches": 1}

    def epoch(self, number: int) -> None:
        """Begin an epoch; masks are renewed if the schedule says so."""
        check_count("epoch", number, 0)
        if self._session is None and not self._is_waiting:
            raise ArgumentError(_NOT_COMPRESSED)
        self._epoch = number
        if self.hooks is not None:
            self.hooks.epoch(number)

    def masks(self) -> Masks:
        """The masks that lie on the model now."""
        assert self.session is not None
        return applied_masks(self.model)

    def dense_copy(self) -> nn.Module:
        """A copy of the model in full size without masks, with zeros where they are."""
        assert self.session is not None
        copied = copy_model(self.model)
        make_permanent(copied)
        return copied

    @outside_inference_mode()
    def shrink(self) -> PruneResult:
        """Make the small model of the weights and masks that there are now."""
        session, (args, kwargs) = self.session, self.inputs()
        dense, masks = self.dense_copy(), self.masks()
        plan = plan_now(session) if self.resolved.ratios else None
        said = {} if plan is None else plan.masks()
        if plan is None or any(not torch.equal(mask, said.get(name, mask)) for name, mask in masks.tensors.items()):
            plan = plan_from_masks(analyze(trace(dense, args, kwargs)))
        return replace(shrink_planned(dense, plan, args, kwargs), history=session.history)

    def inputs(self) -> Call:
        """The example inputs."""
        assert self.session is not None
        assert self._inputs is not None, "there is a session"
        return self._inputs

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Give the model the weights and buffers of a state without masks; masks stay.

        Raises:
            ArgumentError: the state is of another model; nothing has changed then.
        """
        check_kind("state", state, Mapping, "the state_dict of the model as it was without masks")
        masks = {id(module.mask) for module in self.model.modules() if isinstance(module, Mask)}
        own = {
            plain_name(name): tensor
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
            if id(tensor) not in masks
        }
        for name, tensor in own.items():
            given = state.get(name)
            if not isinstance(given, Tensor) or given.shape != tensor.shape:
                found = "missing" if given is None else f"of shape {tuple(getattr(given, 'shape', ()))}"
                raise ArgumentError(
                    f"the state is of another model, or of one with masks: {name!r} is {found} in it, and has the "
                    f"shape {tuple(tensor.shape)} here. Give the state_dict of the model before compress()."
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])


_NOT_COMPRESSED: Final = "compress() has not been called; call it before the training that it is to prune in."
_NOT_CALLED: Final = (
    "the model has not been called yet, so that nothing is known of what goes together; train it first, or give "
    "example inputs as args="
)
