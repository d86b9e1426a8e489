"""The native form of a shrunk model: a copy of the user's own module with smaller parameters and adjusted integers."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.plans._form import OutputFactors, Sizes
from torchshear.graph import Graph
from torchshear.graph._location import canonical_module_names, locate
from torchshear.graph._run import graph_values
from torchshear.graph.model._copy import copy_model
from torchshear.graph.model._state import clear_caches
from torchshear.graph.numerics._float64 import to_float64
from torchshear.speedup.native._attention_scale import multiply_output
from torchshear.speedup.native._reference_run import Original, ReferenceRuns
from torchshear.speedup.native._size_attributes import assign_size
from torchshear.speedup.rewriting._rewrite import changed_integers, rewrite_graph

_NOTHING: Mapping[Any, Any] = MappingProxyType({})
# Sizes that modules of torch.nn keep of their own tensors: attribute -> (tensor, dimension).
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


class NativeBuilder:
    """Builds native forms of one cut, and runs the rewritten graph that they have to equal.

    Args:
        original: the captured original.
        cut: the units that are removed.
        tensors: canonical name -> tensor of the original.
        sliced: canonical name -> shrunk tensor.

    Attributes:
        original: the captured original.
        changes: integers in the graph that the cut changes.
        dtype: dtype of the model's first floating tensor.
    """

    def __init__(
        self, original: Original, cut: Cut, tensors: Mapping[str, Tensor], sliced: Mapping[str, Tensor]
    ) -> None:
        graph = original.graph
        self.original = original
        self.changes = changed_integers(graph.fx_graph, cut.groups.facts, cut)
        self.dtype = next((t.dtype for t in sliced.values() if t.is_floating_point()), torch.float32)
        self._sliced = sliced
        self._rewritten = rewrite_graph(graph.fx_graph, cut.groups.facts, cut)
        self._replacements = {id(tensors[name]): tensor for name, tensor in sliced.items()}
        constants = own_constants(original.model, graph)
        self._replacements |= {id(own): sliced[name] for name, own in constants if name in sliced}

    def build(self, sizes: Sizes = _NOTHING, factors: OutputFactors = _NOTHING) -> nn.Module:
        """Copy the model with shrunk tensors, and with the integers that torch.nn's modules keep of their sizes.

        Wherever the original holds a tensor, the copy holds its shrunk version, so that ties stay ties.

        Args:
            sizes: integers elsewhere in the modules that change as well.
            factors: factors on parts of the outputs of modules.
        """
        native = copy_model(self.original.model, dict(self._replacements))
        names = canonical_module_names(native)
        changes: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))  # module -> old -> new values
        for change in self.changes:
            module_name = locate(change.node).module
            changes[names.get(module_name, module_name)][change.old].add(change.new)
        modes = [(module, module.training) for module in native.modules()]
        for module, _ in modes:
            module.training = False  # reading a parametrised weight computes it, and in train mode changes its buffers
        for name, module in native.named_modules():
            if is_torch_module(module):
                one_way = {old: min(new) for old, new in changes[name].items() if len(new) == 1}
                _update_torch_module(module, one_way)
        for module, training in modes:
            module.training = training
        named = dict(native.named_modules())
        for slot, value in sizes.items():
            assign_size(named[slot.module], slot, value)
        for part, factor in factors.items():
            multiply_output(native, part, factor)
        clear_caches(native, self.original.caches)
        return native

    def reference_runs(self, dtype: torch.dtype) -> ReferenceRuns:
        """Return the runs that a native form has to agree with, computed in a dtype."""
        return ReferenceRuns(self.original, self._rewritten, self._sliced, dtype)

    def run_rewritten(self, dtype: torch.dtype, change: Callable[[fx.Node, Any], Any]) -> Iterator[tuple[fx.Node, Any]]:
        """Yield the nodes of the rewritten graph with their values on the example, each replaced by `change`."""
        inputs = self.original.example
        inputs = to_float64(inputs) if dtype is torch.float64 else inputs.copy()
        leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
        return graph_values(self._rewritten, self._sliced, leaves, change)


def own_constants(model: nn.Module, graph: Graph) -> list[tuple[str, Tensor]]:
    """Return the plain tensor attributes of the model's modules that the graph holds as constants."""
    found: list[tuple[str, Tensor]] = []
    for name, entry in graph.state.items():
        if entry.kind == "constant":
            owner: Any = model
            for part in name.split("."):
                owner = getattr(owner, part, None)
            if isinstance(owner, Tensor):
                found.append((name, owner))
    return found


def is_torch_module(module: nn.Module) -> bool:
    """Check that a module is one of torch's own, whose integers follow their tensors."""
    return type(module).__module__.startswith(("torch.nn.", "torch.ao."))


def _update_torch_module(module: nn.Module, changes: Mapping[int, int]) -> None:
    """Set the integers of a module of torch.nn to the sizes of its tensors, or as they changed in the graph."""
    for types, sizes in _SIZES:
        for attribute, (tensor, dim) in sizes.items():
            value = getattr(module, tensor, None) if isinstance(module, types) else None
            if isinstance(value, Tensor) and hasattr(module, attribute):
                setattr(module, attribute, value.shape[dim])
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()  # one block of memory again, which cuDNN wants; does nothing on a CPU
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.groups = changes.get(module.groups, module.groups)
        dims = (0, 1) if module.transposed else (1, 0)
        channels = [module.weight.shape[dim] for dim in dims]
        channels[module.transposed] *= module.groups
        module.in_channels, module.out_channels = channels
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase):
        _update_norm(module, changes)
    elif isinstance(module, nn.ChannelShuffle):
        module.groups = changes.get(module.groups, module.groups)
    elif isinstance(module, nn.Unflatten) and isinstance(module.unflattened_size, tuple):
        module.unflattened_size = tuple(changes.get(s, s) for s in module.unflattened_size)


def _update_norm(module: nn.Module, changes: Mapping[int, int]) -> None:
    """Set the sizes of a norm; those of its input where it has no tensor that tells them."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        old = module.normalized_shape
        module.normalized_shape = (
            tuple(module.weight.shape) if module.weight is not None else tuple(changes.get(size, size) for size in old)
        )
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = changes.get(module.num_groups, module.num_groups)
    elif isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is None and module.running_mean is None:
        module.num_features = changes.get(module.num_features, module.num_features)
