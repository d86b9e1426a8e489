"""Shrinking a model in the middle of its training, every so many events of the schedule."""

from collections.abc import Mapping
from typing import Any

import torch

from torchshear._arguments import check_count
from torchshear.errors import ArgumentError
from torchshear.pruners.schedules import Schedule
from torchshear.training._masked_model import MaskedModel
from torchshear.training._renewing import MaskRenewer


class Shrinker:
    """Puts a smaller model in place of the one that trains, every so many renewals of masks.

    Args:
        every: renewals from one shrink to the next; None to never shrink.
        optimizer: what trains the model; None where whoever trains makes a new one after each shrink.
        model: the model with its masks.
        renewer: renews the masks, and knows what is gone.
    """

    def __init__(
        self,
        every: int | None,
        optimizer: torch.optim.Optimizer | None,
        model: MaskedModel,
        renewer: MaskRenewer,
    ) -> None:
        self.every, self._optimizer, self._model, self._renewer = every, optimizer, model, renewer
        self._n_renewals = 0

    def renewed(self) -> None:
        """Take note that masks were renewed, and shrink if that is due.

        Raises:
            ArgumentError: the optimizer cannot follow.
            VerificationError: the smaller model is not the masked one.
        """
        if self.every is None:
            return
        self._n_renewals += 1
        if self._n_renewals >= self.every and self._renewer.shrink(self._optimizer):
            self._n_renewals = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what the model that trains keeps, and what came since it was shrunk."""
        plan = self._model.plan
        kept = {} if plan is None else {name: torch.from_numpy(units) for name, units in plan.kept.items()}
        return {"n_renewals": self._n_renewals, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, and shrink the model as it was shrunk."""
        kept = {name: units.numpy().copy() for name, units in state["kept"].items()}
        if kept:
            self._renewer.choice = self._renewer.goal.restore(kept, {}, 0.0)
            self._renewer.shrink(self._optimizer)
        self._n_renewals = int(state["n_renewals"])


def check_shrinking(
    every: object, schedule: Schedule, single_weights: str, soft: bool, optimizer: torch.optim.Optimizer | None
) -> None:
    """Raise ArgumentError for a session that is to shrink its model and cannot.

    Args:
        every: renewals from one shrink to the next, or None.
        schedule: the schedule.
        single_weights: words that ask for single weights, or "".
        soft: whether what is gone may come back.
        optimizer: the optimizer, or None.
    """
    if every is None:
        return
    check_count("shrink_every", every)
    if single_weights or soft:
        said = single_weights or "soft=True"
        raise ArgumentError(
            f"shrink_every={every!r} and {said} do not go together: only channels that stay away can be cut out of the "
            f"model while it trains. Leave shrink_every= away; finish() makes the model smaller."
        )
    if optimizer is None and schedule.by != "event":
        raise ArgumentError(
            f"shrink_every={every!r} needs optimizer=: in the middle of training it has to go on with the smaller "
            f"model's parameters. Only with a schedule by='event' may you make a new one after each on_event()."
        )
