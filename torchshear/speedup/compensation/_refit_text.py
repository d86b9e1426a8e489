"""A refit in words: a row for each layer, and what was left alone."""

from typing import Final

from torchshear._tables import lines_by_reason
from torchshear.speedup.compensation._refit_record import Refit

REFIT_HEADINGS: Final = ("layer", "kind", "error before", "error after", "fitted by")
_ROUNDING: Final = 1e-9


def refit_title(record: Refit) -> str:
    """Return the title of the table of layers."""
    return f"Refit{'' if record.is_kept else ', not kept'}: error of layers on samples held out"


def refit_rows(record: Refit) -> list[tuple[str, ...]]:
    """Return the cells of each layer, one for each heading."""
    return [
        (
            layer.name or "(the model)",
            layer.kind,
            _number(layer.error_before),
            _number(layer.error_after),
            layer.method or "stays as it was",
        )
        for layer in record.layers
    ]


def refit_lines(record: Refit) -> list[str]:
    """Return the lines below the table: the error of the outputs, the samples, and layers left alone by reason."""
    lines = [
        f"outputs     relative squared error {_number(record.error_before)} -> {_number(record.error_after)} on "
        f"{record.n_held_out:,} samples held out; fitted to {record.n_samples:,} others"
    ]
    if not record.is_kept:
        lines.append("not kept    the outputs got worse on the samples held out: the model is as it was after the cut")
    skipped = [(layer.name or "(the model)", layer.reason) for layer in record.skipped]
    return [*lines, *(lines_by_reason("left alone", skipped, ".refit.skipped") if skipped else [])]


def _number(error: float) -> str:
    """Write an error with three digits; what rounding alone makes is no error."""
    return f"{error:.3g}" if not error <= _ROUNDING else "0"
