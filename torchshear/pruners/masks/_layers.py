"""Layers whose weights can be masked, and the one view of their weights that all patterns see."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from torchshear.errors import ArgumentError, WeightError
from torchshear.graph.model._checks import check_module
from torchshear.pruners.masks._parametrization import held_weights


@dataclass(frozen=True, slots=True)
class LayerWeight:
    """Layout of a weight in a type of module.

    Attributes:
        attribute: name of the weight in the module.
        bias: name of the bias with one entry an output, or None.
        kind: "linear", "transposed linear" (inputs first), "projection" (of an attention module), "convolution",
            "transposed convolution" or "embedding".
        n_groups: groups of a grouped convolution, which read inputs of their own.
        is_in_first: whether dimension 0 of the weight runs over inputs and dimension 1 over outputs.
        suffix: what is added to the module's name, where a module keeps several weights.
    """

    attribute: str = "weight"
    bias: str | None = "bias"
    kind: str = "linear"
    n_groups: int = 1
    is_in_first: bool = False
    suffix: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class MaskableLayer:
    """A weight of a model, with what its dimensions are for.

    Attributes:
        name: name of the module, and of the projection in an attention module ("attn.in_proj").
        weight: qualified name of the weight.
        bias: qualified name of the bias, or None.
        form: how its module keeps the weight.
        tensor: the dense weight, also where a mask lies on it.
        problem: why it cannot be masked, or "".
    """

    name: str
    weight: str
    bias: str | None
    form: LayerWeight
    tensor: Tensor
    problem: str = ""

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as (groups, outputs, taps, inputs), outputs and inputs of one group."""
        shape, groups = tensor.shape, self.form.n_groups
        grid = tensor.reshape(groups, shape[0] // groups, shape[1], -1)
        return grid.permute(0, 2, 3, 1) if self.form.is_in_first else grid.permute(0, 1, 3, 2)

    def unview(self, grid: Tensor) -> Tensor:
        """The reverse of `view`."""
        back = grid.permute(0, 3, 1, 2) if self.form.is_in_first else grid.permute(0, 1, 3, 2)
        return back.reshape(self.tensor.shape)

    def require_values(self) -> None:
        """Refuse a weight without values.

        Raises:
            WeightError: it is on the meta device, or its layer was never run.
        """
        if is_lazy(self.tensor) or self.tensor.is_meta:
            where = "has no shape before the model is run" if is_lazy(self.tensor) else "is on the meta device"
            raise WeightError(
                f"{self.weight!r} {where} and has no values to choose by; load the weights, and run lazy layers once."
            )


Describe = Callable[[Any], tuple[LayerWeight, ...]]

_TYPES: dict[str, Describe] = {}


def layer_type(*types: type[nn.Module] | str) -> Callable[[Describe], Describe]:
    """Register how modules of some types, and of types derived from them, keep their weights.

    Args:
        types: classes, or their full names ("transformers.pytorch_utils.Conv1D") where the package may be missing.

    Raises:
        ArgumentError: a type is registered already.
    """

    def add(function: Describe) -> Describe:
        for given in types:
            name = given if isinstance(given, str) else _full_name(given)
            if name in _TYPES:
                raise ArgumentError(f"layer type {name!r} is registered already, as {_TYPES[name].__name__}.")
            _TYPES[name] = function
        return function

    return add


def _full_name(of: type) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def find_maskable_layers(model: nn.Module) -> dict[str, MaskableLayer]:
    """All weights of a model that are of a registered type, by name, in the order of its modules.

    Weights that are tied are one layer under each of its names, seen as the first module sees them that is no table of
    embeddings. Layers inside which torch computes the weight are listed with their `problem`.

    Args:
        model: the model; masks may lie on it.

    Raises:
        ArgumentError: `model` is not a module.
    """
    check_module(model)
    found: dict[str, MaskableLayer] = {}
    for prefix, module in model.named_modules():
        describe = next((_TYPES[name] for name in map(_full_name, type(module).__mro__) if name in _TYPES), None)
        for form in describe(module) if describe is not None else ():
            layer = _layer(prefix, module, form)
            if layer is not None:
                found[layer.name] = layer
    first: dict[int, MaskableLayer] = {}
    for layer in sorted(found.values(), key=lambda one: one.form.kind == "embedding"):
        first.setdefault(id(layer.tensor), layer)
    return {name: first[id(layer.tensor)] for name, layer in found.items()}


def _layer(prefix: str, module: nn.Module, form: LayerWeight) -> MaskableLayer | None:
    held = held_weights(module)
    tensor = held.get(form.attribute)
    value = getattr(module, form.attribute, None) if tensor is None else tensor
    if not isinstance(value, Tensor):
        return None
    path = f"{prefix}." if prefix else ""
    problem = (
        "" if tensor is not None else "its weight is computed (a parametrization or hook): make it permanent first"
    )
    if not value.is_floating_point():
        problem = f"its weight is of type {value.dtype}, not a floating type"
    return MaskableLayer(
        name=f"{path}{form.suffix}" if form.suffix else prefix,
        weight=f"{path}{form.attribute}",
        bias=f"{path}{form.bias}" if form.bias is not None and held.get(form.bias) is not None else None,
        form=form,
        tensor=value,
        problem=problem,
    )


@layer_type(nn.Linear)
def _linear(_: nn.Linear) -> tuple[LayerWeight, ...]:
    return (LayerWeight(),)


@layer_type("transformers.pytorch_utils.Conv1D")
def _linear_in_first(_: nn.Module) -> tuple[LayerWeight, ...]:
    return (LayerWeight(kind="transposed linear", is_in_first=True),)


@layer_type(NonDynamicallyQuantizableLinear)
def _output_projection(_: nn.Linear) -> tuple[LayerWeight, ...]:
    """Of nn.MultiheadAttention, which reads the weight and never calls the module."""
    return (LayerWeight(kind="projection"),)


@layer_type(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: nn.Conv2d) -> tuple[LayerWeight, ...]:
    return (LayerWeight(kind="convolution", n_groups=module.groups),)


@layer_type(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(module: nn.ConvTranspose2d) -> tuple[LayerWeight, ...]:
    return (LayerWeight(kind="transposed convolution", n_groups=module.groups, is_in_first=True),)


@layer_type(nn.Embedding)
def _embedding(_: nn.Embedding) -> tuple[LayerWeight, ...]:
    return (LayerWeight(bias=None, kind="embedding", is_in_first=True),)


@layer_type(nn.MultiheadAttention)
def _attention(module: nn.MultiheadAttention) -> tuple[LayerWeight, ...]:
    """Queries, keys and values; the output projection is a linear layer of its own."""
    if module.in_proj_weight is not None:
        return (LayerWeight("in_proj_weight", "in_proj_bias", kind="projection", suffix="in_proj"),)
    return tuple(LayerWeight(f"{one}_proj_weight", None, "projection", suffix=f"{one}_proj") for one in "qkv")


def dense_values(layer: MaskableLayer) -> Tensor:
    """The dense weight in the type that scores are computed in: its own, or float32 where that is wider.

    Raises:
        WeightError: it has no values, or they are not finite.
    """
    layer.require_values()
    values = layer.tensor.detach()
    if not bool(torch.isfinite(values).all()):
        raise WeightError(
            f"{layer.weight!r} holds values that are NaN or infinite; train or load the model again: masks of such "
            f"weights would be meaningless."
        )
    return values if values.dtype == torch.float64 else values.float()
