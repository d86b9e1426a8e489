"""Data and losses that a user names on the command line."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional

from torchshear._arguments import close_names
from torchshear.calibration._dense_loss import DENSE, Loss, LossFunction
from torchshear.cli._example import call, failure_of, find_object, kind_of
from torchshear.errors import ArgumentError, DataError, TorchshearError

_EXPECTED: Final = "a function without arguments that returns an iterable of batches, or such an iterable"


class NamedLoader:
    """Batches that a user named; each pass starts anew, with another call of the function where it gave an iterator.

    Args:
        name: "package.module:loader".

    Attributes:
        say: told how many batches were taken, while they are.

    Raises:
        ArgumentError: there is no such object, it fails, or it gives no iterable.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.say: Callable[[str], None] = _nothing
        found = find_object(name, "loader", _EXPECTED)
        self._make = found if callable(found) and not isinstance(found, Iterable) else lambda: found
        self._made: Iterable[Any] | None = self._new()

    def _new(self) -> Iterable[Any]:
        made = call(self.name, self._make, _EXPECTED)
        if not isinstance(made, Iterable) or isinstance(made, str | bytes | Mapping | nn.Module):
            raise ArgumentError(f"{self.name} gives {kind_of(made)}. Expected {_EXPECTED}.")
        return made

    def __iter__(self) -> Iterator[Any]:
        made, self._made = self._made if self._made is not None else self._new(), None
        try:
            found = iter(made)
            if found is not made:
                self._made = made  # it can be run through again
            for number, batch in enumerate(found, 1):
                self.say(f"{self.name}: batch {number}")
                yield batch
        except Exception as error:  # code of the user
            raise DataError(f"{self.name} fails: {failure_of(error)} Expected {_EXPECTED}.") from error


def _nothing(text: str) -> None:
    """Say nothing."""


def _by_targets(name: str, function: LossFunction) -> LossFunction:
    """Make a loss of torch on an output and a target that both are tensors."""

    def loss(output: Any, target: Any) -> Tensor:
        for what, value in (("output of the model", output), ("target of the batch", target)):
            if not isinstance(value, Tensor):
                raise DataError(
                    f"loss {name!r}: the {what} is {kind_of(value)}; expected a tensor. Use 'output' for a model that "
                    f"gives its own loss, or name a function of output and target as package.module:function."
                )
        return function(output, target)

    return loss


def _mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of tensors of one shape; torch would broadcast others, and only warn."""
    if output.shape != target.shape:
        raise DataError(
            f"loss 'mse': the output has shape {tuple(output.shape)}, the target {tuple(target.shape)}; expected one "
            f"shape. Reshape the targets that the loader gives."
        )
    return functional.mse_loss(output, target)


def _own_loss(output: Any, target: Any) -> Tensor:
    """Return the loss that the model itself gives."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if isinstance(output, Tensor):
        found = output
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise DataError(
            f"loss 'output': the output is {kind_of(output)} without a loss; expected a scalar as 'loss', as the first "
            f"output, or as the output itself. Models that take labels give it if the batch and the example have them."
        )
    return found


_LOSSES: Final[Mapping[str, LossFunction]] = {
    "cross_entropy": _by_targets("cross_entropy", functional.cross_entropy),
    "mse": _by_targets("mse", _mse),
    "output": _own_loss,
}
LOSS_NAMES: Final = ", ".join((DENSE, *_LOSSES))


def load_loss(name: str) -> Loss:
    """Load a loss by its name or as "package.module:function"; errors of the function name it.

    Raises:
        ArgumentError: there is none.
    """
    if name == DENSE:
        return DENSE
    if name not in _LOSSES and ":" not in name:
        near = close_names(name, (DENSE, *_LOSSES))
        raise ArgumentError(f"loss {name!r}; expected one of {LOSS_NAMES}, or package.module:function.{near}")
    function = _LOSSES.get(name) or find_object(
        name, "function", "a function of output and target that returns a scalar tensor"
    )
    if not callable(function):
        raise ArgumentError(f"{name} is {kind_of(function)}. Expected a function of output and target.")

    def loss(output: Any, target: Any) -> Tensor:
        try:
            return function(output, target)
        except TorchshearError:
            raise
        except Exception as error:  # code of the user, or shapes that do not go together
            raise DataError(f"loss {name!r} fails: {failure_of(error)} Check what the loader gives.") from error

    return loss
