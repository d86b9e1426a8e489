"""Operators that ONNX has no counterpart for, written as operators that it has."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """A program without the operators that this module can write otherwise; the same one if it has none of them."""
    table: dict[Any, Callable[..., Any]] = {}
    for node in program.graph.nodes:
        rule = _RULES.get(str(node.target))
        if rule is not None and (rule is not _attention or node.args[0].meta["val"].ndim != 4):
            table[node.target] = rule
    return program.run_decompositions(table) if table else program


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q k^T * scale + mask) v for any number of leading dimensions; torch's exporter takes four in all."""
    if query.ndim == 4 or enable_gqa or is_causal or dropout_p:
        return NotImplemented
    scores = query @ key.transpose(-1, -2) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def _grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Runs of rows, each times the matrix of its group: all groups in turn, each kept where its run is."""
    place = torch.arange(rows.shape[0], device=rows.device)
    result = rows.new_zeros(rows.shape[0], matrices.shape[2])
    for group in range(matrices.shape[0]):
        inside = place < ends[group]
        if group:
            inside = inside & (place >= ends[group - 1])
        result = torch.where(inside[:, None], rows @ matrices[group], result)
    return result


def _histogram(values: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """Counts in equal bins between two given ends, the last bin with its upper end."""
    if min == max:
        return NotImplemented
    flat = values.reshape(-1)
    bin_of = torch.floor((flat - min) / (max - min) * bins).clamp(0, bins - 1)
    is_inside = (flat >= min) & (flat <= max)
    numbers = torch.arange(bins, device=values.device, dtype=values.dtype)
    return ((bin_of[:, None] == numbers) & is_inside[:, None]).to(values.dtype).sum(0)


_RULES: dict[str, Callable[..., Any]] = {
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.histc.default": _histogram,
    "transformers.grouped_mm_fallback.default": _grouped_product,
}
