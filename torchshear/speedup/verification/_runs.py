"""Running a module for a comparison: copies, modes, given weights, outputs and gradients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from torchshear.dependency import PruningPlan
from torchshear.graph import Cache, ExampleInputs, Mode, caches_of, copy_model, forget, output_leaves
from torchshear.graph.model._mode import in_mode
from torchshear.graph.numerics._float64 import computing_in, to_float64
from torchshear.speedup.verification._kernels import SoundKernels
from torchshear.speedup.verification._random import EqualRandomness

Keep = Callable[[list[Any]], list[Any]]
Take = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What a model gave.

    Attributes:
        outputs: flat outputs, those that shrink at their kept positions.
        gradients: name of a parameter -> what is compared of the gradient of a fixed sum over the outputs; None if none
            was asked for, or no output has one.
    """

    outputs: list[Any]
    gradients: dict[str, Tensor] | None = None


def own_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating parameter; float32 if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def twin_of(model: nn.Module, caches: tuple[Cache, ...]) -> nn.Module:
    """A copy of a model with parameters of its own that share the values of the model's, which takes no memory."""
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters() if type(p) is nn.Parameter}
    twin = copy_model(model, shared)
    forget(twin, caches)
    return twin


def fresh_copy(model: nn.Module, example: ExampleInputs, dtype: torch.dtype) -> nn.Module:
    """A copy without what its modules keep of parameters that may be about to change, in float64 if that is asked."""
    twin = copy_model(model)
    forget(twin, caches_of(model, example))
    return twin.to(dtype) if dtype is torch.float64 else twin


def in_dtype(inputs: ExampleInputs, dtype: torch.dtype) -> ExampleInputs:
    """Copies of the inputs, in float64 if that is asked."""
    return to_float64(inputs) if dtype is torch.float64 else inputs.copy()


def leaves_of(inputs: ExampleInputs) -> list[Any]:
    """Arguments and keyword arguments, flat, in the order of a captured graph."""
    return pytree.tree_leaves((inputs.args, inputs.kwargs))


def kept_outputs(plan: PruningPlan, leaves: list[Any], mode: Mode = "eval") -> list[Any]:
    """Outputs of the original, those that shrink at their kept positions; `mode` is that of the plan's outputs."""
    leaves = list(leaves)
    for output in plan.outputs:
        for dim, kept in output.kept.items() if output.mode == mode else ():
            leaves[output.index] = leaves[output.index].index_select(
                dim, torch.from_numpy(kept.copy()).to(leaves[output.index].device)
            )
    return leaves


@contextmanager
def conditions(dtype: torch.dtype, *, gradients: bool = False) -> Iterator[None]:
    """What a run is compared under: one dtype throughout, random numbers that are equal, gradients or none."""
    equal = EqualRandomness()  # type: ignore[no-untyped-call]
    sound = SoundKernels() if gradients else nullcontext()  # type: ignore[no-untyped-call]
    with torch.set_grad_enabled(gradients), torch.random.fork_rng(devices=[]), equal, sound, computing_in(dtype):
        yield


def run_module(
    model: nn.Module,
    inputs: ExampleInputs,
    dtype: torch.dtype,
    mode: Mode = "eval",
    keep: Keep | None = None,
    take: Take | None = None,
) -> Run:
    """Run a module on copies of inputs. Its mode, attributes and buffers are the same afterwards.

    Args:
        model: the module, with parameters in `dtype`; they have no gradients afterwards.
        inputs: what to run on.
        dtype: dtype to compute in.
        mode: mode to run in.
        keep: takes the flat outputs to what is compared of them.
        take: takes the name and gradient of a floating parameter to what is compared of it; None for no gradients.
    """
    given = in_dtype(inputs, dtype)
    leaves = {name: p for name, p in model.named_parameters() if p.is_floating_point()} if take is not None else {}
    flags = [(leaf, leaf.requires_grad) for leaf in leaves.values()]
    try:
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        with in_mode(model, mode), conditions(dtype, gradients=take is not None):
            outputs = output_leaves(model(*given.args, **given.kwargs))
            outputs = outputs if keep is None else keep(outputs)
            return Run(detached(outputs), None if take is None else gradients_of(outputs, leaves, take))
    finally:
        for leaf, needs in flags:
            leaf.requires_grad_(needs)


def detached(outputs: list[Any]) -> list[Any]:
    """Outputs without what computed them."""
    return [value.detach() if isinstance(value, Tensor) else value for value in outputs]


def gradients_of(outputs: list[Any], leaves: Mapping[str, Tensor], take: Take) -> dict[str, Tensor] | None:
    """Gradients of a sum over all floating outputs, each element with a weight of its own; zero where there is none.

    Only what is compared of each is kept, so that not all are there at once.

    Args:
        outputs: flat outputs.
        leaves: name -> parameter, which has no gradient afterwards.
        take: takes a name and a gradient to what is compared of it.
    """
    total: Tensor | None = None
    for value in outputs:
        if isinstance(value, Tensor) and value.requires_grad:
            real = torch.view_as_real(value) if value.is_complex() else value
            places = torch.arange(1, real.numel() + 1, dtype=torch.float64, device=real.device)
            weights = torch.cos(places * 2**0.5).reshape(real.shape).to(real.dtype)
            finite = torch.where(real.isfinite(), real, 0)
            total = (finite * weights).sum() + (0 if total is None else total)
    if total is None or not leaves:
        return None
    found: dict[str, Tensor] = {}
    for leaf in leaves.values():
        leaf.grad = None  # a copy of a parameter of a class of its own may have one

    def collect(name: str, leaf: Tensor) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():  # types are what they are
            found[name] = take(name, leaf.grad if leaf.grad is not None else leaf.new_zeros(()).expand(leaf.shape))
            leaf.grad = None

    handles = [
        leaf.register_post_accumulate_grad_hook(lambda leaf, name=name: collect(name, leaf))  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items()
    ]
    try:
        torch.autograd.backward(total, inputs=list(leaves.values()))
    finally:
        for handle in handles:
            handle.remove()
        for leaf in leaves.values():
            leaf.grad = None
    for name in leaves.keys() - found.keys():
        collect(name, leaves[name])
    return {name: found[name] for name in leaves}


def as_it_is(name: str, gradient: Tensor) -> Tensor:
    """Compare all of a gradient."""
    return gradient


@contextmanager
def given(model: nn.Module, values: Mapping[str, Tensor] | None, caches: tuple[Cache, ...] = ()) -> Iterator[None]:
    """Have a model compute with other values of parameters and buffers for a while; those not named keep theirs.

    Args:
        model: the model.
        values: name -> tensor of the same shape; None: all keep theirs.
        caches: what the model keeps of values that it computed from its weights.
    """
    if values is None:
        yield
        return
    own = [(t, t.data, values[n]) for n, t in (*model.named_parameters(), *model.named_buffers()) if n in values]
    forget(model, caches)
    try:
        for tensor, _, value in own:
            tensor.data = value.to(tensor.dtype)
        yield
    finally:
        for tensor, data, _ in own:
            tensor.data = data
        forget(model, caches)
