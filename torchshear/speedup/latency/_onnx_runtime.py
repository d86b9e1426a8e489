"""The runtime "onnxruntime": models are exported to ONNX files, and run by one of its execution providers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.graph import ExampleInputs
from torchshear.speedup.latency._comparison import Run
from torchshear.speedup.latency._device import Device, cpu_name
from torchshear.speedup.latency._kernels import Profile, profile_kernels
from torchshear.speedup.latency._runtime import ReadyModel, Runtime
from torchshear.speedup.onnx._arguments import ExampleCall
from torchshear.speedup.onnx._export import export_onnx
from torchshear.speedup.onnx._session import open_session, run_of
from torchshear.speedup.shrinking._parts import shrink_parts
from torchshear.speedup.shrinking._whole_model import make_unproved_traced


@dataclass(frozen=True, slots=True, eq=False)
class OnnxModel(ReadyModel):
    """An ONNX file.

    Attributes:
        file: the file.
        inputs: example inputs of the model, in the order of those of the file.
        device: how it runs.
    """

    file: Path
    inputs: tuple[np.ndarray, ...]
    device: Device

    @property
    def path(self) -> Path:
        """The file."""
        return self.file

    @contextmanager
    def running(self) -> Iterator[Run]:
        """Open a session for a block."""
        session = open_session(self.file, self.device.threads, provider=self.device.provider)
        names = [node.name for node in session.get_inputs()]
        yield run_of(session, dict(zip(names, self.inputs, strict=True)))

    def profile(self) -> Profile:
        """Return the times that onnxruntime's profiler gives."""
        return profile_kernels(self.file, self.inputs, self.device)


class OnnxRuntime(Runtime):
    """Files of models, with inputs for all of them.

    Args:
        model: the dense model.
        inputs: its example inputs.
        device: how files run.
        folder: where they go.
    """

    def __init__(self, model: nn.Module, inputs: ExampleInputs, device: Device, folder: Path) -> None:
        self._given = inputs
        self._device = device
        self._folder = folder
        call = ExampleCall.of(model, inputs.args, inputs.kwargs).with_batch(device.batch)
        self._arrays = tuple(tensor.cpu().numpy() for tensor in call.tensors().values())

    @property
    def processor(self) -> str:
        """The CPU, which runs all that a provider does not."""
        return cpu_name()

    def prepare(self, model: nn.Module, name: str) -> OnnxModel:
        """Write a model into a file, run it once, and compare what it gives.

        Raises:
            ExportError: it cannot be exported.
        """
        path = self._folder / f"{name}.onnx"
        export_onnx(model, path, self._given.args, self._given.kwargs, check_batches=(self._device.batch,))
        return OnnxModel(path, self._arrays, self._device)

    def shrink(self, model: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> nn.Module:
        """Make the traced form, which exports as the native one does."""
        if groups.graph.parts is None:
            return make_unproved_traced(model, groups, plan)
        return shrink_parts(model, groups, plan, "traced").model
