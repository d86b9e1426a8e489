"""Neural Compressor's `parse_auto_slim_config`: a config of the hidden layers and attention heads of a model."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchshear._arguments import check_kind, check_share
from torchshear.calibration._batches import CallForm, read_batches
from torchshear.compat.neural_compressor._callbacks import Example
from torchshear.compat.neural_compressor._manager import as_example
from torchshear.configs._layers import LayerGroups, list_layers
from torchshear.dependency.groups._analyze import analyze
from torchshear.dependency.rules._role_evidence import FAMILIES
from torchshear.errors import ArgumentError
from torchshear.graph.capture._trace import trace

_LENGTH: Final = 16  # words of an example that nobody gave
_SIZE: Final = 64  # pixels of one


def parse_auto_slim_config(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    ffn2_sparsity: float = 0.0,
    mha_sparsity: float = 0.0,
    *,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    **common: Any,
) -> list[dict[str, Any]]:
    """Find the hidden layers of feed-forward networks and the attention heads of a model, as pruners of a config.

    They are found in the graph of the model, whatever its layers are called. The first pruner names the layers that
    read hidden features, whose inputs go with the layers that make them; the second the projections that make heads.

    Args:
        model: the model.
        dataloader: gives batches, see `torchshear.collect`, of which the first is the example.
        ffn2_sparsity: share of the hidden features to remove, in [0, 1); 0 for no such pruner.
        mha_sparsity: share of the heads to remove, likewise.
        args: example positional arguments; a tensor counts as one argument. Without a loader and example arguments: as
            many words as Neural Compressor takes, or an image where the first weight is of a convolution.
        kwargs: example keyword arguments.
        **common: keys that each pruner has as well, as pruning_type="retrain_free".

    Returns:
        The pruners, for `WeightPruningConfig`.

    Raises:
        ArgumentError: a share is none, or both are 0; a loader is given beside example arguments; the model has nothing
            of the kind.
        CaptureError: torch.export cannot capture the model, or not with inputs that nobody gave.
        DataError: the loader gives no batch of the model.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    check_share("ffn2_sparsity", ffn2_sparsity)
    check_share("mha_sparsity", mha_sparsity)
    if not ffn2_sparsity and not mha_sparsity:
        raise ArgumentError("ffn2_sparsity and mha_sparsity are 0; expected one above 0, the share that is to go.")
    given, named = _example(model, dataloader, args, kwargs)
    layers = list_layers(model)
    found = LayerGroups(analyze(trace(model, given, named)), layers)
    pruners = []
    for unit, pattern, family, share in (
        ("in_channel", "channelx1", "ffn", ffn2_sparsity),
        ("heads", "mha", "heads", mha_sparsity),
    ):
        if not share:
            continue
        groups_of = {layer.name: found.of(layer.name, unit) for layer in layers if layer.is_weighted}
        names = [
            name
            for name, groups in groups_of.items()
            if any(group.is_prunable and group.role in FAMILIES[family] for group, _ in groups)
        ]
        if not names:
            raise ArgumentError(f"the model has no {family} that could shrink; torchshear.analyze says what it has.")
        pruners.append({**common, "op_names": names, "pattern": pattern, "target_sparsity": float(share)})
    return pruners


def _example(model: nn.Module, dataloader: Iterable[Any] | None, args: object, kwargs: object) -> Example:
    """Example arguments: the given ones, those of the first batch, or a guess."""
    given = as_example(args, kwargs)
    if given is not None and dataloader is not None:
        raise ArgumentError("dataloader= and args= or kwargs= both give an example; leave one of them away.")
    if given is not None:
        return given
    first = next(iter(model.parameters()), torch.zeros(()))
    if dataloader is not None:
        batch = next(read_batches(dataloader, 1, CallForm(inspect.signature(model.forward)), first.device))
        return batch.args, batch.kwargs
    if first.ndim == 4:
        return (torch.zeros(2, first.shape[1], _SIZE, _SIZE, device=first.device, dtype=first.dtype),), {}
    return (torch.zeros(2, _LENGTH, dtype=torch.int64, device=first.device),), {}
