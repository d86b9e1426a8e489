"""Running a module under equal conditions: the same random numbers and weights; its outputs, and gradients compared."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from torchshear.dependency.plans._plan import PruningPlan
from torchshear.errors import VerificationError
from torchshear.graph import ExampleInputs
from torchshear.graph._outputs import output_leaves
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._state import Cache, Mode, clear_caches, find_caches, in_mode
from torchshear.graph.numerics._dispatch import LeanDispatchMode
from torchshear.graph.numerics._float64 import compute_in, to_float64
from torchshear.speedup.verification._state_cut import StateCut

SelectOutputs = Callable[[list[Any]], list[Any]]
SelectGradient = Callable[[str, Tensor], Tensor]
Gradients = dict[str, Tensor]

# Relative differences that equal gradients may have, by dtype of the parameters: even those computed in float64 are
# rounded to that dtype in the end, and sums over samples and positions cancel.
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 2e-2}
_TOLERANCE_BELOW_FLOAT64 = 1e-2  # where they are not computed in float64
_FLOOR = 1e-2  # share of the largest mean gradient below which a gradient may be nothing but rounding

_MEANS = {"rand": 0.5, "rand_like": 0.5, "randn": 0.1, "randn_like": 0.1, "normal_functional": 0.1}
_IN_PLACE = {"uniform_": 0.5, "normal_": 0.1, "exponential_": 0.5}
_RANDOM_NAMES = frozenset({"native_dropout", "bernoulli", "bernoulli_", *_MEANS, *_IN_PLACE})
_RANDOM_OPERATORS: dict[Any, str] = {}  # operator -> its name if it draws random numbers, else ""


@dataclass(frozen=True, slots=True, eq=False)
class ModelRun:
    """Results of one run of a model.

    Attributes:
        outputs: flat outputs; those that shrink at their kept positions only.
        gradients: name of a parameter -> compared part of the gradient of a fixed sum over the outputs; None if no
            gradients were asked for, or no output has one.
    """

    outputs: list[Any]
    gradients: Gradients | None = None


class EqualRandomness(LeanDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode in which every random number is a fixed value, the mean where there is one.

    Dropout then drops nothing. Equal seeds would not do: a smaller model draws fewer numbers than the larger one.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _RANDOM_OPERATORS.get(func)
        if name is None:
            name = str(func).split(".")[1]
            name = _RANDOM_OPERATORS[func] = name if name in _RANDOM_NAMES else ""
        if not name:
            return func(*args, **kwargs)
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "bernoulli_":  # p itself in place of a mask that keeps a share p: divided by p it gives one
            p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return args[0].copy_(p.to(args[0].dtype)) if isinstance(p, Tensor) else args[0].fill_(p)
        if name == "bernoulli":
            return torch.ones_like(args[0]) if len(args) == 1 else torch.full_like(args[0], float(args[1] > 0))
        if name in _IN_PLACE:
            return args[0].fill_(_IN_PLACE[name])
        result = func(*args, **kwargs)
        return result.fill_(_MEANS[name]) if isinstance(result, Tensor) else result


class SoundKernels(LeanDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that gives the backward of a batch norm a contiguous gradient.

    On the CPU, torch 2.13 computes wrong gradients, other ones in two equal models, if the gradient of a single sample
    has channels innermost and a stride between samples other than the size of a sample, as a slice of tokens has.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def equal_conditions(dtype: torch.dtype, *, gradients: bool = False) -> Iterator[None]:
    """Compute in one dtype throughout, with equal random numbers, with or without gradients."""
    randomness = EqualRandomness()  # type: ignore[no-untyped-call]
    kernels = SoundKernels() if gradients else nullcontext()  # type: ignore[no-untyped-call]
    with torch.set_grad_enabled(gradients), torch.random.fork_rng(devices=[]), randomness, kernels, compute_in(dtype):
        yield


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating parameter; float32 if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def copy_sharing_values(model: nn.Module, caches: tuple[Cache, ...]) -> nn.Module:
    """Copy a model, with parameters of its own that share the memory of the model's."""
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter}
    twin = copy_model(model, shared)
    clear_caches(twin, caches)
    return twin


def copy_without_caches(model: nn.Module, example: ExampleInputs, dtype: torch.dtype) -> nn.Module:
    """Copy a model without the values that its modules computed from parameters; in float64 if `dtype` is that."""
    twin = copy_model(model)
    clear_caches(twin, find_caches(model, example))
    return twin.to(dtype) if dtype is torch.float64 else twin


def copy_inputs(inputs: ExampleInputs, dtype: torch.dtype) -> ExampleInputs:
    """Copy inputs; in float64 if `dtype` is that."""
    return to_float64(inputs) if dtype is torch.float64 else inputs.copy()


def flat_inputs(inputs: ExampleInputs) -> list[Any]:
    """Flatten arguments and keyword arguments, in the order of a captured graph."""
    return pytree.tree_leaves((inputs.args, inputs.kwargs))


def slice_outputs(plan: PruningPlan, outputs: list[Any], mode: Mode = "eval") -> list[Any]:
    """Return the flat outputs of the original, each at the positions that the plan keeps of it in a mode."""
    outputs = list(outputs)
    for output in plan.outputs:
        for dim, kept in output.kept.items() if output.mode == mode else ():
            value = outputs[output.index]
            outputs[output.index] = value.index_select(dim, torch.from_numpy(kept.copy()).to(value.device))
    return outputs


def detach_outputs(outputs: list[Any]) -> list[Any]:
    """Return the outputs without their autograd graphs."""
    return [value.detach() if isinstance(value, Tensor) else value for value in outputs]


def run_module(
    model: nn.Module,
    inputs: ExampleInputs,
    dtype: torch.dtype,
    mode: Mode = "eval",
    select_outputs: SelectOutputs | None = None,
    select_gradient: SelectGradient | None = None,
) -> ModelRun:
    """Run a module on copies of inputs, and leave its mode, attributes and buffers as they were.

    Args:
        model: the module, with parameters in `dtype`; they have no gradients afterwards.
        inputs: inputs of the run.
        dtype: dtype to compute in.
        mode: mode to run in.
        select_outputs: flat outputs -> those that are compared; None for all.
        select_gradient: (name, gradient of a floating parameter) -> the part that is compared; None for no gradients.
    """
    has_gradients = select_gradient is not None
    copied = copy_inputs(inputs, dtype)
    leaves = {name: p for name, p in model.named_parameters() if p.is_floating_point()} if has_gradients else {}
    flags = [(leaf, leaf.requires_grad) for leaf in leaves.values()]
    try:
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        with in_mode(model, mode), equal_conditions(dtype, gradients=has_gradients):
            outputs = output_leaves(model(*copied.args, **copied.kwargs))
            outputs = outputs if select_outputs is None else select_outputs(outputs)
            gradients = None if select_gradient is None else gradients_of(outputs, leaves, select_gradient)
            return ModelRun(detach_outputs(outputs), gradients)
    finally:
        for leaf, needs in flags:
            leaf.requires_grad_(needs)


@contextmanager
def use_values(model: nn.Module, values: Mapping[str, Tensor] | None, caches: tuple[Cache, ...] = ()) -> Iterator[None]:
    """Have a model compute with other values of some parameters and buffers for a while.

    Args:
        model: the model.
        values: name -> tensor of the same shape; None changes nothing.
        caches: attributes in which the model keeps values that it computed from its weights.
    """
    if values is None:
        yield
        return
    own = [(t, t.data, values[n]) for n, t in (*model.named_parameters(), *model.named_buffers()) if n in values]
    clear_caches(model, caches)
    try:
        for tensor, _, value in own:
            tensor.data = value.to(tensor.dtype)
        yield
    finally:
        for tensor, data, _ in own:
            tensor.data = data
        clear_caches(model, caches)


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
        if wanted is None or (wanted.shape == gradient.shape and not wanted.numel()):
            continue
        error = float("inf")
        if wanted.shape == gradient.shape:
            scale = wanted.abs() + _mean_magnitude(wanted) + floor
            scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)  # all may be zero, as outside of a quantised range
            both_nan = wanted.isnan() & gradient.isnan()
            found = float(((wanted - gradient).abs() / scale).masked_fill(both_nan, 0).max())
            error = found if found == found else error
        worst, name_of_worst = max((worst, name_of_worst), (error, name))
    limit = max((_TOLERANCES.get(gradient.dtype, 0.0) for gradient in by_name.values()), default=0.0)
    if worst > (limit if is_float64 else max(limit, _TOLERANCE_BELOW_FLOAT64)):
        raise VerificationError(
            f"in {mode} mode the gradient of {name_of_worst!r} differs from that of the masked model by {worst:.2g} "
            f"relative, though the outputs do not: what the shrunk model computes has another derivative."
        )
    return worst


def _mean_magnitude(gradient: Tensor) -> float:
    """Return the mean magnitude of the elements that are numbers; 0.0 if there are none."""
    return float(gradient.abs().nanmean().nan_to_num(0.0))
