"""Norms over channels of which some are masked: they give what the norms of the small model will give.

A norm over all channels counts those that are masked, which are zero, into its mean and its variance. A network that is
trained so is another one than the small network that comes of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchshear.graph.model._state import preserve_state
from torchshear.pruners.masks._parametrization import Mask

_EPSILONS: Final = ("eps", "variance_epsilon", "epsilon")  # as norms call what they add to a variance
_SHAPES: Final[tuple[tuple[int, tuple[int, ...]], ...]] = ((-1, (3,)), (1, (3, 2, 2)))  # channels last, and first


@dataclass(frozen=True, slots=True, eq=False)
class KeptNorm:
    """Forward hook of a norm: computes it over the channels that the mask of its scale keeps.

    Attributes:
        eps: what is added to the variance.
        dim: dimension of the channels.
        is_centred: whether the mean is taken off.
        n_groups: groups of channels that are normalised apart, over all dimensions behind the channels as well; 0 for a
            norm over the channels alone.
    """

    eps: float
    dim: int
    is_centred: bool
    n_groups: int = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Return what the norm gives of an input over the kept channels; None where all are kept, or masks are gone."""
        mask = _mask_of(module)
        may_look = mask is not None and mask.is_cpu and not torch.compiler.is_compiling()  # else all would wait for it
        if mask is None or (may_look and bool(mask.all())):
            return None
        bias = getattr(module, "bias", None)
        return self.compute(args[0], mask, module.weight, bias).to(output.dtype)  # type: ignore[arg-type]

    def compute(self, x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the norm over kept channels.

        Args:
            x: the input, with the channels, C of them, in dimension `dim`.
            kept: whether each channel is, shape (C,).
            weight: scale of each channel, zero where it is masked, shape (C,).
            bias: shift of each channel, likewise, or None.
        """
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        shape = [1] * x.ndim
        shape[self.dim] = len(kept)
        there = kept.to(x.dtype).reshape(shape)
        if self.n_groups:
            parts, are_there = (one.reshape(len(one), self.n_groups, -1) for one in (x, there.expand_as(x)))
            out = self._normalise(parts, are_there, -1).reshape(x.shape)
        else:
            out = self._normalise(x, there, self.dim)
        out = out * weight.to(x.dtype).reshape(shape)
        return out if bias is None else out + bias.to(x.dtype).reshape(shape)

    def _normalise(self, x: Tensor, there: Tensor, dim: int) -> Tensor:
        n_kept = there.sum(dim, keepdim=True).clamp_min(1)
        x = x * there
        if self.is_centred:
            x = (x - x.sum(dim, keepdim=True) / n_kept) * there
        return x * torch.rsqrt(x.square().sum(dim, keepdim=True) / n_kept + self.eps)


def lay_kept_norms(model: nn.Module) -> None:
    """Give each norm over channels whose scale has a mask the hook that computes it over the kept ones."""
    remove_kept_norms(model)
    for module in [module for module in model.modules() if _mask_of(module) is not None]:
        found = _kept_norm(module)
        if found is not None:
            module.register_forward_hook(found)


def remove_kept_norms(model: nn.Module) -> None:
    """Take these hooks off."""
    for module in model.modules():
        for key in [key for key, one in module._forward_hooks.items() if isinstance(one, KeptNorm)]:
            del module._forward_hooks[key]


def _mask_of(module: nn.Module) -> Tensor | None:
    """Return the mask of a scale of channels; None without one."""
    chains = getattr(module, "parametrizations", None)
    if not isinstance(chains, nn.ModuleDict) or "weight" not in chains:
        return None
    masks = [one.mask for one in chains["weight"].children() if isinstance(one, Mask)]
    return masks[0] if masks and masks[0].ndim == 1 else None


def _kept_norm(module: nn.Module) -> KeptNorm | None:
    """Find the hook with which a module gives what it gives, nothing being masked yet; None if there is none."""
    mask = _mask_of(module)
    assert mask is not None
    eps = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    eps = float(torch.finfo(weight.dtype).eps) if eps is None else eps
    if not isinstance(eps, float) or isinstance(module, nn.modules.batchnorm._NormBase):
        return None
    n_groups = module.num_groups if isinstance(module, nn.GroupNorm) else 0
    for dim, rest in _SHAPES[1:] if n_groups else _SHAPES:
        size = (*rest, len(mask)) if dim == -1 else (rest[0], len(mask), *rest[1:])
        n_numbers = torch.Size(size).numel()  # of mean 1 or so, so that a norm without its mean gives something else
        x = 1 + 3 * torch.arange(n_numbers, device=weight.device).cos().to(weight.dtype).reshape(size)
        given = _run(module, x)
        for is_centred in (True, False) if given is not None else ():
            found = KeptNorm(eps, 1 if n_groups else dim, is_centred, n_groups)
            with torch.no_grad():
                own = found.compute(x, torch.ones_like(mask), weight, bias)
            assert given is not None
            if torch.allclose(own.to(given.dtype), given, rtol=1e-3, atol=1e-3):
                return found
    return None


@torch.no_grad()
def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    """Run a module as it is; None if it does not take the input, or gives something else than a tensor of its shape."""
    run: Callable[[Tensor], Any] = module
    try:
        with preserve_state(module), torch.random.fork_rng(devices=[]):
            given = run(x)
    except Exception:  # code of the model, which is asked for what it may not do
        return None
    return given if isinstance(given, Tensor) and given.shape == x.shape else None
