"""Candidates for a pruned model: exported without a proof, and timed against the dense model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._aligned_widths import first_units
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._plan import PruningPlan, make_plan
from torchshear.graph import ExampleInputs
from torchshear.speedup.latency._compare import LatencyComparison, compare_latency
from torchshear.speedup.latency._device import Device
from torchshear.speedup.latency._kernels import Profile, profile_kernels
from torchshear.speedup.onnx._arguments import ExampleCall
from torchshear.speedup.onnx._export import export_onnx
from torchshear.speedup.onnx._session import open_session
from torchshear.speedup.shrinking._parts import shrink_parts
from torchshear.speedup.shrinking._whole_model import make_unproved_traced

Indices = npt.NDArray[np.int64]

_ROUNDS = 15
_SECONDS = 0.01  # of one sample


class Candidates:
    """Files of a dense model and of candidates, with inputs for all of them.

    Args:
        model: the dense model.
        groups: its analysis.
        args: example positional arguments.
        kwargs: example keyword arguments.
        device: where they run.
        folder: where the files go.
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
        self._inputs = ExampleInputs.of(args, kwargs)
        self._device = device
        self._folder = folder
        self.dense = self.export(model, "dense")
        call = ExampleCall.of(model, self._inputs.args, self._inputs.kwargs).with_batch(device.batch)
        names = [node.name for node in open_session(self.dense).get_inputs()]
        arrays = [tensor.cpu().numpy() for tensor in call.tensors().values()]
        self.feeds: Mapping[str, np.ndarray] = dict(zip(names, arrays, strict=True))

    def export(self, model: nn.Module, name: str) -> Path:
        """Write a model that takes the same inputs, and run it once.

        Raises:
            ExportError: it cannot be exported.
        """
        path = self._folder / f"{name}.onnx"
        export_onnx(model, path, self._inputs.args, self._inputs.kwargs, check_batches=(self._device.batch,))
        return path

    def export_plan(self, plan: PruningPlan, name: str) -> Path:
        """Write what a plan leaves of the model, in traced form and without a proof."""
        if self._groups.graph.parts is None:
            return self.export(make_unproved_traced(self._model, self._groups, plan), name)
        return self.export(shrink_parts(self._model, self._groups, plan, "traced").model, name)

    def export_widths(self, widths: Mapping[str, int], name: str) -> Path:
        """Write the model at some widths of its groups, whichever units stay."""
        by_name = {group.name: group for group in self._groups}
        kept = {group: first_units(by_name[group], width) for group, width in widths.items()}
        return self.export_plan(make_plan(Cut(self._groups, kept), kept, {"kept": "the first"}, {}), name)

    def compare(self, path: Path, rounds: int = _ROUNDS) -> LatencyComparison:
        """Time a file and the dense one in the same rounds; they are called "dense" and "pruned"."""
        return self.compare_files({"pruned": path}, rounds)

    def compare_files(self, paths: Mapping[str, Path], rounds: int) -> LatencyComparison:
        """Time files, by their names, and the dense one, called "dense", in the same rounds."""
        return compare_latency(
            {"dense": self.dense, **paths},
            inputs=self.feeds,
            threads=self._device.threads,
            rounds=rounds,
            warmup=3,
            min_seconds=_SECONDS,
            progress=False,
        )

    def profile(self, path: Path) -> Profile:
        """Return the times of the kernels of a file."""
        return profile_kernels(path, self._device.threads, self.feeds)


def quiet_ms(comparison: LatencyComparison, name: str) -> float:
    """Return the lower quartile of the times of a model: what it takes while little else runs."""
    return float(np.quantile(comparison[name].times_ms, 0.25))
