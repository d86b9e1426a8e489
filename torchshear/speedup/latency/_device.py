"""The device that latency is measured on: a runtime, its threads, and the batch."""

import importlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnxruntime
import torch

from torchshear._arguments import check_count, check_kind, check_one_of
from torchshear.errors import ArgumentError
from torchshear.speedup.onnx._session import CPU

_CPU_INFO = Path("/proc/cpuinfo")
ONNXRUNTIME: Final = "onnxruntime"
EAGER: Final = "torch"
COMPILED: Final = "torch.compile"
_RUNTIMES = (ONNXRUNTIME, EAGER, COMPILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Runtime, threads and batch with which a model is run on this machine.

    Attributes:
        threads: intra-op threads; inter-op is 1, and those of onnxruntime do not spin.
        batch: samples of one inference.
        runtime: "onnxruntime" runs what the model is exported to; "torch" the module itself, and "torch.compile" what
            that makes of it, where the model's weights are: on the CPU, or on a GPU.
        provider: the execution provider of onnxruntime, by its name there, as "CUDAExecutionProvider"; the CPU's runs
            the operators that it lacks.

    Raises:
        ArgumentError: a number is below 1, the runtime is unknown, the provider is not installed or not one of this
            runtime, or there is no C++ compiler for "torch.compile".

    Example:
        >>> Device(threads=2)
        Device(threads=2, batch=1, runtime='onnxruntime', provider='CPUExecutionProvider')
    """

    threads: int = 1
    batch: int = 1
    runtime: str = ONNXRUNTIME
    provider: str = CPU

    def __post_init__(self) -> None:
        """Refuse what cannot be run here."""
        check_count("threads", self.threads)
        check_count("batch", self.batch)
        check_one_of("runtime", self.runtime, _RUNTIMES)
        check_kind("provider", self.provider, str, "the name of an execution provider of onnxruntime")
        installed = onnxruntime.get_available_providers()
        if self.provider not in installed:
            raise ArgumentError(f"provider={self.provider!r} is not installed; onnxruntime has {', '.join(installed)}.")
        if self.runtime != ONNXRUNTIME and self.provider != CPU:
            raise ArgumentError(
                f"provider={self.provider!r} beside runtime={self.runtime!r}; providers are onnxruntime's. Leave it "
                f"out: torch runs a model where its weights are."
            )
        if self.runtime == COMPILED:
            _check_compiler()

    @property
    def runtime_name(self) -> str:
        """Name and version of the runtime, and the provider unless that is the CPU's."""
        version = onnxruntime.__version__ if self.runtime == ONNXRUNTIME else torch.__version__
        return f"{self.runtime} {version}" + ("" if self.provider == CPU else f", {self.provider}")

    def identity(self) -> Mapping[str, str | int]:
        """Return what times depend on beside the model: this value, the version of the runtime, and the processor."""
        version = onnxruntime.__version__ if self.runtime == ONNXRUNTIME else torch.__version__
        provider = {"provider": self.provider} if self.runtime == ONNXRUNTIME else {}
        return {
            "runtime": f"{self.runtime} {version}",
            **provider,
            "threads": self.threads,
            "batch": self.batch,
            "cpu": cpu_name(),
        }


def _check_compiler() -> None:
    """Refuse "torch.compile" where torch finds no C++ compiler.

    Raises:
        ArgumentError: there is none.
    """
    builder = importlib.import_module("torch._inductor.cpp_builder")  # takes a second, and is needed here alone
    try:
        builder.get_cpp_compiler()
    except RuntimeError as error:
        raise ArgumentError(
            "runtime='torch.compile' needs a C++ compiler, and torch finds none. Install g++ or clang, name one in the "
            "environment variable CXX, or measure with runtime='torch' or 'onnxruntime'."
        ) from error


def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name"]
    return names[0] if names else platform.processor() or platform.machine()
