"""torchvision's detectors by name, with what their compiled library would bring written in plain PyTorch."""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.torchvision_models import load_torchvision


@dataclass(frozen=True, slots=True)
class Detector:
    """A detector and which parts of it are pruned.

    Attributes:
        parts: names of the parts.
        size: height and width of the example images.
        options: further arguments of the builder; small images where the detector resizes them.
    """

    parts: tuple[str, ...]
    size: tuple[int, int] = (96, 128)
    options: Mapping[str, Any] = field(default_factory=dict)


_SMALL = {"min_size": 96, "max_size": 128}
_FEW = _SMALL | {
    f"rpn_{which}_nms_top_n_{mode}": 30 for which in ("pre", "post") for mode in ("train", "test")
}  # boxes: `roi_align` in Python is slow
_ANY_SCORE = _SMALL | {"score_thresh": 0.0, "topk_candidates": 50}

DETECTORS = {
    "fasterrcnn_resnet50_fpn": Detector(("backbone", "rpn.head", "roi_heads.box_head"), options=_FEW),
    "fasterrcnn_mobilenet_v3_large_fpn": Detector(("backbone", "rpn.head", "roi_heads.box_head"), options=_FEW),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Detector(("backbone", "rpn.head", "roi_heads.box_head"), options=_FEW),
    "retinanet_resnet50_fpn": Detector(("backbone", "head"), options=_ANY_SCORE),
    "fcos_resnet50_fpn": Detector(("backbone", "head"), options=_ANY_SCORE),
    "ssd300_vgg16": Detector(("backbone",), (300, 300)),
    "ssdlite320_mobilenet_v3_large": Detector(("backbone",), (320, 320)),
}
_library: list[Any] = []


def build_detector(name: str, seed: int = 0) -> tuple[nn.Module, tuple[list[Tensor]]]:
    """A detector with random weights and batch statistics, in eval mode, and two images of different sizes."""
    torchvision = load_torchvision()
    _add_kernels(torchvision)
    torch.manual_seed(seed)
    detector = DETECTORS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=6, **detector.options
        )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0)
            module.bias.data.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.5)
    for name, module in model.named_modules():
        if "head" in name and isinstance(module, nn.Conv2d):  # initialised to next to nothing, which would prove little
            nn.init.kaiming_normal_(module.weight)
    height, width = detector.size
    return model.eval(), ([torch.rand(3, height, width), torch.rand(3, height - 10, width)],)


def targets() -> list[dict[str, Tensor]]:
    """Two boxes for each of two images."""
    boxes = torch.tensor([[4.0, 5.0, 40.0, 50.0], [20.0, 10.0, 80.0, 70.0]])
    return [{"boxes": boxes.clone(), "labels": torch.tensor([1, 3])} for _ in range(2)]


def _add_kernels(torchvision: Any) -> None:
    """Implement `nms`, and have `roi_align` run in Python, where the compiled library is not there."""
    if _library or torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"):
        return
    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", _nms, "CPU")
    torchvision.extension._has_ops = lambda: True  # what `batched_nms` asks before it calls the operator
    scope = torchvision.ops.roi_align.__globals__
    scope["_roi_align"] = inspect.unwrap(scope["_roi_align"])  # torchvision's own in Python, without compiling it
    _library.append(library)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy suppression: take the box with the highest score, drop those that overlap it too much, and so on."""
    order = scores.argsort(descending=True, stable=True)
    top_left = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (bottom_right - top_left).clamp(min=0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    overlaps = shared / (area[:, None] + area - shared) > iou_threshold
    is_dropped = torch.zeros(len(boxes), dtype=torch.bool)
    kept = []
    for index in order.tolist():
        if not is_dropped[index]:
            kept.append(index)
            is_dropped |= overlaps[index]
    return torch.tensor(kept, dtype=torch.long)
