"""The device that latency is measured on: a runtime, its threads, and the batch."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from torchshear._arguments import check_count, check_kind, check_one_of
from torchshear.errors import ArgumentError

_CPU_INFO = Path("/proc/cpuinfo")
_RUNTIMES = ("onnxruntime",)
_PROVIDERS = ("CPUExecutionProvider",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Runtime, threads and batch with which a model is run on this machine.

    Attributes:
        threads: intra-op threads; inter-op is 1, and threads do not spin.
        batch: samples of one inference.
        runtime: "onnxruntime".
        provider: the execution provider of onnxruntime: "CPUExecutionProvider".

    Raises:
        ArgumentError: a number is below 1, the runtime is unknown, or the provider is not installed or not measured.

    Example:
        >>> Device(threads=2)
        Device(threads=2, batch=1, runtime='onnxruntime', provider='CPUExecutionProvider')
    """

    threads: int = 1
    batch: int = 1
    runtime: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"

    def __post_init__(self) -> None:
        """Refuse what cannot be run here."""
        check_count("threads", self.threads)
        check_count("batch", self.batch)
        check_one_of("runtime", self.runtime, _RUNTIMES)
        check_kind("provider", self.provider, str, "the name of an execution provider of onnxruntime")
        installed = onnxruntime.get_available_providers()
        if self.provider not in installed:
            raise ArgumentError(f"provider={self.provider!r} is not installed; onnxruntime has {', '.join(installed)}.")
        if self.provider not in _PROVIDERS:
            raise ArgumentError(f"provider={self.provider!r} cannot be measured yet; expected {', '.join(_PROVIDERS)}.")

    def identity(self) -> Mapping[str, str | int]:
        """Return what times depend on beside the model: this value, the version of the runtime, and the processor."""
        return {
            "runtime": f"{self.runtime} {onnxruntime.__version__}",
            "provider": self.provider,
            "threads": self.threads,
            "batch": self.batch,
            "cpu": cpu_name(),
        }


def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name"]
    return names[0] if names else platform.processor() or platform.machine()
