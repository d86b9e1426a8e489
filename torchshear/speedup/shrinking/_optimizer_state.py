"""Training state that follows a cut: the optimizer of a model that was shrunk, and running averages of its weights."""

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from torchshear._arguments import check_kind
from torchshear.dependency.plans._plan import PruningPlan
from torchshear.dependency.plans._tensor_plans import StatePlan
from torchshear.errors import ArgumentError, PlanError
from torchshear.graph.model._checks import check_module
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._process import outside_inference_mode
from torchshear.speedup.rewriting._slicing import slice_like_memory

# Below a parametrization that changes no positions, as a mask, a weight goes by another name.
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$")
_OWN_ATTRIBUTES = ("param_groups", "state", "defaults")


@dataclass(frozen=True, slots=True, eq=False)
class _Successor:
    """A parameter of a shrunk model in the place of one of the model.

    Attributes:
        name: its name, as the model has it.
        parameter: the parameter of the shrunk model.
        entry: what is kept; None for all.
    """

    name: str
    parameter: nn.Parameter
    entry: StatePlan | None


@outside_inference_mode()
def shrink_optimizer(optimizer: Optimizer, model: nn.Module, small: nn.Module, plan: PruningPlan) -> None:
    """Have an optimizer go on with a shrunk model in the middle of training. The optimizer is changed in place.

    Each parameter of the model gives way to that of the shrunk model, in its group and with its state: tensors of its
    shape (momentum, moments) are sliced to what the plan keeps, steps and numbers stay, and so do gradients that wait
    for a step. Parameter groups, learning rates and hooks are untouched, and since the optimizer is the same object,
    schedulers and gradient scalers that hold it go on as well. Training then continues exactly as that of the masked
    model would, if the optimizer treats each value by itself, as SGD and the Adam family do.

    Parameters of the optimizer that are not the model's, as those of a loss, stay. An optimizer that wraps another (in
    one of its attributes) is followed to the inner one.

    Args:
        optimizer: the optimizer of the model.
        model: the model before, masked or not.
        small: the shrunk model, on the same device and of the same dtype; wrap and compile it anew where the model was.
        plan: the plan between them.

    Raises:
        ArgumentError: the optimizer holds none of the model's parameters; it keeps them in places of its own, as LBFGS
            does; its state of a parameter that shrinks has a meaning that is not known, as that of Shampoo. Nothing is
            changed then.
        PlanError: the plan is not between these two models.

    Example:
        >>> import torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.randn(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> result = torchshear.prune(model, torch.randn(1, 4), ratio=0.5)
        >>> torchshear.speedup.shrink_optimizer(optimizer, model, result.model, result.plan)
        >>> optimizer.state[result.model[0].weight]["exp_avg"].shape
        torch.Size([4, 4])
    """
    check_kind("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
    successors = _pair_parameters(model, small, plan)
    optimizers = list(_with_inner(optimizer))
    held = [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]
    if not any(id(parameter) in successors for parameter in held):
        raise ArgumentError(
            f"the {type(optimizer).__name__} holds none of the parameters of this {type(model).__name__}; expected the "
            f"optimizer that trains it. One that was made for a copy, or that follows the shrunk model already, is of "
            f"another model."
        )
    for one in optimizers:
        _check_places(one, successors)
    states = {id(one.state): (one.state, _follow(one.state, successors)) for one in optimizers}
    gradients = {
        key: _slice(found.name, "grad", parameter.grad, parameter, found.entry)
        for key, found, parameter in ((id(p), successors[id(p)], p) for p in held if id(p) in successors)
        if parameter.grad is not None and found.parameter.grad is None
    }
    # From here on nothing can fail.
    for one in optimizers:
        for group in one.param_groups:
            group["params"] = [successors[id(p)].parameter if id(p) in successors else p for p in group["params"]]
    for state, followed in states.values():
        state.clear()
        state.update(followed)
    for key, gradient in gradients.items():
        successors[key].parameter.grad = gradient


@outside_inference_mode()
def shrink_average(averaged: AveragedModel, model: nn.Module, small: nn.Module, plan: PruningPlan) -> None:
    """Have a running average of a model's weights (EMA, SWA) go on with a shrunk model. It is changed in place.

    Its module becomes one like the shrunk model, with the averaged values at what the plan keeps; how it averages, and
    over how many steps it has, stays. Of buffers, a shrunk model's own that the average lacks are taken.

    Args:
        averaged: `torch.optim.swa_utils.AveragedModel` of the model.
        model: the model before, masked or not.
        small: the shrunk model.
        plan: the plan between them.

    Raises:
        ArgumentError: it averages another model. Nothing is changed then.
        PlanError: the plan is not between these two models.
    """
    check_kind("averaged", averaged, AveragedModel, "a torch.optim.swa_utils.AveragedModel")
    _pair_parameters(model, small, plan)
    values, entries = _named_tensors(averaged.module), _entries_by_name(plan)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = values.get(plain_name(name))
        if own is None or own.shape != parameter.shape:
            raise ArgumentError(
                f"the average has no {name!r} as {type(model).__name__} has it; expected the AveragedModel of this "
                f"model. One that follows the shrunk model already is of another."
            )
    device = next((tensor.device for tensor in values.values()), torch.device("cpu"))
    twin = copy_model(small).to(device)
    for name, tensor in _named_tensors(twin).items():
        value, entry = values.get(name), entries.get(name)
        if value is not None and tuple(value.shape) == (tuple(tensor.shape) if entry is None else entry.shape):
            with torch.no_grad():
                tensor.copy_(value if entry is None else slice_like_memory(value, entry))
    modes = {name: module.training for name, module in averaged.module.named_modules()}
    for name, module in twin.named_modules():
        module.training = modes.get(name, averaged.module.training)
    averaged.module = twin


def plain_name(name: str) -> str:
    """Return the name of a weight without the parametrization that lies on it."""
    return _PARAMETRIZED.sub(r"\1\2", name)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by every name, those of masked weights as without masks."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {plain_name(name): tensor for name, tensor in (*parameters, *model.named_buffers(remove_duplicate=False))}


def _entries_by_name(plan: PruningPlan) -> dict[str, StatePlan]:
    """Return what a plan keeps of tensors that shrink, by every name, those of masked weights as without masks."""
    by_name = dict(plan.state) | {alias: plan.state[name] for alias, name in plan.aliases.items() if name in plan.state}
    return {plain_name(name): entry for name, entry in by_name.items()}


def _pair_parameters(model: nn.Module, small: nn.Module, plan: PruningPlan) -> dict[int, _Successor]:
    """Return the successor of each parameter of a model by the id of the parameter.

    Raises:
        ArgumentError: an argument is of another type; a parameter is on another device, or of another dtype, in the
            shrunk model.
        PlanError: a parameter does not have the shape that it should, in either model.
    """
    check_module(model)
    check_kind("small", small, nn.Module, "the shrunk model")
    check_kind("plan", plan, PruningPlan, "the plan between the models, as result.plan")
    after = {plain_name(name): one for name, one in small.named_parameters(remove_duplicate=False)}
    entries = _entries_by_name(plan)
    missing = sorted(entries.keys() - _named_tensors(model).keys())
    if missing:
        raise PlanError(
            f"the plan is for {plan.model_type}, which has {missing[0]!r}; {type(model).__name__} does not. Expected "
            f"the model that the plan was made for."
        )
    found: dict[int, _Successor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape, entry = tuple(parameter.shape), entries.get(plain_name(name))
        if entry is not None and entry.shape != shape:
            raise PlanError(
                f"the plan is for {plan.model_type}, where {name!r} has shape {entry.shape}; in "
                f"{type(model).__name__} it has {shape}. Expected the model that the plan was made for."
            )
        wanted = shape if entry is None else entry.new_shape
        new = after.get(plain_name(name))
        if new is None or tuple(new.shape) != wanted:
            said = "is missing" if new is None else f"has shape {tuple(new.shape)}"
            raise PlanError(
                f"{name!r} {said} in the shrunk model; by the plan it has {wanted}. Expected the model that "
                f"torchshear.shrink makes by this plan."
            )
        if (new.device, new.dtype) != (parameter.device, parameter.dtype):
            raise ArgumentError(
                f"{name!r} is {new.dtype} on {new.device} in the shrunk model, and {parameter.dtype} on "
                f"{parameter.device} in the model; move and convert the shrunk model after its optimizer follows."
            )
        if found.setdefault(id(parameter), _Successor(name, new, entry)).parameter is not new:
            raise PlanError(f"{name!r} is tied in the model, and a parameter of its own in the shrunk one.")
    return found


def _with_inner(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer and those that it wraps, each once."""
    waiting, seen = [optimizer], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            waiting += [value for value in vars(one).values() if isinstance(value, Optimizer)]
            yield one


def _check_places(optimizer: Optimizer, successors: Mapping[int, _Successor]) -> None:
    """Raise ArgumentError if an optimizer keeps parameters where they would not be replaced."""
    for attribute, value in vars(optimizer).items():
        if attribute in _OWN_ATTRIBUTES or not isinstance(value, list | tuple | dict):
            continue
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        if any(id(one) in successors for one in inside):
            raise ArgumentError(
                f"{type(optimizer).__name__} keeps parameters in its attribute {attribute!r}, where they cannot be "
                f"replaced by those of the shrunk model; make a new optimizer for the shrunk model."
            )


def _follow(state: Mapping[Any, Any], successors: Mapping[int, _Successor]) -> dict[Any, Any]:
    """Return the state of an optimizer for the parameters of a shrunk model.

    Raises:
        ArgumentError: part of it cannot be sliced.
    """
    followed: dict[Any, Any] = {}
    for key, held in state.items():
        found = successors.get(id(key))
        if found is None or found.entry is None:
            followed[key if found is None else found.parameter] = held
        elif isinstance(held, MutableMapping):
            followed[found.parameter] = {
                what: _slice(found.name, str(what), value, key, found.entry) for what, value in held.items()
            }
        else:
            raise _unknown_state(found.name, type(held).__name__, f"a {type(held).__name__}")
    return followed


def _slice(name: str, what: str, value: Any, parameter: Tensor, entry: StatePlan | None) -> Any:
    """Slice one value that an optimizer keeps of a parameter.

    A tensor of the parameter's shape holds a number for each of its values. One that has size 1 in some dimensions
    holds, as the factors of `torch.optim.Adafactor` do, a mean over those; the mean stays what it was.

    Raises:
        ArgumentError: it is neither, nor a number.
    """
    if entry is None:
        return value
    if not isinstance(value, Tensor):
        if isinstance(value, list | tuple | Mapping) and value:
            raise _unknown_state(name, what, f"a {type(value).__name__}")
        return value
    if value.numel() == 1:
        return value
    shape = tuple(parameter.shape)
    if tuple(value.shape) == shape:
        return slice_like_memory(value, entry)
    is_factor = value.ndim == len(shape) and all(size in (1, own) for size, own in zip(value.shape, shape, strict=True))
    if not is_factor or entry.blocks:
        raise _unknown_state(name, what, f"of shape {tuple(value.shape)}")
    kept = {dim: positions for dim, positions in entry.kept.items() if value.shape[dim] != 1}
    return slice_like_memory(value, StatePlan(tuple(value.shape), kept, {}))


def _unknown_state(name: str, what: str, form: str) -> ArgumentError:
    """Make the error for state of which nobody knows what belongs to the positions that stay."""
    return ArgumentError(
        f"the optimizer keeps {what!r} of {name!r}, {form}, and it is not known what of that belongs to the positions "
        f"that stay; expected tensors of the parameter's shape, and numbers. Make a new optimizer for the shrunk model."
    )
