"""Random weights for a comparison, since those that a model has may hide a difference."""

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from torchshear.graph.model._caches import Cache, clear_caches

_PERIOD = 65537  # a prime, so that no two rows of a matrix are the same


class SharedWeights:
    """Tensors that a graph and a native form share, with the model's own values or with random ones.

    Attention that is nearly even does not show that its heads have a wrong size, and a layer that is all zeros shows
    nothing of the layers before it; after some training both would. Sharing them saves a copy.

    Attributes:
        tensors: canonical name -> tensor in the dtype to compute in; parameters are `nn.Parameter`s.

    Args:
        own: canonical name -> tensor of the model.
        dtype: dtype to compute in.
        random: names of the tensors that may get random values: floating parameters of at least one dimension.
        caches: attributes in which a model keeps values computed from its weights.
    """

    def __init__(
        self, own: Mapping[str, Tensor], dtype: torch.dtype, random: Sequence[str], caches: Sequence[Cache]
    ) -> None:
        self._own = own
        self._random = random
        self._caches = caches
        self._seed: int | None = None
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in own.items():
            value = tensor.detach().to(dtype, copy=True) if tensor.is_floating_point() else tensor.detach()
            is_parameter = isinstance(tensor, nn.Parameter)
            self.tensors[name] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value

    def set_values(self, seed: int | None, model: nn.Module | None = None) -> None:
        """Give the tensors the random values of a seed, or the model's own.

        Args:
            seed: seed of the values; None for the model's own.
            model: the model that computes with them next; its caches are cleared.
        """
        if seed != self._seed:
            with torch.no_grad():
                generator = torch.Generator()
                for name in self._random if seed is None else ():
                    self.tensors[name].copy_(self._own[name])
                if seed is not None:
                    generator.manual_seed(seed)
                    for name in self._random:
                        fill_randomly(self.tensors[name], self._own[name], generator)
            self._seed = seed
        if model is not None and self._caches:
            clear_caches(model, self._caches)


def fill_randomly(tensor: Tensor, own: Tensor, generator: torch.Generator) -> None:
    """Write random weights into a tensor, with which every layer has an effect on the output.

    Matrices get normal numbers of variance 2 / fan-in, which keeps the size of activations; vectors change a little. In
    a large tensor the random numbers repeat, since drawing them takes long.

    Args:
        tensor: a parameter; written to.
        own: its values in the model, of the same shape.
        generator: source of the numbers.
    """
    size = own.numel()
    if not size:
        return
    if size <= _PERIOD:
        noise = torch.randn(own.shape, generator=generator)
    else:
        period, n_whole = torch.randn(_PERIOD, generator=generator), size // _PERIOD
        flat = torch.empty(size)
        flat[: n_whole * _PERIOD].view(n_whole, _PERIOD).copy_(period)
        flat[n_whole * _PERIOD :] = period[: size % _PERIOD]
        noise = flat.view(own.shape)
    if own.ndim > 1:
        tensor.copy_(noise.mul_(sqrt(2 / max(1, own[0].numel()))))
    else:
        tensor.copy_(own).add_(noise.mul_(0.1).to(own.device))
