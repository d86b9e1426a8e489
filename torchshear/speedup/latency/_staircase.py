"""The staircase of a device: which numbers of channels its kernels run well, by measurement."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from torchshear._arguments import check_flag, check_kind
from torchshear.dependency import Alignment
from torchshear.errors import ArgumentError
from torchshear.speedup.latency._cache import ProbeFile, only_measurement
from torchshear.speedup.latency._device import ONNXRUNTIME, Device
from torchshear.speedup.onnx._session import open_session
from torchshear.storage._reading import UnreadableError, read_json
from torchshear.storage._writing import atomic_path

Floats = npt.NDArray[np.float64]

WIDTHS: Final = tuple(range(4, 65, 4))
_SIZES: Final = (4, 8, 16, 32)  # of blocks and granules
_ROUNDS: Final = 200
_QUICK: Final = 0.1  # the quantile of the times that counts: few other programs, and steadier than the least time
_PAYS: Final = 0.5  # of the time that a block would save if time were in proportion to the width
_PAYS_NARROW: Final = 0.25  # likewise of a granule, in dimensions of one block, where most of the time is fixed
_NOISY: Final = 0.05
_FORMAT: Final = 1
_LARGEST: Final = 1 << 20  # bytes of a file


@dataclass(frozen=True, slots=True, eq=False)
class Staircase:
    """Times of small models on a device, by the number of channels in their middle.

    Attributes:
        device: how they ran.
        times_ms: kind -> milliseconds at each of `widths`. "pointwise" is a 1x1 convolution with so many outputs,
            "spatial" two 3x3 convolutions with so many channels in between, "depthwise" such a convolution between two
            1x1 ones, and "product" two matrix products.
        widths: the numbers of channels, 4 to 64.
        noise: how far the times of two halves of the rounds are apart: the median of |first / second - 1|.
        remarks: what happened to the file of the cache, if anything.
    """

    device: Device
    times_ms: Mapping[str, tuple[float, ...]]
    widths: tuple[int, ...] = WIDTHS
    noise: float = 0.0
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Freeze the mapping."""
        object.__setattr__(self, "times_ms", MappingProxyType(dict(self.times_ms)))

    @property
    def alignment(self) -> Alignment:
        """The widths that lie on steps.

        Its block is the smallest with which convolutions save, by one block less, half of what they would save if time
        were in proportion to the width, on average over widths and kinds. Its granule is the smallest from which on,
        up to the block, half of a width saves a quarter of that; so is the granule of matrix products.
        """
        convolutions = [kind for kind in self.times_ms if kind != "product"]
        odd = {size: range(size, max(self.widths), 2 * size) for size in _SIZES[:-1]}
        block = next((size for size in odd if self._saving(convolutions, size, odd[size]) >= _PAYS), _SIZES[-1])

        def granule(kinds: list[str]) -> int:
            found = block
            for size in reversed([size for size in _SIZES if size < block]):
                if self._saving(kinds, size, [size]) < _PAYS_NARROW:
                    break
                found = size
            return found

        name = f"measured, {self.device.threads} threads"
        return Alignment(block, granule(convolutions), name, granule(["product"]))

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks, one sentence each."""
        noisy = f"The machine was noisy: times of two halves of the rounds are {self.noise:.0%} apart."
        return (*self.remarks, *((noisy,) if self.noise > _NOISY else ()))

    def _saving(self, kinds: list[str], size: int, steps: Iterable[int]) -> float:
        """Return what some widths save against those a size wider, as a share of a proportional saving, at most 2."""
        shares = []
        for kind in kinds:
            at = dict(zip(self.widths, self.times_ms[kind], strict=True))
            each = (at[64] - at[16]) / 48  # what a channel costs
            saved = float(np.mean([at[width + size] - at[width] for width in steps]))
            shares.append(min(saved / (each * size), 2.0) if each > 0 else 0.0)
        return float(np.mean(shares))

    def __str__(self) -> str:
        one = self.alignment
        rows = [
            f"{kind:<9} " + " ".join(f"{width}:{ms:.3f}" for width, ms in zip(self.widths, times, strict=True))
            for kind, times in self.times_ms.items()
        ]
        head = f"blocks of {one.block}, granules of {one.granule} and {one.granule_of(False)} between matrix products"
        return "\n".join([f"{head}; milliseconds by channels:", *rows, *self.notes])


def measure_staircase(device: Device | None = None, *, use_cache: bool = True) -> Staircase:
    """Measure which numbers of channels this machine runs well, by small models of 4 to 64 channels.

    That takes seconds, and is kept in the user's cache folder, or that of the environment variable TORCHSHEAR_CACHE,
    for this processor, runtime and number of threads. One process of a machine measures at a time.

    Args:
        device: how they run; None: one thread, one sample.
        use_cache: whether an earlier measurement is read, and a new one kept.

    Returns:
        The times; `.alignment` is what `align="measured"` takes.

    Raises:
        ArgumentError: an argument is of another type, or the device has another runtime than onnxruntime.
        LatencyError: onnxruntime does not run them.
        OutputError: the cache folder cannot be written to.
    """
    if device is not None:
        check_kind("device", device, Device, "a torchshear.speedup.latency.Device")
    check_flag("use_cache", use_cache)
    device = device or Device()
    if device.runtime != ONNXRUNTIME:
        raise ArgumentError(
            f"runtime={device.runtime!r}: a staircase is measured with models of onnxruntime. Leave runtime= out, or "
            f"align widths by a profile in place of 'measured', as align='auto'."
        )
    file = ProbeFile.of({"staircase": _FORMAT} | dict(device.identity()))
    with only_measurement():
        remarks: tuple[str, ...] = ()
        if use_cache and file.path.exists():
            try:
                return _of_document(device, read_json(file.path, _LARGEST))
            except (UnreadableError, LookupError, TypeError, ValueError, AttributeError) as error:
                remarks = (f"The file of an earlier staircase, {str(file.path)!r}, was damaged ({error}).",)
        made = _measure(device, remarks)
        if use_cache:
            document = {
                "key": dict(file.key),
                "times_ms": {kind: list(times) for kind, times in made.times_ms.items()},
                "noise": made.noise,
            }
            with atomic_path(file.path) as temporary:
                temporary.write_text(json.dumps(document), encoding="utf-8")
        return made


def _of_document(device: Device, document: Mapping[str, Any]) -> Staircase:
    times = {kind: tuple(map(float, document["times_ms"][kind])) for kind in _KINDS}
    if any(len(found) != len(WIDTHS) or not min(found) > 0 for found in times.values()):
        raise ValueError("times are missing")
    return Staircase(device, times, noise=float(document["noise"]))


def _measure(device: Device, remarks: tuple[str, ...]) -> Staircase:
    """Time all models, those of a kind in the same rounds."""
    order, times_ms, gaps = np.random.default_rng(0), {}, list[Floats]()
    with TemporaryDirectory(prefix="torchshear-") as folder:
        path = Path(folder) / "model.onnx"
        for kind, build in _KINDS.items():
            runs = []
            for width in WIDTHS:
                model = build(width)
                path.write_bytes(model.SerializeToString())
                shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
                feeds = {"x": np.ones([device.batch, *shape[1:]], np.float32)}
                runs.append((open_session(path, device.threads, provider=device.provider), feeds))
                runs[-1][0].run(None, feeds)
            seconds = np.zeros((_ROUNDS, len(runs)))
            for round_seconds in seconds:
                for number in order.permutation(len(runs)):
                    session, feeds = runs[number]
                    start = time.perf_counter()
                    session.run(None, feeds)
                    round_seconds[number] = time.perf_counter() - start
            times_ms[kind] = tuple((np.quantile(seconds, _QUICK, axis=0) * 1e3).tolist())
            halves = [np.quantile(half, _QUICK, axis=0) for half in (seconds[::2], seconds[1::2])]
            gaps.append(np.abs(halves[0] / halves[1] - 1))
    return Staircase(device, times_ms, noise=float(np.median(gaps)), remarks=remarks)


def _pointwise(width: int) -> onnx.ModelProto:
    nodes: list[_Node] = [
        _convolution("x", "y0", 24, width, 1),
        ("Relu", ["y0"], "y1", {}),
        ("GlobalAveragePool", ["y1"], "y", {}),
    ]
    return _model(nodes, (24, 28, 28))


def _spatial(width: int) -> onnx.ModelProto:
    nodes: list[_Node] = [
        _convolution("x", "y0", 32, width, 3),
        ("Relu", ["y0"], "y1", {}),
        _convolution("y1", "y", width, 32, 3),
    ]
    return _model(nodes, (32, 14, 14))


def _depthwise(width: int) -> onnx.ModelProto:
    nodes: list[_Node] = [
        _convolution("x", "y0", 32, width, 1),
        ("Relu", ["y0"], "y1", {}),
        _convolution("y1", "y2", width, width, 3, width),
        ("Relu", ["y2"], "y3", {}),
        _convolution("y3", "y", width, 32, 1),
    ]
    return _model(nodes, (32, 14, 14))


def _product(width: int) -> onnx.ModelProto:
    first, second = np.full((256, width), 0.01, np.float32), np.full((width, 256), 0.01, np.float32)
    nodes: list[_Node] = [
        ("MatMul", ["x", first], "y0", {}),
        ("Relu", ["y0"], "y1", {}),
        ("MatMul", ["y1", second], "y", {}),
    ]
    return _model(nodes, (128, 256))


_Node = tuple[str, list[Any], str, Mapping[str, Any]]  # operator, inputs (names, or weights), output, attributes
_KINDS: Final[Mapping[str, Callable[[int], onnx.ModelProto]]] = MappingProxyType(
    {"pointwise": _pointwise, "spatial": _spatial, "depthwise": _depthwise, "product": _product}
)


def _convolution(read: str, made: str, inputs: int, outputs: int, size: int, groups: int = 1) -> _Node:
    weight = np.full((outputs, inputs // groups, size, size), 0.01, np.float32)
    return "Conv", [read, weight, np.zeros(outputs, np.float32)], made, {"group": groups, "pads": [size // 2] * 4}


def _model(nodes: list[_Node], shape: tuple[int, ...]) -> onnx.ModelProto:
    """Make a model from "x", of a sample of this shape, to "y"."""
    made, weights = [], []
    for operator, inputs, output, attributes in nodes:
        names = []
        for number, one in enumerate(inputs):
            names.append(one if isinstance(one, str) else f"{output}_{number}")
            weights += [] if isinstance(one, str) else [numpy_helper.from_array(one, names[-1])]
        made.append(helper.make_node(operator, names, [output], **attributes))
    value = helper.make_tensor_value_info
    read = value("x", onnx.TensorProto.FLOAT, ["batch", *shape])
    graph = helper.make_graph(made, "staircase", [read], [value("y", onnx.TensorProto.FLOAT, None)], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
