"""Prune one architecture of the zoo by half and record what became of it."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchshear
from tests.zoo import zoo
from torchshear.errors import TorchshearError
from torchshear.graph._outputs import output_leaves


def of_torchshear(name: str) -> dict[str, Any]:
    """What pruning half of everything gives, stage by stage; the first stage that fails is named."""
    row: dict[str, Any] = {"name": name}
    model, args, kwargs = zoo.build(name)
    row["n_params"] = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    try:
        result = torchshear.prune(model, args, kwargs, ratio=0.5)
    except TorchshearError as error:
        return row | {"failure": f"{type(error).__name__}: {str(error)[:600]}"}
    seconds = time.perf_counter() - start
    report = result.report
    row |= {
        "groups": len(report.groups),
        "shrinkable": shrinkable_share(result.plan),
        "between": between_share(result.plan),
        "params_left": round(report.after.n_params / report.before.n_params, 4),
        "macs_left": round(report.after.macs / max(report.before.macs, 1), 4),
        "max_error": result.verification.max_error,
        "dtype": str(result.verification.dtype),
        "reference": result.verification.reference,
        "form": report.form,
        "refused": dict(list(report.refused.items())[:60]),
        "n_refused": len(report.refused),
        "seconds": round(seconds, 2),
    }
    row |= same_shapes(model, result.model, args, kwargs)
    row |= trained(result.model, args, kwargs)
    row |= exported(result.model.eval(), args, kwargs)
    if row["onnx"] is not True and exported(model, args, kwargs)["onnx"] is not True:
        row["onnx"] = f"the dense model does not export either: {row['onnx']}"
    return row


def shrinkable_share(plan: Any) -> float:
    """Share of the parameters that lie along at least one dimension that can shrink."""
    groups = plan.analysis
    able = {member.name for group in groups if group.is_prunable for member in group.members}
    sizes = {name: e.tensor.numel() for name, e in groups.graph.state.items() if e.kind == "parameter"}
    return round(sum(size for name, size in sizes.items() if name in able) / max(sum(sizes.values()), 1), 4)


def between_share(plan: Any) -> float:
    """Share of the parameters that lie between axes that can shrink: in a matrix, rows and columns."""
    groups = plan.analysis
    able = {(member.name, member.dim) for group in groups if group.is_prunable for member in group.members}
    sizes = {
        n: (e.tensor.numel(), min(e.tensor.ndim, 2)) for n, e in groups.graph.state.items() if e.kind == "parameter"
    }
    inside = sum(size for n, (size, rank) in sizes.items() if all((n, dim) in able for dim in range(rank)))
    return round(inside / max(sum(size for size, _ in sizes.values()), 1), 4)


def same_shapes(model: nn.Module, small: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Whether outputs keep their shapes."""
    with torch.no_grad():
        before, after = output_leaves(model(*args, **kwargs)), output_leaves(small(*args, **kwargs))
    shapes = [[tuple(v.shape) for v in leaves if isinstance(v, Tensor)] for leaves in (before, after)]
    return {"same_shapes": shapes[0] == shapes[1]}


def trained(small: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """One step of SGD in train mode, on two samples where there is one."""
    double = lambda t: torch.cat([t, t]) if t.ndim and t.shape[0] == 1 else t  # noqa: E731
    args, kwargs = pytree.tree_map_only(Tensor, double, (args, kwargs))
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    try:
        leaves = [v for v in output_leaves(small(*args, **kwargs)) if isinstance(v, Tensor) and v.requires_grad]
        sum(leaf.square().mean() for leaf in leaves).backward()
    except Exception as error:  # whatever a forward raises is the result
        return {"trained": f"{type(error).__name__}: {str(error)[:300]}"}
    with_grad = [p for p in small.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    optimizer.step()
    return {"trained": bool(with_grad) and all(bool(torch.isfinite(p).all()) for p in small.parameters())}


def exported(small: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The ONNX file, run in onnxruntime with batches 1 and 3 besides the example's."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = torchshear.export_onnx(small, Path(folder) / "small.onnx", args, kwargs, check_batches=(1, 3))
        except TorchshearError as error:
            return {"onnx": f"{type(error).__name__}: {str(error)[:400]}"}
    return {
        "onnx": True,
        "onnx_error": file.max_error,
        "any_length": file.dynamic_length,
        "batches": sorted(file.batches_checked) if file.dynamic_batch else f"fixed: {file.static_reason[:300]}",
    }


def of_rival(name: str) -> dict[str, Any]:
    """What Torch-Pruning makes of it, without hints."""
    import torch_pruning as tp

    model, args, kwargs = zoo.build(name)
    row: dict[str, Any] = {"name": name, "n_params": sum(p.numel() for p in model.parameters())}
    with torch.no_grad():
        before = output_leaves(model(*args, **kwargs))
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    start = time.perf_counter()
    try:
        example: Any = args[0] if args else kwargs
        pruner = tp.pruner.MagnitudePruner(
            model, example, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5, ignored_layers=last
        )
        pruner.step()
        with torch.no_grad():
            after = output_leaves(model(*args, **kwargs))
    except Exception as error:  # whatever the rival raises is its result
        return row | {"failure": f"{type(error).__name__}: {str(error)[:200]}"}
    shapes = [[tuple(v.shape) for v in leaves if isinstance(v, Tensor)] for leaves in (before, after)]
    return row | {
        "seconds": round(time.perf_counter() - start, 2),
        "same_shapes": shapes[0] == shapes[1],
        "params_left": round(sum(p.numel() for p in model.parameters()) / row["n_params"], 4),
    }
