"""Candidates for a pruned model: made ready for the runtime of a device, and timed against the dense model."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._aligned_widths import first_units
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.graph import ExampleInputs
from torchshear.speedup.latency._comparison import LatencyComparison, Rounds
from torchshear.speedup.latency._device import ONNXRUNTIME, Device
from torchshear.speedup.latency._onnx_runtime import OnnxRuntime
from torchshear.speedup.latency._runtime import ReadyModel, Runtime
from torchshear.speedup.latency._torch_runtime import TorchRuntime

_ROUNDS = 15
_SECONDS = 0.01  # of one sample
_PRECISION: Final = 0.005  # standard error of a speed-up, as a share of it
_MOST_SECONDS: Final = 10.0  # after which no more rounds are made, though that is not reached


class Candidates:
    """A dense model and candidates that are measured against it.

    Args:
        model: the dense model.
        groups: its analysis.
        args: example positional arguments.
        kwargs: example keyword arguments.
        device: where they run.
        folder: where files go, if the runtime reads any.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ChannelGroups,
        args: tuple[Any, ...] | Tensor,
        kwargs: Mapping[str, Any] | None,
        device: Device,
        folder: Path,
    ) -> None:
        self._model = model
        self._groups = groups
        self._device = device
        inputs = ExampleInputs.of(args, kwargs)
        self._runtime: Runtime = (
            OnnxRuntime(model, inputs, device, folder)
            if device.runtime == ONNXRUNTIME
            else TorchRuntime(model, inputs, device)
        )
        self.dense = self.prepare(model, "dense")

    def prepare(self, model: nn.Module, name: str) -> ReadyModel:
        """Make a model ready that takes the same inputs.

        Raises:
            ExportError: it cannot be exported, where the runtime needs that.
            LatencyError: it does not run.
        """
        return self._runtime.prepare(model, name)

    def prepare_plan(self, plan: PruningPlan, name: str) -> ReadyModel:
        """Make ready what a plan leaves of the model, without a proof."""
        return self.prepare(self._runtime.shrink(self._model, self._groups, plan), name)

    def prepare_widths(self, widths: Mapping[str, int], name: str) -> ReadyModel:
        """Make the model ready at some widths of its groups, whichever units stay."""
        by_name = {group.name: group for group in self._groups}
        kept = {group: first_units(by_name[group], width) for group, width in widths.items()}
        return self.prepare_plan(make_plan(Cut(self._groups, kept), kept, {"kept": "the first"}, {}), name)

    def compare(self, model: ReadyModel, rounds: int = _ROUNDS, patience: float = 1.0) -> LatencyComparison:
        """Time a model and the dense one in the same rounds, as `compare_all` does; they are "dense" and "pruned"."""
        return self.compare_all({"pruned": model}, rounds, patience)

    def compare_all(self, models: Mapping[str, ReadyModel], rounds: int, patience: float = 1.0) -> LatencyComparison:
        """Time models, by their names, and the dense one, called "dense", in the same rounds.

        Rounds are made until the speed-ups are known to half a per cent, or for ten seconds. Where other programs run,
        medians of many rounds were found closer to the truth than lower quartiles, and those closer than least times.

        Args:
            models: name -> model.
            rounds: times kept per model, at least.
            patience: share of the ten seconds.
        """
        everything = {"dense": self.dense, **models}
        seconds = patience * _MOST_SECONDS
        measuring = Rounds(rounds=rounds, warmup=3, min_seconds=_SECONDS, precision=_PRECISION, most_seconds=seconds)
        with ExitStack() as stack:
            runs = {name: stack.enter_context(model.running()) for name, model in everything.items()}
            results = measuring.time(runs, {name: model.path for name, model in everything.items()})
        return LatencyComparison(
            results,
            "dense",
            self._device.batch,
            self._device.threads,
            self._device.runtime_name,
            self._runtime.processor,
        )
