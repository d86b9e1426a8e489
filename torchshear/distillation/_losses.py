"""Distances of a shrunk model from its original, in outputs and in layers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchshear.calibration._dense_loss import class_dimension
from torchshear.dependency.plans._plan import PruningPlan


def output_loss(given: list[Tensor], wanted: list[Tensor], temperature: float) -> Tensor:
    """Return the divergence of logits, and the relative squared error of all other outputs.

    Args:
        given: outputs of the shrunk model.
        wanted: outputs of the original.
        temperature: what logits are divided by.
    """
    losses = []
    for x, y in zip(given, wanted, strict=True):
        dim = class_dimension(y)
        if dim is None:
            losses.append(_distance(x, y))
            continue
        logs = [functional.log_softmax(one.float() / temperature, dim) for one in (x, y)]
        divergence = functional.kl_div(logs[0], logs[1], reduction="sum", log_target=True)
        losses.append(temperature**2 * divergence / (y.numel() / y.shape[dim]))
    return torch.stack(losses).sum()


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error over the variance of y."""
    x, y = x.float(), y.float()
    variance = y.var(correction=0)
    return (x - y).square().mean() / torch.where(variance > 0, variance, 1.0)


class LayerPairs:
    """Outputs of the layers with weights that both models have, of the present batch.

    Args:
        pupil: the shrunk model.
        model: the original.
        plan: the plan between them, or None.
    """

    def __init__(self, pupil: nn.Module, model: nn.Module, plan: PruningPlan | None) -> None:
        own, others = dict(pupil.named_modules()), dict(model.named_modules())
        self._pairs = {
            name: (own[name], module)
            for name, module in others.items()
            if name in own and not list(module.children()) and list(module.parameters(recurse=False))
        }
        self._kept: dict[str, Tensor] = {}
        for name in self._pairs if plan is not None else ():
            entry = plan.state.get(f"{name}.weight") if plan is not None else None
            if entry is not None and 0 in entry.kept and not entry.blocks.get(0):
                self._kept[name] = torch.from_numpy(entry.kept[0].copy())
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    @contextmanager
    def watch(self, which: Literal["pupil", "model"]) -> Iterator[None]:
        """Keep what the layers of one of the models give in a block."""
        place = ("pupil", "model").index(which)
        seen = self._seen[place]

        def keep(name: str, _: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name] = output

        with ExitStack() as hooks:
            for name, pair in self._pairs.items():
                hooks.callback(pair[place].register_forward_hook(partial(keep, name)).remove)
            yield

    def loss(self) -> Tensor:
        """Return the mean distance of all layers that can be compared, and forget them."""
        own, others = self._seen
        found = []
        for name, x in own.items():
            y = self._comparable(name, x, others.get(name))
            if y is not None and x.is_floating_point() and x.requires_grad:
                found.append(_distance(x, y))
        for seen in self._seen:
            seen.clear()
        return torch.stack(found).mean() if found else torch.zeros(())

    def _comparable(self, name: str, x: Tensor, y: Tensor | None) -> Tensor | None:
        """Return the original's output at the positions that are left; None where that is not known."""
        if y is None or x.shape == y.shape or x.ndim != y.ndim:
            return y if y is not None and x.shape == y.shape else None
        kept = self._kept.get(name)
        changed = [dim for dim in range(x.ndim) if x.shape[dim] != y.shape[dim]]
        if kept is None or len(changed) != 1 or x.shape[changed[0]] != len(kept):
            return None
        return y.index_select(changed[0], kept.to(y.device))
