"""torchvision's classification models by name, also where its wheel does not match the installed torch build."""

import importlib.util
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tests.zoo.weights import spread_weights

NAMES = (
    "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "densenet121", "googlenet", "mobilenet_v2",
    "mobilenet_v3_small", "shufflenet_v2_x1_0", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny",
)  # fmt: skip

# The rest of the zoo that is pruned whole.
ALL = ("alexnet", *NAMES, "squeezenet1_1", "vit_b_16", "swin_t", "maxvit_t", "lraspp_mobilenet_v3_large")

# Operators that torchvision registers from its compiled library. On a CPU build of torch that library does not load;
# declared here, the Python part of the package imports, and models that do not call them run.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor a, Tensor b, float c, SymInt d, SymInt e, int f, bool g) -> Tensor",
    "qroi_align(Tensor a, Tensor b, float c, int d, int e, int f, bool g) -> Tensor",
    "_roi_align_backward(Tensor a) -> Tensor",
    "roi_pool(Tensor a, Tensor b, float c, SymInt d, SymInt e) -> (Tensor, Tensor)",
    "_roi_pool_backward(Tensor a) -> Tensor",
    "ps_roi_align(Tensor a, Tensor b, float c, SymInt d, SymInt e, int f) -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor a) -> Tensor",
    "ps_roi_pool(Tensor a, Tensor b, float c, SymInt d, SymInt e) -> (Tensor, Tensor)",
    "_ps_roi_pool_backward(Tensor a) -> Tensor",
    "deform_conv2d(Tensor a, Tensor b, Tensor c, Tensor d, Tensor e) -> Tensor",
    "_deform_conv2d_backward(Tensor a) -> Tensor",
)
_library: list[Any] = []


def is_installed() -> bool:
    """Whether torchvision is there at all."""
    return importlib.util.find_spec("torchvision") is not None


def load_torchvision() -> ModuleType:
    """Import torchvision, with its operators declared if its own library does not load."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _library.append(library)
        import torchvision
    return torchvision


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model with random weights and batch statistics, in eval mode, and its example input."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"init_weights": True} if name == "googlenet" else {}
        if name in ("lraspp_mobilenet_v3_large",):
            options["weights_backbone"] = None
        model = load_torchvision().models.get_model(name, weights=None, **options)
    spread_weights(model)
    size = 224
    return model.eval(), (torch.randn(1, 3, size, size),)
