"""Gradients of parameters: taking them, and comparing them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from torchshear.errors import VerificationError
from torchshear.graph.model._state import Mode
from torchshear.speedup.verification._state_cut import StateCut

SelectGradient = Callable[[str, Tensor], Tensor]
Gradients = dict[str, Tensor]

# Relative differences that equal gradients may have, by dtype of the parameters: even those computed in float64 are
# rounded to that dtype in the end, and sums over samples and positions cancel.
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 2e-2}
_TOLERANCE_BELOW_FLOAT64 = 1e-2  # where they are not computed in float64
_FLOOR = 1e-2  # share of the largest mean gradient below which a gradient may be nothing but rounding


def gradients_of(outputs: list[object], parameters: Mapping[str, Tensor], select: SelectGradient) -> Gradients | None:
    """Differentiate a weighted sum of all floating outputs, in which each element has another weight.

    Only the selected part of each gradient is kept, so that no two whole gradients are in memory at once.

    Args:
        outputs: flat outputs.
        parameters: name -> parameter; none has a gradient afterwards.
        select: (name, gradient) -> the part of the gradient that is compared.

    Returns:
        Name -> selected gradient, zeros where a parameter has none; None if no output has a gradient.
    """
    total: Tensor | None = None
    for value in outputs:
        if isinstance(value, Tensor) and value.requires_grad:
            real = torch.view_as_real(value) if value.is_complex() else value
            places = torch.arange(1, real.numel() + 1, dtype=torch.float64, device=real.device)
            weights = torch.cos(places * 2**0.5).reshape(real.shape).to(real.dtype)
            finite = torch.where(real.isfinite(), real, 0)
            total = (finite * weights).sum() + (0 if total is None else total)
    if total is None or not parameters:
        return None
    found: Gradients = {}
    for parameter in parameters.values():
        parameter.grad = None  # a copy of a parameter of a class of its own may have one

    def collect(name: str, parameter: Tensor) -> None:
        gradient = parameter.grad if parameter.grad is not None else parameter.new_zeros(()).expand(parameter.shape)
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():  # keep the tensor's own class
            found[name] = select(name, gradient)
            parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: collect(name, p))  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items()
    ]
    try:
        torch.autograd.backward(total, inputs=list(parameters.values()))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.grad = None
    for name in parameters.keys() - found.keys():
        collect(name, parameters[name])
    return {name: found[name] for name in parameters}


def compare_gradients(
    state_cut: StateCut, expected: Gradients | None, actual: Gradients | None, mode: Mode, *, is_float64: bool
) -> float | None:
    """Return the largest difference of any element of a gradient.

    It is relative to that element plus the mean magnitude of its tensor.

    Args:
        state_cut: names of the parameters.
        expected: name -> gradient of the masked model at the positions that are kept; None if it has no gradients.
        actual: name -> gradient of the shrunk model.
        mode: mode in which they were computed.
        is_float64: whether they were computed in float64.

    Returns:
        The difference; None if the masked model has no gradients.

    Raises:
        VerificationError: it is too large, or the shrunk model has no gradients though the masked model has.
    """
    if expected is None:
        return None
    if actual is None:
        raise VerificationError(f"in {mode} mode the shrunk model has no gradients, though the masked model has.")
    by_name = {state_cut.canonical_name(name): gradient for name, gradient in expected.items()}
    by_name = {name: gradient for name, gradient in by_name.items() if name in state_cut.groups.graph.state}
    numbers = [g for g in by_name.values() if g.numel() and (g.is_floating_point() or g.is_complex())]
    # Behind a norm some gradients, or nearly all, are zero but for rounding.
    floor = _FLOOR * max(map(_mean_magnitude, numbers), default=0.0)
    worst, name_of_worst = 0.0, ""
    for name, gradient in actual.items():
        wanted = by_name.get(state_cut.canonical_name(name))
        if wanted is not None:
            worst, name_of_worst = max((worst, name_of_worst), (_gradient_error(wanted, gradient, floor), name))
    limit = max((_TOLERANCES.get(gradient.dtype, 0.0) for gradient in by_name.values()), default=0.0)
    if worst > (limit if is_float64 else max(limit, _TOLERANCE_BELOW_FLOAT64)):
        raise VerificationError(
            f"in {mode} mode the gradient of {name_of_worst!r} differs from that of the masked model by {worst:.2g} "
            f"relative, though the outputs do not: what the shrunk model computes has another derivative."
        )
    return worst


def _gradient_error(expected: Tensor, actual: Tensor, floor: float) -> float:
    """Return the largest difference of an element, relative to it, to the mean of its tensor and to `floor`."""
    if expected.shape != actual.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    scale = expected.abs() + _mean_magnitude(expected) + floor
    scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)  # all gradients may be zero, as outside of a quantised range
    error = float(((expected - actual).abs() / scale).masked_fill(expected.isnan() & actual.isnan(), 0).max())
    return error if error == error else float("inf")


def _mean_magnitude(gradient: Tensor) -> float:
    """Return the mean magnitude of the elements that are numbers; 0.0 if there are none."""
    return float(gradient.abs().nanmean().nan_to_num(0.0))
