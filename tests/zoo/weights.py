"""Random weights of a usual size everywhere, so that no wrong channel hides behind zeros, ones and tiny scales."""

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
