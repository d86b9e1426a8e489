"""The interface of a runtime: it can take a model, run it again and again, and time its kernels."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from torchshear.dependency import ChannelGroups
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.speedup.latency._comparison import Run
from torchshear.speedup.latency._kernels import Profile


class ReadyModel(ABC):
    """A model in the form in which its runtime runs it."""

    @property
    @abstractmethod
    def path(self) -> Path | None:
        """Its ONNX file; None where a module is run."""

    @abstractmethod
    def running(self) -> AbstractContextManager[Run]:
        """Open it for a block; gives a function that runs it once on the example inputs and returns when it is done.

        Settings of the process that running needs are made for the block, and put back.
        """

    @abstractmethod
    def profile(self) -> Profile:
        """Return the times of its kernels.

        Raises:
            LatencyError: it does not run, or its times cannot be read.
        """


class Runtime(ABC):
    """A runtime with example inputs, which all of its models take.

    An implementation is a file of its own; `_candidates.py` chooses between them by the device.
    """

    @property
    @abstractmethod
    def processor(self) -> str:
        """Name of the processor that models run on."""

    @abstractmethod
    def prepare(self, model: nn.Module, name: str) -> ReadyModel:
        """Make a model ready; the model itself is left as it is.

        Args:
            model: a model that takes the example inputs.
            name: its name in messages; a file by this name is written over.

        Raises:
            ExportError: it cannot be exported, where that is needed.
            LatencyError: it does not run.
        """

    @abstractmethod
    def shrink(self, model: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> nn.Module:
        """Make a smaller model, without a proof, in a form that is as fast as the result of a pruning will be."""
