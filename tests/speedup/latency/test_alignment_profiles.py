import platform
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from torchshear.dependency._alignment import Alignment
from torchshear.errors import ArgumentError
from torchshear.speedup.latency import _alignment_profiles as module
from torchshear.speedup.latency._alignment_profiles import detect_profile, profiles, resolve_alignment

ALL = sorted(profiles())


@pytest.mark.parametrize("name", ALL)
def test_every_profile_resolves_to_itself(name):
    resolved = resolve_alignment(name)
    assert resolved is profiles()[name]
    assert resolved.name == name
    assert resolved.block % resolved.granule == 0
    assert resolved.block % resolved.granule_of(False) == 0


@pytest.mark.parametrize(
    ("align", "block", "granule"),
    [
        (None, 1, 1),
        (1, 1, 1),
        (24, 24, 24),
        ("cpu-avx2", 16, 8),
        ("cpu-avx512", 16, 16),
        ("cuda-fp16", 8, 8),
        ("cuda-tf32", 4, 4),
        ("cuda-int8", 32, 16),
        ("ascend-fp16", 16, 16),
        ("ascend-fp16:8", 128, 16),
        ("ascend-int8:2", 64, 32),
    ],
)
def test_resolved_sizes(align, block, granule):
    resolved = resolve_alignment(align)
    assert (resolved.block, resolved.granule) == (block, granule)


def test_an_alignment_passes_through():
    own = Alignment(6, 3, "own")
    assert resolve_alignment(own) is own


def test_the_table_is_read_only():
    with pytest.raises(TypeError, match="does not support item assignment"):
        profiles()["cpu-avx2"] = Alignment.none()


def test_auto_is_the_detected_profile():
    assert resolve_alignment("auto") is profiles()[detect_profile()]


@pytest.mark.parametrize(
    ("machine", "cpu_info", "capability", "expected"),
    [
        ("aarch64", "", "DEFAULT", "cpu-arm64"),
        ("arm64", None, "DEFAULT", "cpu-arm64"),
        ("x86_64", "model name\t: x\nflags\t\t: sse2 avx2 avx512f avx512bw\n", "AVX2", "cpu-avx512"),
        ("x86_64", "flags\t\t: sse2 avx avx2\n", "AVX512", "cpu-avx2"),
        ("x86_64", "flags\t\t: sse2 avx\n", "AVX2", "cpu-sse"),
        ("AMD64", None, "AVX512", "cpu-avx512"),
        ("AMD64", None, "AVX2", "cpu-avx2"),
        ("AMD64", None, "DEFAULT", "cpu-sse"),
    ],
)
def test_detection(monkeypatch, tmp_path, machine, cpu_info, capability, expected):
    path = tmp_path / "cpuinfo"
    if cpu_info is not None:
        path.write_text(cpu_info)
    monkeypatch.setattr(module, "_CPU_INFO", path)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert detect_profile() == expected


@pytest.mark.parametrize(
    ("align", "message"),
    [
        (
            "cpu-avx",
            "unknown alignment profile 'cpu-avx'; the nearest is 'cpu-avx2'. Profiles: auto, measured, cpu-sse",
        ),
        ("CUDA-FP16", "the nearest is 'cuda-fp16'"),
        ("atuo", "the nearest is 'auto'"),
        ("", "unknown alignment profile ''"),
        ("cuda-fp16:8", "for Ascend profiles only, but got 'cuda-fp16:8'. Write 'cuda-fp16'"),
        ("ascend-fp16:0", "the number of cores in 'ascend-fp16:0' must be at least 1"),
        ("ascend-fp16:", "must be at least 1"),
        ("ascend-fp16:-2", "must be at least 1"),
        ("ascend-fp16:two", "must be at least 1"),
        (True, "but got align=True"),
        (0, "whole number of at least 1, a profile name"),
        (-8, "but got align=-8"),
        (8.0, "but got align=8.0"),
        ([8], r"but got align=\[8\]"),
    ],
)
def test_bad_alignments_are_refused(align, message):
    with pytest.raises(ArgumentError, match=message):
        resolve_alignment(align)


def kernels_of(widths: tuple[int, int], folder: Path) -> list[str]:
    """The operators that onnxruntime runs for a 1x1, a depthwise and a 1x1 convolution, at widths in between."""
    first, second = widths
    layers = ((24, first, 1), (first, first, first), (first, second, 1), (second, 24, 1))
    nodes, weights = [], []
    for number, (read, made, n_groups) in enumerate(layers):
        weight = np.full((made, read // n_groups, 1, 1), 0.1, np.float32)
        weights.append(onnx.numpy_helper.from_array(weight, f"w{number}"))
        nodes.append(onnx.helper.make_node("Conv", [f"x{number}", f"w{number}"], [f"x{number + 1}"], group=n_groups))
    value = onnx.helper.make_tensor_value_info
    ends = [value("x0", onnx.TensorProto.FLOAT, [1, 24, 4, 4])], [value("x4", onnx.TensorProto.FLOAT, None)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", *ends, weights),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns that the optimized graph is for this machine alone
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [f"{node.domain}:{node.op_type}" for node in onnx.load(options.optimized_model_filepath).graph.node]


def test_no_kernel_leaves_the_layout_at_widths_of_this_machine(tmp_path):
    dense = kernels_of((64, 32), tmp_path)
    if "com.microsoft.nchwc:Conv" not in dense:
        pytest.skip("onnxruntime has no blocked layout on this machine")
    alignment = resolve_alignment("auto")
    for wide, narrow in ((64, 32), (alignment.block, alignment.block)):
        for first in alignment.allowed_widths(wide):
            for second in alignment.allowed_widths(narrow):
                assert kernels_of((int(first), int(second)), tmp_path) == dense
    below = alignment.granule - 4
    for widths in ((below, 32), (64, below), (64, 31), (63, 32)):
        assert kernels_of(widths, tmp_path) != dense
    assert kernels_of((64, alignment.granule), tmp_path) == dense
