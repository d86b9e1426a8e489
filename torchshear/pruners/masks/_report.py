"""The report of masks: what each layer lost, and what of it can bring speed where."""

import io
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from torchshear._arguments import check_count, check_kind
from torchshear._tables import Cell
from torchshear.pruners.masks._masks import LayerReport, Masks
from torchshear.pruners.masks._semi_structured import MULTIPLES, Backend, shape_problem

_MOST_LINES: Final = 8
_REMOVABLE: Final = frozenset({"channelx1", "1xchannel", "heads"})


def report(masks: Masks, width: int = 120) -> str:
    """A table of the layers, and what brings speed where, as text.

    Args:
        masks: the masks.
        width: columns of the terminal.

    Returns:
        The table, ready to print.
    """
    check_kind("masks", masks, Masks, "what choose_masks gives")
    check_count("width", width)
    table = Table(title=f"Masks, pattern {masks.pattern or 'unknown'}", title_justify="left")
    for heading in ("layer", "kind", "shape", "units", "masked", "requested", "achieved", "note"):
        table.add_column(heading, justify="left" if heading in ("layer", "kind", "note") else "right")
    for layer in masks.layers:
        shape = " x ".join(map(str, layer.shape)) or "-"
        shares = (f"{layer.requested:.1%}", f"{layer.achieved:.1%}")
        counts = (str(layer.n_units), str(layer.n_masked))
        table.add_row(Cell(layer.name or "(model)"), layer.kind, shape, *counts, *shares, Cell(layer.note))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table, markup=False)
    n_elements = sum(mask.numel() for mask in masks.tensors.values())
    lines = [
        f"masked      {masks.sparsity:.1%} of {n_elements:,} weights and biases in {len(masks.tensors)} parameters"
    ]
    console.print("\n".join(lines + speed_notes(masks)), highlight=False, soft_wrap=True, markup=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def speed_notes(masks: Masks) -> list[str]:
    """Say which of these masks bring speed, in which runtime, and what it takes."""
    notes = ["what brings speed:", "  onnxruntime CPU   nothing: it computes with zeros as with any number"]
    if any(layer.pattern in _REMOVABLE and layer.n_masked for layer in masks.layers):
        notes.append(
            "  any runtime       channels and heads that are masked in all that reads or makes them are removed by\n"
            "                    plan_from_masks and shrink"
        )
    notes.append(_on_cuda(masks))
    return notes


def _on_cuda(masks: Masks) -> str:
    halves = [layer for layer in masks.layers if layer.pattern == "2:4" and layer.n_masked]
    if not halves:
        return "  CUDA              nothing of this pattern; 2:4 of linear layers can be"
    problems = {backend: [_problem(layer, backend) for layer in halves] for backend in MULTIPLES}
    n_fit = {backend: found.count("") for backend, found in problems.items()}
    lines = [
        f"{n_fit['cusparselt']} of {len(halves)} layers in half precision, as torch's semi-structured tensors",
        f"(to_semi_structured; {n_fit['cutlass']} with CUTLASS instead of cuSPARSELt); measure them",
    ]
    lines += [f"{one.name}: {why}" for one, why in zip(halves, problems["cusparselt"], strict=True) if why]
    shown = lines[:_MOST_LINES] + ([f"... and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else [])
    return "  CUDA              " + f"\n{'':20}".join(shown)


def _problem(layer: LayerReport, backend: Backend) -> str:
    if layer.kind != "linear":
        return f"{layer.kind}: linear layers only"
    return shape_problem(layer.shape, torch.float16, backend)
