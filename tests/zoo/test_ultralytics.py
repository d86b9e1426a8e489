"""Detectors of ultralytics keep their own class after pruning, and with it predict, loss, fuse, export and saving."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.zoo.torchvision_models import load_torchvision
from tests.zoo.weights import spread_weights

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="needs ultralytics: make zoo-setup"),
]

IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
SHARES = {"yolov8n": 0.33, "yolo11n": 0.33, "yolo12n": 0.31, "yolo26n": 0.31}  # of the parameters that are left


def detector(name: str, folder: Path) -> nn.Module:
    """A model with random weights; the library keeps its settings in the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(folder))
        load_torchvision()
        from ultralytics.nn.tasks import DetectionModel

        torch.manual_seed(0)
        model = DetectionModel(f"{name}.yaml", nc=5, verbose=False).eval()
    spread_weights(model)
    return model


@pytest.fixture(scope="module", params=SHARES)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module, Any]:
    """Name, model and result."""
    model = detector(request.param, tmp_path_factory.mktemp("settings"))
    return request.param, model, torchshear.prune(model, (IMAGE,))


def wrapped(name: str, model: nn.Module, folder: Path) -> Any:
    """The model as users of the library hold it."""
    from ultralytics import YOLO
    from ultralytics.utils import DEFAULT_CFG_DICT

    yolo = YOLO(f"{name}.yaml", task="detect")
    yolo.model = copy.deepcopy(model)
    yolo.model.task, yolo.model.yaml_file = "detect", f"{name}.yaml"
    yolo.model.args = {**DEFAULT_CFG_DICT, "task": "detect", "model": f"{name}.yaml"}
    yolo.model.pt_path = yolo.ckpt_path = str(folder / f"{name}.pt")
    yolo.overrides["model"] = f"{name}.yaml"
    return yolo


def boxes(output: Any) -> Tensor:
    """Boxes and scores of all positions."""
    return output[0] if isinstance(output, tuple) else output


def test_it_keeps_its_class(pruned: tuple[str, nn.Module, Any]) -> None:
    name, model, result = pruned
    assert result.form == "native"
    assert type(result.model) is type(model)
    assert result.verification.max_error < 1e-9
    assert result.report.after.n_params < SHARES[name] * result.report.before.n_params


@pytest.mark.parametrize(("ratio", "align"), [(0.3, None), (0.4, 8)])
@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_less_is_cut_with_widths_that_fit(name: str, ratio: float, align: int | None, tmp_path: Path) -> None:
    """Its attention takes the stream for as wide as its heads together: 2 of 39 at a ratio of 0.4, beside 77."""
    model = detector(name, tmp_path)
    result = torchshear.prune(model, (IMAGE,), ratio=ratio, align=align)
    assert type(result.model) is type(model)
    assert result.verification.max_error < 1e-9
    assert result.report.after.n_params < (1 - ratio) * result.report.before.n_params
    assert boxes(result.model(IMAGE)).shape == boxes(model(IMAGE)).shape


def test_it_takes_other_image_sizes_and_saves(pruned: tuple[str, nn.Module, Any], tmp_path: Path) -> None:
    _, model, result = pruned
    image = torch.rand(2, 3, 96, 64)
    assert boxes(result.model(image)).shape == boxes(model(image)).shape
    torch.save(result.model, tmp_path / "small.pt")
    again = torch.load(tmp_path / "small.pt", weights_only=False)
    assert torch.equal(boxes(again(image)), boxes(result.model(image)))


def test_it_predicts(pruned: tuple[str, nn.Module, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision
    from ultralytics.utils.nms import TorchNMS

    monkeypatch.setattr(torchvision.ops, "nms", TorchNMS.nms)  # its compiled one may be missing
    name, _, result = pruned
    picture = (IMAGE[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    yolo = wrapped(name, result.model, tmp_path)
    (found,) = yolo.predict(picture, imgsz=64, device="cpu", conf=1e-6, verbose=False)
    assert found.boxes.data.shape[1] == 6
    assert len(found.boxes) > 0


def test_it_trains_on_its_own_loss(pruned: tuple[str, nn.Module, Any]) -> None:
    from ultralytics.cfg import get_cfg

    small = copy.deepcopy(pruned[2].model).train()
    small.args = get_cfg()
    batch = {
        "img": torch.rand(2, 3, 64, 64),
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.tensor([[1.0], [2.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.4, 0.2, 0.5]]),
    }
    small.loss(batch)[0].sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in small.parameters() if p.requires_grad)


def test_it_fuses(pruned: tuple[str, nn.Module, Any]) -> None:
    small = pruned[2].model
    fused = copy.deepcopy(small).fuse(verbose=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(boxes(fused(IMAGE)), boxes(small(IMAGE)), rtol=1e-3, atol=1e-3)


def test_it_exports(pruned: tuple[str, nn.Module, Any], tmp_path: Path) -> None:
    """By the library's own exporter, which calls `C2f.forward_split`; to a format that needs nothing more."""
    name, _, result = pruned
    file = wrapped(name, result.model, tmp_path).export(format="torchscript", imgsz=64, device="cpu", verbose=False)
    expected = boxes(result.model(IMAGE))
    torch.testing.assert_close(torch.jit.load(file)(IMAGE), expected, rtol=1e-3, atol=1e-3)
