"""Which models are captured: told before torch.export fails on one in words of its own."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchshear.errors import ArgumentError
from torchshear.graph._meta import is_on_meta

# Modules that run another one, by where it is inside them.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def check_model(model: nn.Module) -> None:
    """Refuse what is not a module, runs another module in a way that a graph does not hold, or cannot be computed with.

    Raises:
        ArgumentError: says what to give instead.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is {type(model).__name__}; expected a torch.nn.Module instance.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("model is a ScriptModule, which torch.export refuses; give the module it was made from.")
    inner = _WRAPPERS.get(type(model).__name__) if type(model).__module__.startswith("torch.") else None
    if inner is not None:
        raise ArgumentError(
            f"model is a {type(model).__name__} around a {type(getattr(model, inner)).__name__}; expected the module "
            f"itself. Give model.{inner}, and wrap the pruned model again."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _check_tensor(name, tensor)
    if torch.get_default_device().type == "meta" and not is_on_meta(model):
        raise ArgumentError("torch's default device is meta, where nothing has values; call outside of that context.")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ArgumentError(f"{name!r} is lazy and has no shape yet; run the model once on example inputs.")
    if tensor.layout is not torch.strided or (tensor.is_floating_point() and tensor.dtype.itemsize == 1):
        what = tensor.dtype if tensor.layout is torch.strided else f"in the layout {tensor.layout}"
        raise ArgumentError(
            f"{name!r} is {what}, which few operators compute with. Expected dense tensors of 16 bits or more: "
            f"prune the model before it is quantized or made sparse."
        )
    if tensor.is_inference():
        raise ArgumentError(
            f"{name!r} was made in torch.inference_mode(), and so can never be trained again. Build or load the "
            f"model outside of it; copy.deepcopy(model), called outside of it, gives one with ordinary tensors."
        )
