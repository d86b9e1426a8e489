"""Operators that ONNX has no counterpart for, written as operators that it has."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Replace the operators of a program that have a rule here; return the program itself if it has none of them."""
    table: dict[Any, Callable[..., Any]] = {}
    for node in program.graph.nodes:
        rule = _RULES.get(str(node.target))
        if rule in (_padding, _constant_padding):  # needed where a maximum is taken over what is padded
            is_needed = any(str(user.target).startswith("aten.max_pool") for user in node.users)
        elif rule is _attention:
            is_needed = bool(node.args[0].meta["val"].ndim != 4)
        else:
            is_needed = rule is not None
        if is_needed and rule is not None:
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
    """Compute softmax(q k^T * scale + mask) v for tensors of any rank; torch's exporter takes rank 4 only."""
    if query.ndim == 4 or enable_gqa or is_causal or dropout_p:
        return NotImplemented
    scores = query @ key.transpose(-1, -2) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def _grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply runs of rows, each by the matrix of its group: all rows by each matrix, of which the run is taken."""
    place = torch.arange(rows.shape[0], device=rows.device)
    result = rows.new_zeros(rows.shape[0], matrices.shape[2])
    for group in range(matrices.shape[0]):
        inside = place < ends[group]
        if group:
            inside = inside & (place >= ends[group - 1])
        result = torch.where(inside[:, None], rows @ matrices[group], result)
    return result


def _padding(x: Tensor, pad: list[int], mode: str = "constant", value: float | None = None) -> Any:
    """Pad by concatenation, since onnxruntime merges padding with zeros into a max pool, whose own padding is -inf."""
    if mode != "constant" or any(count < 0 for count in pad):
        return NotImplemented
    for number in range(len(pad) // 2):
        dim = x.ndim - 1 - number
        sides = [list(x.shape), list(x.shape)]
        for side, count in zip(sides, pad[2 * number :], strict=False):
            side[dim] = count
        before, after = (x.new_full(side, value or 0.0) for side in sides)
        x = torch.cat([before, x, after], dim)
    return x


def _histogram(values: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """Count values in equal bins between two given ends; the last bin includes its upper end."""
    if min == max:
        return NotImplemented
    flat = values.reshape(-1)
    bin_of = torch.floor((flat - min) / (max - min) * bins).clamp(0, bins - 1)
    is_inside = (flat >= min) & (flat <= max)
    numbers = torch.arange(bins, device=values.device, dtype=values.dtype)
    return ((bin_of[:, None] == numbers) & is_inside[:, None]).to(values.dtype).sum(0)


def _constant_padding(x: Tensor, pad: list[int], value: float = 0.0) -> Any:
    return _padding(x, pad, "constant", value)


_RULES: dict[str, Callable[..., Any]] = {
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.histc.default": _histogram,
    "aten.pad.default": _padding,
    "aten.constant_pad_nd.default": _constant_padding,
    "transformers.grouped_mm_fallback.default": _grouped_product,
}
