"""What a pruned transformer must compute, by hooks on modules of the original: shares no code with the library's proof.

Cut parameters are zero, and each norm sees the positions that its own weight keeps. That is all: tokens are never cut
in these models, so that no softmax runs over a cut axis.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def masked_with_norms_on_kept_positions(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A float64 copy in eval mode that computes what the pruned model must."""
    twin = copy.deepcopy(model).double().eval()
    named = {**dict(twin.named_parameters(remove_duplicate=False)), **dict(twin.named_buffers(remove_duplicate=False))}
    with torch.no_grad():
        for name, mask in masks.items():
            if named[name].is_floating_point():
                named[name].mul_(mask)
    for name, module in twin.named_modules():
        mask = masks.get(f"{name}.weight")
        if "Norm" in type(module).__name__ and mask is not None and mask.ndim == 1:
            module.register_forward_hook(_on_kept(mask))
    return twin


def _on_kept(mask: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0][..., mask].double()
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        eps = next(getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name))
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight[mask]
        if getattr(module, "bias", None) is not None:
            x = x + module.bias[mask]
        full = torch.zeros(*output.shape, dtype=torch.float64)
        full[..., mask] = x
        return full

    return hook
