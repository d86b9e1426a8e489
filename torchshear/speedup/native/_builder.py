"""The native form of a shrunk model: a copy of the user's own module with smaller parameters and adjusted integers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from torchshear.dependency import Scales, Sizes
from torchshear.graph import canonical_module_names, copy_model, locate
from torchshear.speedup.native._attention_scale import keep_scale
from torchshear.speedup.native._size_attributes import assign
from torchshear.speedup.rewriting._rewrite import Change

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
    model: nn.Module, replacements: Mapping[int, Tensor], changes: Sequence[Change], sizes: Sizes, scales: Scales
) -> nn.Module:
    """Copy a model with its tensors replaced, and with the integers that torch.nn's modules keep of their sizes.

    Args:
        model: the original.
        replacements: id of an original tensor -> its shrunk version; wherever the original holds the one, the copy
            holds the other, so that ties stay ties.
        changes: integers in the graph that the cut changed.
        sizes: integers elsewhere in the modules to be changed as well.
        scales: parts of what modules give that are to be multiplied.
    """
    duplicate = copy_model(model, dict(replacements))
    by_module = _changes_by_module(changes, canonical_module_names(duplicate))
    modes = [(module, module.training) for module in duplicate.modules()]
    for module, _ in modes:
        module.training = False  # reading a parametrised weight computes it, and in train mode changes its buffers
    for name, module in duplicate.named_modules():
        if is_torch_module(module):
            _update_torch_module(module, by_module.get(name, {}))
    for module, training in modes:
        module.training = training
    named = dict(duplicate.named_modules())
    for slot, value in sizes.items():
        assign(named[slot.module], slot, value)
    for part, factor in scales.items():
        keep_scale(duplicate, part, factor)
    return duplicate


def _changes_by_module(changes: Sequence[Change], first: Mapping[str, str]) -> dict[str, dict[int, int]]:
    """Module name -> old value -> new value, for values that changed in one way only."""
    seen: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for change in changes:
        module = locate(change.node).module
        seen[first.get(module, module)][change.old].add(change.new)
    return {module: {old: new.pop() for old, new in values.items() if len(new) == 1} for module, values in seen.items()}


def is_torch_module(module: nn.Module) -> bool:
    """Whether a module is one of torch's own, whose integers follow their tensors."""
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
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase):
        _update_norm(module, changes)
    elif isinstance(module, nn.ChannelShuffle):
        module.groups = changes.get(module.groups, module.groups)
    elif isinstance(module, nn.Unflatten) and isinstance(module.unflattened_size, tuple):
        module.unflattened_size = tuple(changes.get(s, s) for s in module.unflattened_size)


def _update_norm(module: nn.Module, changes: Mapping[int, int]) -> None:
    """Sizes of a norm; where it has no tensor that tells them, they are those of its input."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        old = module.normalized_shape
        module.normalized_shape = (
            tuple(module.weight.shape) if module.weight is not None else tuple(changes.get(size, size) for size in old)
        )
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = changes.get(module.num_groups, module.num_groups)
    elif isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is None and module.running_mean is None:
        module.num_features = changes.get(module.num_features, module.num_features)


def _update_convolution(module: nn.modules.conv._ConvNd, changes: Mapping[int, int]) -> None:
    module.groups = changes.get(module.groups, module.groups)
    inside, outside = (0, 1) if module.transposed else (1, 0)
    sizes = [module.weight.shape[inside], module.weight.shape[outside]]
    sizes[module.transposed] *= module.groups
    module.in_channels, module.out_channels = sizes
