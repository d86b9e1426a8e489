"""Other weights for a comparison: those that a model has may hide what is wrong with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from torchshear.graph import Cache, forget


@dataclass(frozen=True, slots=True, eq=False)
class Redrawn:
    """Weights drawn anew.

    Attention that is nearly even does not show that its heads have a wrong size, and a layer that is all zeros shows
    nothing of what comes before it; after some training both would.

    Attributes:
        weights: canonical name of a parameter -> tensor of its shape.
        caches: what the model keeps of values that it has computed from its weights.
    """

    weights: Mapping[str, Tensor]
    caches: tuple[Cache, ...]

    @contextmanager
    def given_to(self, model: nn.Module) -> Iterator[None]:
        """Have a model compute with these weights for a while; parameters that are not named keep theirs."""
        own = [(parameter, parameter.data) for name, parameter in model.named_parameters() if name in self.weights]
        forget(model, self.caches)
        try:
            for name, parameter in model.named_parameters():
                if name in self.weights:
                    parameter.data = self.weights[name].to(parameter.dtype)
            yield
        finally:
            for parameter, data in own:
                parameter.data = data
            forget(model, self.caches)


def redraw(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights with which every layer has a say: matrices keep the size of what passes them, vectors move a little.

    Args:
        weights: canonical name -> parameter.
        seed: seed of the draw.

    Returns:
        Name -> tensor of the same shape, dtype and device, for floating parameters of one dimension and more.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.ndim:
            noise = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
            per_row = max(1, weight[0].numel())
            drawn[name] = noise.mul_(sqrt(2 / per_row)) if weight.ndim > 1 else weight.detach() + noise.mul_(0.1)
    return drawn
