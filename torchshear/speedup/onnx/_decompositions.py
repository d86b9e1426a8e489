"""Operators that ONNX has no counterpart for, written as operators that it has."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """A program without the operators that this module can write otherwise; the same one if it has none of them."""
    table: dict[Any, Callable[..., Any]] = {}
    for node in program.graph.nodes:
        rule = _RULES.get(str(node.target))
        if rule is not None and _IS_NEEDED.get(rule, _always)(node):
            table[node.target] = rule
    return program.run_decompositions(table) if table else program


def _always(_: fx.Node) -> bool:
    return True


def _is_not_of_four_dimensions(attention: fx.Node) -> bool:
    return bool(attention.args[0].meta["val"].ndim != 4)  # type: ignore[union-attr]


def _is_pooled(padding: fx.Node) -> bool:
    """Whether a maximum is taken over what is padded."""
    return any(str(user.target).startswith("aten.max_pool") for user in padding.users)


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


def _padding(x: Tensor, pad: list[int], mode: str = "constant", value: float | None = None) -> Any:
    """Constants beside the values: onnxruntime takes zeros before a maximum for the pool's own padding of -inf."""
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
    """Counts in equal bins between two given ends, the last bin with its upper end."""
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
# Rules that are not for all calls of their operator; a program without any that they are for is left as it is.
_IS_NEEDED: dict[Callable[..., Any], Callable[[fx.Node], bool]] = {
    _attention: _is_not_of_four_dimensions,
    _padding: _is_pooled,
    _constant_padding: _is_pooled,
}
