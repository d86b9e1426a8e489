"""Comparing gradients of parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchshear.errors import VerificationError
from torchshear.speedup.verification._runs import Run
from torchshear.speedup.verification._weights import Values

# Relative differences that equal gradients may have, by dtype of the parameters: computed in float64, they are rounded
# to that in the end; sums over samples and positions cancel.
_NARROW = 1e-2  # where they are not computed in float64
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 2e-2}


def compare_gradients(values: Values, expected: Run, actual: Run, where: str, *, is_wide: bool) -> float | None:
    """Largest difference of a gradient; None where the reference has none.

    Raises:
        VerificationError: it is too large, or the shrunk model has none.
    """
    if expected.gradients is None:
        return None
    if actual.gradients is None:
        raise VerificationError(f"{where} the shrunk model has no gradients, though the masked model has.")
    own = {values.canonical(name): gradient for name, gradient in expected.gradients.items()}
    sliced = {name: gradient for name, gradient in own.items() if name in values.groups.graph.state}
    worst, name_of_worst = 0.0, ""
    smallest = _smallest_size(list(sliced.values()))
    for name, gradient in actual.gradients.items():
        wanted = sliced.get(values.canonical(name))
        if wanted is not None:
            error = _gradient_error(wanted, gradient, smallest)
            worst, name_of_worst = max((worst, name_of_worst), (error, name))
    dtypes = {gradient.dtype for gradient in sliced.values()}
    limit = max((_TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)
    if worst > (limit if is_wide else max(limit, _NARROW)):
        raise VerificationError(
            f"{where} the gradient of {name_of_worst!r} differs from that of the masked model by {worst:.2g} "
            f"relative, though the outputs do not: what the shrunk model computes has another derivative."
        )
    return worst


def _smallest_size(gradients: Sequence[Tensor]) -> float:
    """What counts as the least size of a gradient: behind a norm some, or nearly all, are zero but for rounding."""
    sizes = [_mean_size(g) for g in gradients if g.numel() and (g.is_floating_point() or g.is_complex())]
    return 1e-2 * max(sizes, default=0.0)


def _mean_size(gradient: Tensor) -> float:
    """Mean magnitude of those elements that are numbers; 0.0 if none is."""
    return float(gradient.abs().nanmean().nan_to_num(0.0))


def _gradient_error(expected: Tensor, actual: Tensor, smallest: float) -> float:
    """Largest difference of an element, relative to it, to its tensor and to the least size of a gradient."""
    if expected.shape != actual.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    scale = expected.abs() + _mean_size(expected) + smallest
    scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)  # all gradients may be zero, as outside of a quantised range
    error = float(((expected - actual).abs() / scale).masked_fill(expected.isnan() & actual.isnan(), 0).max())
    return error if error == error else float("inf")
