"""The runtimes "torch" and "torch.compile": modules are run as they are, or as torch compiles them."""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import LatencyError, WeightError, first_line
from torchshear.graph import ExampleInputs
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import run_exclusively, silence_torch
from torchshear.speedup.latency._comparison import Run, without_garbage_collection
from torchshear.speedup.latency._device import COMPILED, Device, cpu_name
from torchshear.speedup.latency._kernels import Profile
from torchshear.speedup.latency._runtime import ReadyModel, Runtime
from torchshear.speedup.latency._torch_kernels import profile_operators
from torchshear.speedup.onnx._arguments import ExampleCall
from torchshear.speedup.shrinking._parts import shrink_parts
from torchshear.speedup.shrinking._whole_model import shrink_whole

_Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
_RECOMPILES: Final = 1 << 20  # of one forward, which all candidates share; torch gives up after 8, and runs it eagerly
_LEAST_RUNS, _MOST_RUNS, _SECONDS = 15, 200, 1.0


@dataclass(frozen=True, slots=True, eq=False)
class TorchModel(ReadyModel):
    """A copy of a module, in eval mode.

    Attributes:
        module: the module.
        call: the same, or what torch compiled it to.
        arguments: what it is called with.
        device: its threads.
        gpu: the GPU that it lies on, if any; a run waits until that is done.
    """

    module: nn.Module
    call: Callable[..., object]
    arguments: _Arguments
    device: Device
    gpu: torch.device | None

    @property
    def path(self) -> None:
        """There is no file."""
        return None

    @contextmanager
    def running(self) -> Iterator[Run]:
        """Set the number of threads and inference mode for a block."""
        args, kwargs = self.arguments

        def run() -> object:
            made = self.call(*args, **kwargs)
            if self.gpu is not None:
                torch.cuda.synchronize(self.gpu)
            return made

        with _run_with(self.device):
            yield run

    def profile(self) -> Profile:
        """Return the times of all operators, run eagerly, and the least time of a whole run."""
        args, kwargs = self.arguments
        with self.running() as run, without_garbage_collection():
            start, seconds = time.perf_counter(), list[float]()
            while len(seconds) < _LEAST_RUNS or (len(seconds) < _MOST_RUNS and time.perf_counter() - start < _SECONDS):
                begin = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - begin)
            kernels = profile_operators(lambda: self.module(*args, **kwargs), self.gpu)
        return Profile(kernels, 0.0, min(seconds) * 1e3)


class TorchRuntime(Runtime):
    """Modules with inputs for all of them.

    Args:
        model: the dense model; what it lies on is what is measured.
        inputs: its example inputs.
        device: how modules run.

    Raises:
        WeightError: a weight is on the meta device.
    """

    def __init__(self, model: nn.Module, inputs: ExampleInputs, device: Device) -> None:
        self._device = device
        call = ExampleCall.of(model, inputs.args, inputs.kwargs).with_batch(device.batch)
        self._arguments: _Arguments = call.arguments
        tensors = (*model.parameters(), *model.buffers(), *call.tensors().values())
        if any(tensor.is_meta for tensor in tensors):
            raise WeightError("a weight or an example input is on the meta device. Load the weights to measure times.")
        self._gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)

    @property
    def processor(self) -> str:
        """The GPU that the model lies on, else the CPU."""
        return cpu_name() if self._gpu is None else torch.cuda.get_device_name(self._gpu)

    def prepare(self, model: nn.Module, name: str) -> TorchModel:
        """Copy a model, compile the copy if that is asked for, and run it once.

        Raises:
            LatencyError: it does not run on the example inputs with the batch of the device, or cannot be compiled.
        """
        twin = copy_model(model).eval()
        try:
            with silence_torch():  # compiling imports what warns, and says much
                call = torch.compile(twin, dynamic=False) if self._device.runtime == COMPILED else twin
                ready = TorchModel(twin, call, self._arguments, self._device, self._gpu)
                with ready.running() as run:
                    run()
        except Exception as error:  # a module may raise anything
            raise LatencyError(
                f"the {name} model does not run with runtime={self._device.runtime!r} at batch {self._device.batch}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        return ready

    def shrink(self, model: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> nn.Module:
        """Make the native form if there is one, since what a module does beside its operators takes time as well."""
        made = shrink_whole if groups.graph.parts is None else shrink_parts
        return made(model, groups, replace(plan, form=None), None).model


@contextmanager
def _run_with(device: Device) -> Iterator[None]:
    """Set the threads of the process, and inference mode, for a block."""
    limits = nullcontext()
    if device.runtime == COMPILED:
        config = importlib.import_module("torch._dynamo.config")
        limits = config.patch(recompile_limit=_RECOMPILES, accumulated_recompile_limit=_RECOMPILES)
    with run_exclusively(), limits:
        before = torch.get_num_threads()
        torch.set_num_threads(device.threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)
