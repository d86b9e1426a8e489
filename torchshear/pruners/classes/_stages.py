"""What pruner classes call and this package may not import: the stages behind the plan.

Deciding and making real are siblings that do not know each other. A class that goes from one to the other therefore
says here what it needs, and `torchshear`, which knows both, provides it when it is imported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

from torch import nn

from torchshear.dependency import PruningPlan
from torchshear.dependency.alignment import Alignment


class Pruned(Protocol):
    """A shrunk and verified model, as `torchshear.PruneResult`."""

    @property
    def model(self) -> nn.Module:
        """The pruned model, really smaller."""
        ...

    @property
    def plan(self) -> PruningPlan:
        """What was kept."""
        ...

    @property
    def report(self) -> object:
        """What was asked and done, group by group; `str()` of it is a table."""
        ...

    @property
    def verification(self) -> object:
        """How closely the pruned model agrees with the masked one."""
        ...

    @property
    def form(self) -> str:
        """Either "native" or "traced"."""
        ...


class Finish(Protocol):
    """Shrinks a model by a plan, and proves the result."""

    def __call__(
        self, model: nn.Module, plan: PruningPlan, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
    ) -> Pruned:
        """Give the pruned model; the one given is left as it is."""
        ...


class Export(Protocol):
    """Writes a model as ONNX, and checks the file."""

    def __call__(
        self,
        model: nn.Module,
        path: str | PathLike[str],
        args: tuple[Any, ...] = ...,
        kwargs: Mapping[str, Any] | None = ...,
    ) -> object:
        """Write the file."""
        ...


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages behind the plan.

    Attributes:
        finish: shrinks and verifies.
        export_onnx: writes ONNX.
        resolve_alignment: turns what a user wrote into an alignment.
    """

    finish: Finish
    export_onnx: Export
    resolve_alignment: Callable[[int | str | Alignment | None], Alignment]


_PROVIDED: list[Stages] = []


def provide_stages(stages: Stages) -> None:
    """Say what the stages are; done once, by `torchshear`."""
    _PROVIDED[:] = [stages]


def provided_stages() -> Stages:
    """The stages behind the plan."""
    assert _PROVIDED, "torchshear provides them when it is imported, and no part of it is imported before"
    return _PROVIDED[0]
