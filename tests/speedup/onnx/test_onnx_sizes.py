"""ONNX files with free heights, widths and lengths, and of other operator sets."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import randomise
from torchshear.errors import ArgumentError, ExportError
from torchshear.speedup import shrink_to_form

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
FREE = {"x": {2: "height", 3: "width"}}


class Segmentation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.inner, self.leave = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.enter(x)).relu()
        y = self.leave(y + self.inner(y).relu())
        return nn.functional.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Plain(Segmentation):
    """Comes back at the size of its features."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.enter(x)).relu()
        return self.leave(y + self.inner(y).relu())


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return torchshear.prune(randomise(Segmentation().eval(), 3), (IMAGE,)).model


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    names = [node.name for node in session.get_inputs()]
    return torch.from_numpy(
        np.asarray(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])
    )


@pytest.mark.parametrize("shapes", [FREE, ({2: "height", 3: "width"},), {"x": {2: torch.export.Dim.AUTO, 3: "w"}}])
def test_height_and_width_are_free(small: nn.Module, tmp_path: Path, shapes: Any) -> None:
    file = torchshear.export_onnx(small, tmp_path / "small.onnx", (IMAGE,), dynamic_shapes=shapes)
    assert file.dynamic_batch
    assert len(file.dynamic_sizes) == 2
    for shape in ((1, 3, 48, 64), (3, 3, 17, 32), tuple(IMAGE.shape)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(file.path, x), small(x), rtol=1e-3, atol=1e-4)


def test_they_have_the_names_that_were_asked_for(small: nn.Module, tmp_path: Path) -> None:
    file = torchshear.export_onnx(small, tmp_path / "small.onnx", (IMAGE,), dynamic_shapes=FREE)
    graph = onnx.load(file.path).graph
    for value in (graph.input[0], graph.output[0]):
        sizes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert [sizes[0], *sizes[2:]] == ["batch", "height", "width"]
    assert file.dynamic_sizes == ("height", "width")


def test_a_traced_form_whose_graph_holds_no_size_is_free_too(tmp_path: Path) -> None:
    model = randomise(Plain().eval(), 3)
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (IMAGE,))))
    traced = shrink_to_form(model, plan, form="traced").model
    file = torchshear.export_onnx(traced, tmp_path / "traced.onnx", (IMAGE,), dynamic_shapes=FREE)
    x = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(run(file.path, x), traced(x), rtol=1e-3, atol=1e-4)


def test_a_size_that_the_model_fixes_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 8 * 8, 2)).eval()
    with pytest.raises(ExportError, match="fixes dimension 2 of input|torch cannot turn|itself fails"):
        torchshear.export_onnx(
            model, tmp_path / "no.onnx", (torch.randn(2, 3, 8, 8),), dynamic_shapes={"input": {2: "height"}}
        )
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_opset(small: nn.Module, tmp_path: Path) -> None:
    plain = torchshear.export_onnx(small, tmp_path / "small.onnx", (IMAGE,))
    for opset in (17, 18):
        file = torchshear.export_onnx(small, tmp_path / "other.onnx", (IMAGE,), opset=opset)
        assert file.opset == onnx.load(file.path).opset_import[0].version == opset != plain.opset
        torch.testing.assert_close(run(file.path, IMAGE), small(IMAGE), rtol=1e-3, atol=1e-4)


def test_an_opset_without_an_operator_of_the_model_is_an_error(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval()
    with pytest.raises(ExportError, match="cannot be converted to opset 11"):
        torchshear.export_onnx(model, tmp_path / "no.onnx", (torch.randn(2, 4),), opset=11)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"opset": 0}, "opset must be"),
        ({"opset": "17"}, "opset must be"),
        ({"opset": True}, "opset must be"),
        ({"dynamic_shapes": 2}, "dynamic_shapes is int; expected a mapping"),
        ({"dynamic_shapes": {"y": {2: "height"}}}, "'y'.*expected a mapping from parameters of forward"),
        ({"dynamic_shapes": {"x": [2, 3]}}, "expected a mapping from parameters of forward"),
        ({"dynamic_shapes": {"x": {4: "depth"}}}, "has no dimension 4"),
        ({"dynamic_shapes": {"x": {"2": "height"}}}, "has no dimension '2'"),
        ({"dynamic_shapes": {"x": {2: "the height"}}}, "is no name of a size"),
    ],
)
def test_other_words_are_refused(small: nn.Module, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        torchshear.export_onnx(small, tmp_path / "no.onnx", (IMAGE,), **given)
