"""Other weights for a comparison: those that a model has may hide what is wrong with it."""

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from torchshear.graph import Cache, clear_caches

_PERIOD = 65537  # a prime, so that no two rows of a matrix are the same


class SharedWeights:
    """Tensors that a graph and a native form compute with in turn: the model's own, or others drawn in their place.

    Attention that is nearly even does not show that its heads have a wrong size, and a layer that is all zeros shows
    nothing of what comes before it; after some training both would. There is one copy of them, whoever uses them.

    Attributes:
        tensors: canonical name -> tensor in the dtype to compute in; parameters are modules' parameters.

    Args:
        own: canonical name -> tensor of the model.
        dtype: dtype to compute in.
        drawn: names of those that may be drawn anew: floating parameters of one dimension and more.
        caches: what a model keeps of values that it has computed from its weights.
    """

    def __init__(
        self, own: Mapping[str, Tensor], dtype: torch.dtype, drawn: Sequence[str], caches: Sequence[Cache]
    ) -> None:
        self._own = own
        self._drawn = drawn
        self._caches = caches
        self._seed: int | None = None
        self.tensors = {name: _twin(tensor, dtype) for name, tensor in own.items()}

    def draw(self, seed: int | None, model: nn.Module | None = None) -> None:
        """Give the tensors the values of a draw, or the model's own.

        Args:
            seed: of the draw; None for the model's own values.
            model: the model that computes with them next, which forgets what it has computed with others.
        """
        if seed != self._seed:
            with torch.no_grad():
                generator = None if seed is None else torch.Generator().manual_seed(seed)
                for name in self._drawn:
                    fill(self.tensors[name], self._own[name], generator)
            self._seed = seed
        if model is not None and self._caches:
            clear_caches(model, self._caches)


def _twin(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    value = tensor.detach().to(dtype, copy=True) if tensor.is_floating_point() else tensor.detach()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def fill(tensor: Tensor, own: Tensor, generator: torch.Generator | None) -> None:
    """Give a tensor its own values, or such that every layer has a say.

    Matrices keep the size of what passes them, vectors move a little.
    """
    if generator is None:
        tensor.copy_(own)
        return
    if not own.numel():
        return
    noise = _noise(own.shape, generator)
    if own.ndim > 1:
        tensor.copy_(noise.mul_(sqrt(2 / max(1, own[0].numel()))))
    else:
        tensor.copy_(own).add_(noise.mul_(0.1).to(own.device))


def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Numbers of a standard normal distribution; of a large tensor they repeat, since drawing takes long."""
    size = shape.numel()
    if size <= _PERIOD:
        return torch.randn(shape, generator=generator)
    period = torch.randn(_PERIOD, generator=generator)
    whole = size // _PERIOD
    noise = torch.empty(size)
    noise[: whole * _PERIOD].view(whole, _PERIOD).copy_(period)
    noise[whole * _PERIOD :] = period[: size % _PERIOD]
    return noise.view(shape)
