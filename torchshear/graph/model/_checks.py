"""Checks of a model before its capture, so that the error is ours and says what to do."""

import inspect

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchshear._arguments import check_kind
from torchshear.errors import ArgumentError
from torchshear.graph.model._meta import is_on_meta

# Attribute that holds the model, by the class of torch's modules that wrap one.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def check_model(model: nn.Module) -> None:
    """Refuse what is not a module, wraps the module to be captured, or holds tensors that cannot be computed with.

    Raises:
        ArgumentError: says what to give instead.
    """
    check_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("model is a ScriptModule, which torch.export refuses; give the module it was made from.")
    inner = _WRAPPERS.get(type(model).__name__) if type(model).__module__.startswith("torch.") else None
    if inner is not None:
        raise ArgumentError(
            f"model is a {type(model).__name__} around a {type(getattr(model, inner)).__name__}; expected the module "
            f"itself. Give model.{inner}, and wrap the pruned model again."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        check_has_shape(name, tensor)
        if unusual_format(tensor):
            raise ArgumentError(
                f"{name!r} is {unusual_format(tensor)}, with which few operators compute. Expected dense tensors of 16 "
                f"bits or more: prune the model before it is quantized or made sparse."
            )
        if tensor.is_inference():
            raise ArgumentError(
                f"{name!r} was made in torch.inference_mode(), and so can never be trained again. Build or load the "
                f"model outside of it; copy.deepcopy(model), called outside of it, gives one with ordinary tensors."
            )
    if torch.get_default_device().type == "meta" and not is_on_meta(model):
        raise ArgumentError("torch's default device is meta, where nothing has values; call outside of that context.")


def check_module(model: object) -> None:
    """Raise ArgumentError for what is no module."""
    check_kind("model", model, nn.Module, "a torch.nn.Module instance")


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature of a model's forward; of a traced form, which takes anything, that of the original."""
    own = getattr(model, "original_signature", None)
    return own if isinstance(own, inspect.Signature) else inspect.signature(model.forward)


def check_has_shape(name: str, tensor: Tensor) -> None:
    """Raise ArgumentError for a lazy parameter or buffer, whose shape is found when its module first runs."""
    if is_lazy(tensor):
        raise ArgumentError(f"{name!r} is lazy and has no shape yet; run the model once on example inputs.")


def unusual_format(tensor: Tensor) -> str:
    """Return a phrase for a sparse layout or an 8-bit type, with which few operators compute; "" for other tensors."""
    if tensor.layout is not torch.strided:
        return f"in the layout {tensor.layout}"
    return f"of {tensor.dtype}" if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else ""
