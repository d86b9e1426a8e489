"""Random weights of a usual size everywhere, so that no wrong channel hides behind zeros, ones and tiny scales."""

from typing import Any

import torch
from torch import nn


def spread_weights(model: nn.Module) -> None:
    """Give vectors, weights that begin at zero and batch statistics values that differ from channel to channel."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.numel() > 1 and (float(parameter.std()) < 1e-3 or "weight" not in name):
                parameter.add_(torch.randn_like(parameter) * 0.02)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)


def raise_gains(model: nn.Module) -> None:
    """Scale weights up to the size that hands on as much as comes in, so that outputs depend on inputs through all."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.numel() > 1:
                usual = (parameter.numel() / parameter.shape[0]) ** -0.5
                parameter.mul_(max(usual / max(float(parameter.std()), 1e-6), 1.0))


def settle_statistics(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Have batch norms see what they are given, as in a trained model: else depth dies away, or grows."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    with torch.no_grad():
        model(**inputs)
        for norm, momentum in zip(norms, before, strict=True):
            norm.training, norm.momentum = False, momentum
            norm.running_mean.add_(torch.randn_like(norm.running_mean) * 0.1 * norm.running_var.sqrt())
            norm.running_var.mul_(torch.rand_like(norm.running_var) + 0.5)
