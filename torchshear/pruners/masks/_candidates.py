"""Candidates for masks: the units of a layer with their scores, and the masks that a choice of them makes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchshear.pruners.masks._layers import MaskableLayer
from torchshear.pruners.masks._masks import LayerReport, Masks
from torchshear.pruners.masks._patterns import Pattern, Reduce
from torchshear.pruners.masks._scores import Scorer
from torchshear.pruners.masks._selection import count_of

Masked = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """Units that are ranked: of one layer, or the heads of one attention layer.

    Attributes:
        report: what is known before units are chosen.
        scores: score of each unit, one dimension, on the CPU; -inf for units that are masked already.
        largest: fraction of the weights that goes with all units.
        build: masks from the units that are kept.
    """

    report: LayerReport
    scores: Tensor
    largest: float
    build: Callable[[Tensor], Masked]

    @property
    def n_all(self) -> float:
        """Number of units that all weights of the layer would make, were they masked: n_units * M / N for N:M."""
        return len(self.scores) / self.largest

    def choice(self, kept: Tensor, requested: float, limit: int) -> tuple[LayerReport, Masked]:
        """The layer's report and masks, from the units that a selection keeps and the most that could go."""
        is_before = torch.isneginf(self.scores)
        kept = kept & ~is_before
        masks = self.build(kept)
        n_masked = int((~kept).sum())
        weight = kept if self.report.kind == "heads" else next(iter(masks.values()))
        notes = [f"no more than {limit} units may go: max_ratio"] if n_masked >= limit < len(kept) else []
        if int(is_before.sum()) == n_masked > count_of(self.n_all, requested):
            notes = ["as many were masked before"]
        return (
            replace(
                self.report,
                n_masked=n_masked,
                requested=requested,
                achieved=float((~weight).double().mean()),
                note="; ".join(notes),
            ),
            masks,
        )


def layer_candidate(
    layer: MaskableLayer, pattern: Pattern, scorer: Scorer, reduce: Reduce, previous: Masks | None
) -> Candidate | LayerReport:
    """The units of one layer, or why it has none."""
    shape = tuple(layer.tensor.shape)
    report = LayerReport(layer.name, layer.form.kind, shape, pattern.text, 0, 0, 0.0, 0.0)
    view = layer.view(torch.empty(shape, device="meta"))
    grid = (view.shape[0], view.shape[1], view.shape[2], view.shape[3])
    problem = layer.problem
    if not problem and layer.form.kind == "embedding" and pattern.text != "1x1":
        problem = "a table of embeddings takes pattern '1x1' only"
    problem = problem or pattern.explain_misfit(grid)
    if not problem and not layer.tensor.numel():
        problem = "it holds no weights"
    if problem:
        return replace(report, note=f"skipped: {problem}")
    scores = layer.view(scorer(layer))
    before = _before(layer, previous, scores)
    units = pattern.unit_scores(scores.masked_fill(~before, 0.0), reduce)
    units = units.masked_fill(pattern.removed_units(before), -torch.inf).cpu()
    order = scores.masked_fill(~before, -torch.inf)

    def build(kept: Tensor) -> Masked:
        mask = pattern.mask(kept.to(scores.device), order) & before
        masks = {layer.weight: layer.unview(mask).cpu().contiguous()}
        if pattern.masks_bias and layer.bias is not None:
            masks[layer.bias] = kept.cpu()
        return masks

    return Candidate(replace(report, n_units=len(units)), units, pattern.largest, build)


def _before(layer: MaskableLayer, previous: Masks | None, scores: Tensor) -> Tensor:
    """The mask that a layer had before, as the view of its weight; all True if it had none."""
    known = previous.tensors.get(layer.weight) if previous is not None else None
    if known is None:
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    return layer.view(known.to(scores.device))
