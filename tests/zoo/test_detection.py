"""torchvision's detectors: parts pruned by half inside the whole model, which then runs, trains and exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import torchshear
from tests.oracle import assert_same_function, fingerprint, masked_copy
from tests.zoo.detection import DETECTORS, build_detector, targets
from tests.zoo.torchvision_models import is_installed

pytestmark = [pytest.mark.zoo, pytest.mark.skipif(not is_installed(), reason="needs torchvision: make zoo-setup")]


def shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", DETECTORS)
def test_half_of_the_channels_of_the_parts_go(name: str, tmp_path: Path) -> None:
    model, args = build_detector(name)
    before = fingerprint(model)
    result = torchshear.prune(model, args, ratio=0.5, submodules=DETECTORS[name].parts)
    assert fingerprint(model) == before
    assert [part.name for part in result.report.parts] == list(DETECTORS[name].parts)
    assert {part.form for part in result.report.parts} == {"native"}
    assert result.report.parts[0].after.n_params <= 0.55 * result.report.parts[0].before.n_params
    assert result.verification.dtype == torch.float64
    assert result.verification.max_error <= 1e-9

    small = result.model
    assert type(small) is type(model)
    x = torch.randn(2, 3, *DETECTORS[name].size)
    with torch.no_grad():
        assert shapes(small.backbone(x)) == shapes(model.backbone(x))
        detections = small(args[0])
    assert [set(one) for one in detections] == [{"boxes", "scores", "labels"}] * 2
    assert_same_function(masked_copy(model, result.plan.masks()).backbone, small.backbone, (x[:1],))

    small.train()
    losses = small(args[0], targets())
    sum(losses.values()).backward()
    gradients = [p.grad for part in DETECTORS[name].parts for p in small.get_submodule(part).parameters()]
    assert all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)
    assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients)

    file = torchshear.export_onnx(small.eval().backbone, tmp_path / "backbone.onnx", (x,))
    assert file.dynamic_batch
