"""timm's image classification models by name, with random weights."""

import importlib.util
import warnings

import torch
from torch import nn

from tests.zoo.torchvision_models import load_torchvision
from tests.zoo.weights import spread_weights

NAMES = (
    "cait_xxs24_224", "convmixer_768_32", "cs3darknet_focus_s", "davit_tiny", "deit_tiny_patch16_224", "dla46x_c",
    "edgenext_xx_small", "efficientformer_l1", "ghostnet_050", "gmlp_ti16_224", "hrnet_w18_small", "levit_128s",
    "mobilevit_xxs", "poolformerv2_s12", "pvt_v2_b0", "res2next50", "resnetv2_18", "test_mambaout",
    "twins_svt_small", "xcit_nano_12_p8_224",
)  # fmt: skip


def is_installed() -> bool:
    """Whether timm is there at all."""
    return importlib.util.find_spec("timm") is not None


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model with random weights and batch statistics, in eval mode, and its example input."""
    load_torchvision()
    import timm

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = timm.create_model(name, pretrained=False)
    spread_weights(model)
    shape = model.pretrained_cfg["input_size"]
    return model.eval(), (torch.randn(1, *shape),)
