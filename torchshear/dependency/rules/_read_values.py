"""Values of buffers and constants that an analysis read: a plan is good only for a model that has the same."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from torchshear.graph import Graph


def digest_of(tensor: Tensor) -> str:
    """Return the SHA-256 of the shape and the values of a tensor; integers of any type count alike."""
    values = tensor.detach().cpu()
    if not (values.is_floating_point() or values.is_complex()):
        values = values.to(torch.int64)
    digest = hashlib.sha256(f"{tuple(values.shape)}|{values.dtype}|".encode())
    digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def label_of(graph: Graph, name: str) -> str:
    """Return the name of a buffer or constant in a plan; constants of the graph for train mode have a prefix."""
    return f"train:{name}" if graph.mode == "train" and graph.state[name].kind == "constant" else name


def readable_values(graph: Graph, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Collect the tensors that an analysis of a graph can read, by their names in a plan.

    Args:
        graph: the captured model.
        own: canonical name -> tensor that the model has now, for its buffers.
    """
    return {
        label_of(one, name): entry.tensor if entry.kind == "constant" else own.get(name, entry.tensor)
        for one in (graph, graph.training)
        if one is not None
        for name, entry in one.state.items()
        if entry.kind != "parameter"
    }


def differing_value(read: Mapping[str, str], found: Mapping[str, Tensor]) -> str | None:
    """Describe how a value differs from the one that an analysis read, starting with its name; None if none does.

    Args:
        read: label -> digest of what the analysis read.
        found: label -> tensor.
    """
    for label, digest in read.items():
        tensor = found.get(label)
        if tensor is None:
            return f"{label!r} is missing"
        if tensor.is_meta:
            return f"{label!r} is on the meta device, without values"
        if digest_of(tensor) != digest:
            return f"{label!r} holds other values"
    return None
