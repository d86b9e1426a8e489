"""Error of a network's outputs on samples held out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchshear.calibration._processes import is_distributed, sum_over_processes
from torchshear.calibration._samples import SampleSplit, batch_dimension, output_nodes, sample_numbers
from torchshear.graph import Graph
from torchshear.graph._nodes import has_data_dependent_shape


def output_error(graph: Graph, wanted: Sequence[Any], got: Sequence[Any], split: SampleSplit) -> float:
    """Return the squared error of outputs on samples held out, relative to their variance.

    Integers are right or wrong: each wrong one counts 1, of as many as there are. An output without a batch dimension,
    such as a loss, counts whole. Infinities and NaN are no error where both networks give them. Outputs of which the
    data decides how many there are do not count.

    Args:
        graph: the captured original.
        wanted: outputs of the original for each batch, at the positions that are kept.
        got: outputs of the other network.
        split: samples that are held out.
    """
    total = torch.zeros(2, dtype=torch.float64)
    rows: dict[int, list[Tensor]] = {}
    for number, (one, other) in enumerate(zip(wanted, got, strict=True)):
        leaves = zip(output_nodes(graph), pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
        for place, (node, y, x) in enumerate(leaves):
            if not isinstance(y, Tensor) or has_data_dependent_shape(node):
                continue
            y, x = (_held_out(value, node, graph, split, number) for value in (y, x))
            if y.is_floating_point():
                rows.setdefault(place, []).append(torch.stack([y, x]).double().cpu())
            else:
                total += torch.tensor([float((x != y).sum()), float(y.numel())], dtype=torch.float64)
    for values in rows.values():
        total += _error_and_variance(values)
    if is_distributed():
        total = sum_over_processes(total)
    error, variance = float(total[0]), float(total[1])
    return error / variance if variance else error


def _held_out(value: Tensor, node: fx.Node, graph: Graph, split: SampleSplit, number: int) -> Tensor:
    """Select the samples held out, along dimension 0; complex numbers become pairs."""
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    dim = batch_dimension(node, graph.batch_hint)
    if value.ndim == 0 or (dim is None and graph.batch_hint is not None):
        return value.unsqueeze(0)
    value = value.movedim(dim or 0, 0)
    samples = sample_numbers(len(value), split.sizes[number])
    return value[split.is_held_out(samples, number).to(value.device)]


def _error_and_variance(values: list[Tensor]) -> Tensor:
    """Return the squared error of x for y and the squares of y around its mean, for values [y, x] of each batch."""
    y, x = torch.cat(values, 1)
    is_same = (x == y) | (x.isnan() & y.isnan())
    error = torch.where(is_same, 0.0, x - y).square().nan_to_num(nan=torch.inf).sum()
    mean = y.where(y.isfinite(), torch.nan).nanmean(0)
    return torch.stack([error, torch.where(y.isfinite(), y - mean, 0.0).square().sum()])
