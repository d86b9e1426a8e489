"""The form of all regularizers: settings, which a training binds to its network, and the penalty that this gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from torchshear.dependency import ChannelGroup
from torchshear.errors import ArgumentError
from torchshear.pruners.masks._layers import MaskableLayer
from torchshear.pruners.schedules import Residuals

Weights = Mapping[str, Tensor]
Nearest = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Sums of squares, by group of shape (width,) or by parameter of its shape -> bool of the same shapes, True = stays in
the nearest weights that lack what is to go in the end."""


@dataclass(frozen=True, slots=True, eq=False)
class Regularized:
    """The network that a regularizer is bound to.

    Attributes:
        groups: the channel groups that may shrink.
        layers: canonical name of a weight -> the layer whose weight it is, for patterns of single weights.
        goes: canonical name of a parameter -> bool tensor, True where it would go if the final ratio were asked for
            now; empty unless the regularizer wants it.
        singles: canonical names of the parameters of which single weights may go, and not only those of channels.
        nearest: chooses what stays if as little as may be is taken away, see `Nearest`.
        owners: name of a group, or canonical name of a weight -> label of the config entry that takes it.
    """

    groups: tuple[ChannelGroup, ...]
    layers: Mapping[str, MaskableLayer]
    goes: Mapping[str, Tensor] = field(default_factory=dict)
    singles: tuple[str, ...] = ()
    nearest: Nearest | None = None
    owners: Mapping[str, str] = field(default_factory=dict)


class Penalty(ABC):
    """A regularizer bound to a network."""

    @abstractmethod
    def value(self, weights: Weights, step: int) -> Tensor:
        """Return the penalty, a scalar that can be differentiated.

        Args:
            weights: canonical name of a parameter -> its values as the network reads them.
            step: steps of the optimizer that were made.
        """

    def after_step(self, weights: Weights, step: int) -> None:  # noqa: B027 - most have nothing to do
        """Act when the optimizer has made a step; `weights` are the parameters themselves."""

    def update(self, weights: Weights, step: int, at: Literal["step", "epoch"]) -> Residuals | None:
        """Act between steps: behind each step of the optimizer, and at the end of each epoch.

        Args:
            weights: as the network reads them.
            step: steps of the optimizer that were made, this one included.
            at: where training is.

        Returns:
            What the history is to show; None, as here, for nothing.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what it holds beside its settings: tensors, numbers and texts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most hold nothing
        """Take what `state_dict` gave."""


class Regularizer(ABC):
    """Settings of a regularizer; frozen."""

    @property
    def wants_final_units(self) -> bool:
        """True if it is told what would go at the final ratio, chosen when the training begins."""
        return False

    @abstractmethod
    def bind(self, network: Regularized) -> Penalty:
        """Return the penalty on a network.

        Raises:
            ArgumentError: the network has nothing that it could press.
        """


def check_coefficient(name: str, value: object) -> None:
    """Raise ArgumentError for what is no finite number of at least 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < float("inf"):  # type: ignore[operator]
        raise ArgumentError(f"{name}={value!r}; expected a finite number of at least 0.")
