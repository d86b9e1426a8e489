"""2:4 sparsity on CUDA: which weights torch's semi-structured tensors take, and the conversion."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from torchshear.errors import ArgumentError, MaskError, first_line
from torchshear.graph.model._copy import copy_model
from torchshear.pruners.masks._layers import MaskableLayer, find_maskable_layers
from torchshear.pruners.masks._masks import Masks
from torchshear.pruners.masks._parametrization import has_masks

Backend = Literal["cusparselt", "cutlass"]

# What rows (outputs) and columns (inputs) must be multiples of; as torch 2.13 checks it.
MULTIPLES: Final[Mapping[Backend, Mapping[torch.dtype, tuple[int, int]]]] = MappingProxyType(
    {
        "cusparselt": {
            torch.float16: (16, 16),
            torch.bfloat16: (16, 16),
            torch.int8: (32, 32),
            torch.float8_e4m3fn: (32, 32),
        },
        "cutlass": {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)},
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class SemiStructured:
    """A model for inference with 2:4 weights.

    Attributes:
        model: a copy of the model, in which some linear layers hold semi-structured tensors.
        converted: names of these layers.
        skipped: name of every other layer that was masked -> why it stays dense.
    """

    model: nn.Module
    converted: tuple[str, ...]
    skipped: Mapping[str, str]


def shape_problem(shape: tuple[int, ...], dtype: torch.dtype, backend: Backend) -> str:
    """Return the reason for which torch's semi-structured tensors do not take a weight, or "".

    Args:
        shape: shape of the weight.
        dtype: its type. Float32 is left out: torch's kernels take 1:2 of it, which is another pattern.
        backend: "cusparselt", torch's default, or "cutlass", for devices of compute capability 8.x alone.
    """
    if len(shape) != 2:
        return f"a weight of {len(shape)} dimensions; linear layers only"
    if dtype not in MULTIPLES[backend]:
        known = ", ".join(str(one).removeprefix("torch.") for one in MULTIPLES[backend])
        return f"{str(dtype).removeprefix('torch.')} is none of {known}"
    rows, columns = MULTIPLES[backend][dtype]
    if not all(shape) or shape[0] % rows or shape[1] % columns:
        return f"{shape[0]} x {shape[1]} is no multiple of {rows} x {columns}"
    return ""


def is_two_of_four(tensor: Tensor) -> bool:
    """Return whether at most two of every four consecutive entries along the last dimension are not zero (or False)."""
    if tensor.shape[-1] % 4:
        return False
    return bool(((tensor != 0).reshape(-1, 4).sum(1) <= 2).all())


def to_semi_structured(model: nn.Module, masks: Masks) -> SemiStructured:
    """Turn linear layers with 2:4 masks into torch's semi-structured tensors, for inference on CUDA.

    Layers that the rules of shape and type leave out stay dense and say why. The pattern of the weights is validated
    first, since packing would drop further weights in silence, and each layer's result is compared with the dense one.
    Whether a layer is faster depends on device and size; measure it.

    Args:
        model: a model on a CUDA device, in half precision, whose masks were made permanent.
        masks: its masks.

    Returns:
        A copy of the model with the new weights, which cannot be trained.

    Raises:
        MaskError: there is no CUDA device or the model is not on it, masks still lie on the model, the masks are of
            another model, a weight is not zero where it is masked, no layer can be converted, or torch's kernel refuses
            a weight or gives another result.
    """
    if not isinstance(model, nn.Module) or not isinstance(masks, Masks):
        raise ArgumentError(f"expected a model and Masks, but got {type(model).__name__} and {type(masks).__name__}.")
    if has_masks(model):
        raise MaskError("masks still lie on the model; call torchshear.pruners.masks.make_permanent(model) first.")
    backend: Backend = "cutlass" if SparseSemiStructuredTensor._FORCE_CUTLASS else "cusparselt"
    chosen, skipped = _layers_to_convert(model, masks, backend)
    if not torch.cuda.is_available():
        raise MaskError(
            f"no CUDA device is available; torch's semi-structured tensors run on CUDA alone. Of {len(masks.tensors)} "
            f"masks, {len(chosen)} could be converted there. On a CPU nothing runs faster for 2:4 zeros."
        )
    if not chosen:
        why = next(iter(skipped.items()), ("", "no masks"))
        raise MaskError(f"no layer can be converted: {why[0]!r}: {why[1]}.")
    copied = copy_model(model)
    for name in chosen:
        module = copied.get_submodule(name)
        assert isinstance(module, nn.Linear), "no other is chosen"
        module.weight = nn.Parameter(_pack(name, module.weight.detach()), requires_grad=False)
    return SemiStructured(copied, tuple(chosen), MappingProxyType(skipped))


def _layers_to_convert(model: nn.Module, masks: Masks, backend: Backend) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to convert, and why the others are not.

    Raises:
        MaskError: the masks do not fit the model.
    """
    layers = {layer.weight: layer for layer in find_maskable_layers(model).values()}
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    for name, mask in masks.tensors.items():
        if name not in layers:
            continue
        problem = _problem(layers[name], mask, backend)
        if not problem and type(model.get_submodule(layers[name].name)).forward is not nn.Linear.forward:
            problem = "its class has a forward of its own"
        if problem:
            skipped[layers[name].name] = problem
        else:
            chosen.append(layers[name].name)
    if not chosen and not skipped:
        raise MaskError("the masks are of no layer of this model.")
    return chosen, skipped


def _problem(layer: MaskableLayer, mask: Tensor, backend: Backend) -> str:
    if tuple(mask.shape) != tuple(layer.tensor.shape):
        raise MaskError(f"the mask of {layer.weight!r} has shape {tuple(mask.shape)}; the masks are of another model.")
    if layer.form.kind != "linear":
        return f"{layer.form.kind}: linear layers only"
    if not is_two_of_four(mask):
        return "its mask is not 2:4"
    weight = layer.tensor.detach()
    if bool((weight[~mask.to(weight.device)] != 0).any()):
        raise MaskError(
            f"{layer.weight!r} is not zero everywhere where it is masked; lay the masks on and make them permanent "
            f"(apply, make_permanent) before it is converted."
        )
    return shape_problem(tuple(weight.shape), weight.dtype, backend)


def _pack(name: str, weight: Tensor) -> Tensor:
    """A weight as a semi-structured tensor, checked against the dense one.

    Raises:
        MaskError: the weight is not on CUDA, torch refuses it, or its kernel gives another result.
    """
    if not weight.is_cuda:
        raise MaskError(f"layer {name!r} is on {weight.device}; move the model to CUDA first: model.cuda().")
    generator = torch.Generator(weight.device).manual_seed(0)
    probe = torch.randn(64, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    try:
        packed: Tensor = to_sparse_semi_structured(weight.contiguous())
        found, expected = (functional.linear(probe, one).double() for one in (packed, weight))
    except RuntimeError as error:
        raise MaskError(f"torch cannot run layer {name!r} as a semi-structured tensor: {first_line(error)}") from error
    error_size = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error_size < 2e-2:  # a NaN is no small number
        raise MaskError(
            f"layer {name!r} as a semi-structured tensor differs from the dense one by {error_size:.1e} of the largest "
            f"output; this device or build of torch computes something else."
        )
    return packed
