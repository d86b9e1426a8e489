"""What pruner classes need of the stages behind the plan, provided to them when torchshear is imported."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchshear.api import PruneResult, shrink_and_record
from torchshear.dependency import PruningPlan
from torchshear.pruners.classes import Stages, provide_stages
from torchshear.report import make_report
from torchshear.speedup import export_onnx, resolve_alignment


def finish(model: nn.Module, plan: PruningPlan, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> PruneResult:
    """Shrink a model by a plan, prove the result and report on it."""
    shrunk, plan = shrink_and_record(model, plan, args, kwargs)
    report = make_report(plan, f"{shrunk.form}: {shrunk.reason}", shrunk.parts)
    return PruneResult(shrunk.model, plan, report, shrunk.verification, shrunk.form)


provide_stages(Stages(finish=finish, export_onnx=export_onnx, resolve_alignment=resolve_alignment))
