"""The native form of a shrunk model: a copy of the user's own module with smaller parameters and adjusted integers."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchshear.graph import copy_model, locate
from torchshear.speedup._rewrite import Change

Attribute = tuple[str, str]  # module name, attribute name

# What the modules of torch.nn call the sizes of their own tensors: attribute -> (tensor, dimension).
_SIZES: tuple[tuple[tuple[type[nn.Module], ...], dict[str, tuple[str, int]]], ...] = (
    ((nn.Linear,), {"in_features": ("weight", 1), "out_features": ("weight", 0)}),
    ((nn.Bilinear,), {"in1_features": ("weight", 1), "in2_features": ("weight", 2), "out_features": ("weight", 0)}),
    ((nn.Embedding, nn.EmbeddingBag), {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)}),
    ((nn.PReLU,), {"num_parameters": ("weight", 0)}),
    ((nn.modules.batchnorm._NormBase,), {"num_features": ("running_mean", 0)}),
    ((nn.modules.batchnorm._NormBase,), {"num_features": ("weight", 0)}),
    ((nn.GroupNorm,), {"num_channels": ("weight", 0)}),
    ((nn.RNNBase,), {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)}),
    ((nn.RNNBase,), {"hidden_size": ("weight_hr_l0", 1), "proj_size": ("weight_hr_l0", 0)}),
    ((nn.RNNCellBase,), {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)}),
)


def native_copy(
    model: nn.Module, replacements: Mapping[int, Tensor], changes: Sequence[Change], adjusted: Collection[Attribute]
) -> nn.Module:
    """Copy a model with its tensors replaced, and with the integers that torch.nn's modules keep of their sizes.

    Args:
        model: the original.
        replacements: id of an original tensor -> its shrunk version; wherever the original holds the one, the copy
            holds the other, so that ties stay ties.
        changes: integers in the graph that the cut changed.
        adjusted: attributes of the user's own modules, from `adjustable`, to be changed as well.
    """
    duplicate = copy_model(model, dict(replacements))
    by_module = _changes_by_module(changes)
    modes = [(module, module.training) for module in duplicate.modules()]
    for module, _ in modes:
        module.training = False  # reading a parametrised weight computes it, and in train mode changes its buffers
    for name, module in duplicate.named_modules():
        found = by_module.get(name, {})
        if _is_torch_module(module):
            _update_torch_module(module, found)
        else:
            for attribute, value in _candidates(module, found).items():
                if (name, attribute) in adjusted:
                    setattr(module, attribute, value)
    for module, training in modes:
        module.training = training
    return duplicate


def adjustable(model: nn.Module, changes: Sequence[Change]) -> list[Attribute]:
    """Attributes of the user's own modules that may have to change.

    They hold, in a module whose forward used an integer that the cut changed, that integer's old value. Which of them
    really are that size, and which hold the number by coincidence, only running the model tells.
    """
    by_module = _changes_by_module(changes)
    return [
        (name, attribute)
        for name, module in model.named_modules()
        if not _is_torch_module(module)
        for attribute in _candidates(module, by_module.get(name, {}))
    ]


def _changes_by_module(changes: Sequence[Change]) -> dict[str, dict[int, int]]:
    """Module name -> old value -> new value, for values that changed in one way only."""
    seen: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for change in changes:
        seen[locate(change.node).module][change.old].add(change.new)
    return {module: {old: new.pop() for old, new in values.items() if len(new) == 1} for module, values in seen.items()}


def _is_torch_module(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.", "torch.ao."))


def _update_torch_module(module: nn.Module, changes: Mapping[int, int]) -> None:
    for types, sizes in _SIZES:
        for attribute, (tensor, dim) in sizes.items():
            value = getattr(module, tensor, None) if isinstance(module, types) else None
            if isinstance(value, Tensor) and hasattr(module, attribute):
                setattr(module, attribute, value.shape[dim])
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()  # one block of memory again, which cuDNN wants; does nothing on a CPU
    elif isinstance(module, nn.modules.conv._ConvNd):
        _update_convolution(module, changes)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        old = module.normalized_shape
        module.normalized_shape = (
            tuple(module.weight.shape) if module.weight is not None else tuple(changes.get(size, size) for size in old)
        )
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = changes.get(module.num_groups, module.num_groups)
    elif isinstance(module, nn.ChannelShuffle):
        module.groups = changes.get(module.groups, module.groups)
    elif isinstance(module, nn.Unflatten) and isinstance(module.unflattened_size, tuple):
        module.unflattened_size = tuple(changes.get(s, s) for s in module.unflattened_size)


def _update_convolution(module: nn.modules.conv._ConvNd, changes: Mapping[int, int]) -> None:
    module.groups = changes.get(module.groups, module.groups)
    inside, outside = (0, 1) if module.transposed else (1, 0)
    sizes = [module.weight.shape[inside], module.weight.shape[outside]]
    sizes[module.transposed] *= module.groups
    module.in_channels, module.out_channels = sizes


def _candidates(module: nn.Module, changes: Mapping[int, int]) -> dict[str, Any]:
    """Attributes of a module that hold a changed integer, with their new values."""
    found: dict[str, Any] = {}
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int) and value in changes:
            found[attribute] = changes[value]
        elif type(value) in (tuple, list) and value and all(type(item) is int for item in value):
            new = type(value)(changes.get(item, item) for item in value)
            if new != value:
                found[attribute] = new
    return found
