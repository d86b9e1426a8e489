import copy
import errno
import importlib
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from torchshear.errors import ArgumentError, ExportError, OutputError, WeightError
from torchshear.speedup.onnx import _export as module
from torchshear.speedup.onnx import _registry
from torchshear.speedup.onnx._export import OnnxFile, export_onnx


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, image, scale=None, *, mask=None, training_only=None):
        hidden = self.bn(self.conv(image)).relu().mean((2, 3))
        if mask is not None:
            hidden = hidden * mask
        if scale is not None:
            hidden = hidden * scale
        return {"logits": self.head(self.drop(hidden)), "loss": None, "rest": (hidden, hidden.argmax(1))}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def shapes(values):
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = Network().train()
    nn.init.uniform_(model.bn.running_mean)
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    before, image, state = copy.deepcopy(model.state_dict()), torch.randn(1, 3, 8, 8), torch.get_rng_state()
    result = export_onnx(model, path, (image,), {"mask": torch.ones(1, 8)})
    return model, result, before, torch.equal(state, torch.get_rng_state())


def test_a_file_names_no_place_on_this_machine(exported):
    _, result, _, _ = exported
    assert __file__.encode() not in result.path.read_bytes()


def test_one_sample_gives_a_dynamic_batch(exported):
    _, result, _, _ = exported
    assert result.dynamic_batch
    assert result.static_reason is None
    assert result.batches_checked == (1, 3)
    assert result.max_error < 1e-5
    assert result.size_bytes == result.path.stat().st_size
    proto = onnx.load(result.path)
    assert result.opset == proto.opset_import[0].version
    assert shapes(proto.graph.input) == {"image": ["batch", 3, 8, 8], "mask": ["batch", 8]}
    assert [shape[0] for shape in shapes(proto.graph.output).values()] == ["batch"] * 3
    assert not any(tensor.data_location for tensor in proto.graph.initializer)


def test_the_file_computes_what_the_model_computes(exported):
    model, result, _, _ = exported
    image, mask = torch.randn(5, 3, 8, 8), torch.rand(5, 8)
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(image, mask=mask)
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    logits, hidden, best = session.run(None, {"image": image.numpy(), "mask": mask.numpy()})
    np.testing.assert_allclose(logits, wanted["logits"].numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(hidden, wanted["rest"][0].numpy(), rtol=1e-4, atol=1e-6)
    assert best.tolist() == wanted["rest"][1].tolist()


def test_the_model_is_unchanged(exported):
    model, _, before, is_random_state_kept = exported
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(part.training for part in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert is_random_state_kept


def test_mode_and_random_state_are_restored_after_a_failure(tmp_path):
    model = nn.Sequential(Function(torch.special.airy_ai), nn.Linear(4, 4).eval())
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(ExportError, match="airy_ai"):
        export_onnx(model, tmp_path / "x.onnx", torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


class Nested(nn.Module):
    def forward(self, pair, table):
        return pair[0] + pair[1] * table["k"], [pair[0] * 2, None]


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, first, second=None, *, third=None, factor=2.0):
        return self.linear(first) * factor - third


class Variadic(nn.Module):
    def forward(self, *parts):
        return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "inputs"),
    [
        (
            Nested(),
            ([torch.randn(1, 4), torch.randn(1, 4)], {"k": torch.randn(1, 4)}),
            {},
            ["pair_0", "pair_1", "table_k"],
        ),
        (Keywords(), (), {"third": torch.randn(2, 4), "factor": 3.0, "first": torch.randn(2, 4)}, ["first", "third"]),
        (Keywords(), (torch.randn(2, 4),), {"third": torch.randn(4)}, ["first", "third"]),
        (Variadic(), (torch.randn(2, 4), torch.randn(2, 3)), {}, ["parts_0", "parts_1"]),
        (nn.LSTM(4, 6, batch_first=True), torch.randn(1, 5, 4), {}, ["input"]),
        (nn.Linear(4, 4).double(), torch.randn(1, 4, dtype=torch.float64), None, ["input"]),
        (nn.Linear(4, 4).half(), torch.randn(1, 4).half(), None, ["input"]),
        (Function(lambda x: x.clone().mul_(2)), torch.randn(1, 4), None, ["x"]),
    ],
    ids=["nested", "kwargs-reordered", "unbatched-input", "variadic", "lstm", "float64", "float16", "in-place"],
)
def test_inputs_of_every_form(tmp_path, model, args, kwargs, inputs):
    result = export_onnx(model, tmp_path / "model.onnx", args, kwargs)
    assert result.dynamic_batch, result.static_reason
    assert {1, 3} <= set(result.batches_checked)
    assert list(shapes(onnx.load(result.path).graph.input)) == inputs


def test_an_input_changed_in_place_stays_as_it_was(tmp_path):
    example = torch.ones(2, 4)
    export_onnx(Function(lambda x: x.add_(1)), tmp_path / "model.onnx", example)
    assert torch.equal(example, torch.ones(2, 4))


def test_a_buffer_changed_by_forward_stays_as_it_was(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return x * 2

    model = Counting()
    export_onnx(model, tmp_path / "model.onnx", torch.ones(2, 4))
    assert model.calls.item() == 0


def test_a_model_that_fixes_the_batch_is_exported_with_it(tmp_path):
    result = export_onnx(Function(lambda x: x.reshape(2, -1) * x.shape[0]), tmp_path / "model.onnx", torch.randn(2, 4))
    assert not result.dynamic_batch
    assert result.batches_checked == (2,)
    assert "fixes the first dimension of input 'x'" in result.static_reason
    assert shapes(onnx.load(result.path).graph.input) == {"x": [2, 4]}


def test_a_fixed_batch_of_one_stays_one(tmp_path):
    result = export_onnx(Function(lambda x: x.reshape(4, 4).T), tmp_path / "model.onnx", torch.randn(1, 16))
    assert not result.dynamic_batch
    assert "fails at batch 3" in result.static_reason
    assert shapes(onnx.load(result.path).graph.input) == {"x": [1, 16]}


def test_a_model_without_batch(tmp_path):
    result = export_onnx(Function(lambda x: x * 2), tmp_path / "model.onnx", torch.tensor(1.5))
    assert (result.dynamic_batch, result.batches_checked) == (False, ())
    assert "no example input is a tensor with a first dimension" in result.static_reason


def test_weights_over_the_limit_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_EMBEDDED_BYTES", 1000)
    result = export_onnx(nn.Linear(64, 64), tmp_path / "big.onnx", torch.randn(1, 64))
    assert sorted(os.listdir(tmp_path)) == ["big.onnx", "big.onnx.data"]
    assert result.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.zeros((7, 64), np.float32)})[0].shape == (7, 64)


def test_nothing_is_printed(tmp_path, capfd):
    export_onnx(Function(lambda x: (x * 2, None)), tmp_path / "model.onnx", torch.randn(1, 4))
    with pytest.raises(ExportError, match="data-dependent"):
        export_onnx(Function(lambda x: x if x.sum() > 0 else -x), tmp_path / "model.onnx", torch.randn(1, 4))
    assert capfd.readouterr() == ("", "")


def test_a_result_that_differs_is_refused(tmp_path, monkeypatch):
    model = nn.Linear(4, 4)

    def damaged(program, draft, *rest, **options):
        proto = save(program, draft, *rest, **options)
        bias = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) == [4])
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
        draft.write_bytes(proto.SerializeToString())
        return proto

    save = module._save
    monkeypatch.setattr(module, "_save", damaged)
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")
    with pytest.raises(ExportError, match="'linear' at batch 2 .*by 1, "):
        export_onnx(model, target, torch.randn(2, 4))
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert target.read_bytes() == b"old"


def test_a_random_model_is_refused(tmp_path):
    with pytest.raises(ExportError, match="draws random numbers"):
        export_onnx(Function(lambda x: x + torch.rand_like(x)), tmp_path / "model.onnx", torch.randn(2, 4))


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 8, 8).double(), r"Conv.*few float64 kernels.*float\(\)"),
        (nn.Linear(4, 4).bfloat16(), torch.randn(2, 4).bfloat16(), r"bfloat16.*copy.deepcopy\(model\).float\(\)"),
        (Function(torch.special.airy_ai), torch.randn(2, 4), "No ONNX function found for .*airy_ai"),
        (Function(lambda x: (x, 3)), torch.randn(2, 4), "returns a int beside its tensors"),
        (nn.Linear(5, 4), torch.randn(2, 4), "Linear itself fails at batch 2: mat1 and mat2"),
    ],
    ids=["float64-conv", "bfloat16", "no-onnx-operator", "int-output", "wrong-example"],
)
def test_what_cannot_be_exported_says_why(tmp_path, model, example, message):
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "model.onnx", example)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["write", "fsync"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, place):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")
    monkeypatch.setattr(*((os, "fsync", full) if place == "fsync" else (Path, "write_bytes", full)))
    with pytest.raises(OutputError, match="No space left on device"):
        export_onnx(nn.Linear(4, 4), target, torch.randn(1, 4))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert target.read_bytes() == b"old"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"absent/model.onnx.*Expected a folder that exists"):
        export_onnx(nn.Linear(4, 4), tmp_path / "absent" / "model.onnx", torch.randn(1, 4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"check_batches": (1, 0)}, ArgumentError, "check_batches must hold whole numbers of at least 1, but got 0"),
        ({"check_batches": (True,)}, ArgumentError, "but got True"),
        ({"rtol": -1.0}, ArgumentError, "rtol must be a finite number of at least 0"),
        ({"rtol": 10**400}, ArgumentError, "rtol must be a finite number of at least 0"),
        ({"atol": float("nan")}, ArgumentError, "atol must be a finite number"),
        ({"args": ()}, ArgumentError, r"do not fit Linear.forward.*missing a required argument: 'input'"),
        ({"kwargs": {"typo": 1}}, ArgumentError, "unexpected keyword argument 'typo'"),
        ({"args": torch.randn(0, 4)}, ArgumentError, "empty first dimension"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        export_onnx(nn.Linear(4, 4), tmp_path / "model.onnx", **({"args": torch.randn(1, 4)} | options))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_a_tolerance_may_be_a_whole_number_of_any_size(tmp_path, name):
    file = export_onnx(nn.Linear(4, 4), tmp_path / "model.onnx", torch.randn(1, 4), **{name: 10**30})
    assert file.dynamic_batch


def test_meta_weights_are_refused(tmp_path):
    with pytest.raises(WeightError, match="'weight' is on the meta device"):
        export_onnx(nn.Linear(4, 4, device="meta"), tmp_path / "model.onnx", torch.randn(1, 4))


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0),
        ([1.0, -2.0], [1.001, -2.0], 1e-3 / (1 + 2)),
        ([1.0, -2.0, -1e9], [1.001, -2.0, -1e9], 1e-3 / (1 + 2)),
        ([float("nan"), float("inf"), 4.0], [float("nan"), float("inf"), 4.0], 0.0),
        ([0.0, 1.0], [1e-6, 1.0], 1e-6),
        ([], [], 0.0),
    ],
)
def test_the_relative_error(expected, actual, error):
    check = module._Tolerance(rtol=1e-3, atol=1e-5)
    assert check.compare("y", 1, np.array(expected), np.array(actual)) == pytest.approx(error)


@pytest.mark.parametrize(
    ("expected", "actual", "message"),
    [
        (np.array([1.0, 2.0]), np.array([1.0, 2.1]), "output 'y' at batch 3 differs from torch by 0.1"),
        (np.array([1.0, 2.0, -1e9]), np.array([1.0, 2.1, -1e9]), "by 0.1, with 0.004.* allowed where torch gives 2"),
        (np.array([1.0]), np.array([np.nan]), "by inf"),
        (np.array([1.0]), np.array([np.inf]), "by inf"),
        (np.array([5]), np.array([6]), "by 1, with 0 allowed"),
        (np.array([1.0]), np.array([[1.0]]), r"has shape \(1, 1\) in onnxruntime, but \(1,\) in torch"),
    ],
)
def test_differences_are_refused(expected, actual, message):
    with pytest.raises(ExportError, match=message):
        module._Tolerance(rtol=1e-3, atol=1e-5).compare("y", 3, expected, actual)


def test_python_random_state_is_left_alone(tmp_path):
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    result = export_onnx(nn.Linear(4, 4), tmp_path / "model.onnx", torch.randn(1, 4), check_batches=())
    assert isinstance(result, OnnxFile)
    assert result.batches_checked == (1,)
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == numpy_state


def test_translations_are_gathered_once_and_files_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registration = importlib.import_module("torch.onnx._internal.exporter._registration")
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval(), torch.randn(2, 4)
    before, calls = registration.ONNXRegistry.__dict__["from_torchlib"], []

    def counted(kind: Any, *given: Any, **words: Any) -> Any:
        calls.append(words)
        return before.__func__(kind, *given, **words)

    monkeypatch.setattr(_registry, "_gathered", {})
    monkeypatch.setattr(registration.ONNXRegistry, "from_torchlib", classmethod(counted))
    files = []
    for number in range(3):
        export_onnx(model, tmp_path / f"{number}.onnx", x)
        files.append((tmp_path / f"{number}.onnx").read_bytes())
    assert len(calls) == 1
    assert files == [files[0]] * 3
    monkeypatch.delattr(registration.ONNXRegistry, "from_torchlib")  # as a torch that gathers in another way
    with _registry.gathering_once():
        assert not hasattr(registration.ONNXRegistry, "from_torchlib")


def test_what_an_export_adds_to_the_translations_is_not_in_the_next() -> None:
    registration = importlib.import_module("torch.onnx._internal.exporter._registration")
    with _registry.gathering_once():
        one, two = (registration.ONNXRegistry.from_torchlib() for _ in range(2))
        one.register_op(torch.ops.aten.relu.default, lambda x: x)
        assert len(one.get_decomps(torch.ops.aten.relu.default)) > len(two.get_decomps(torch.ops.aten.relu.default))
