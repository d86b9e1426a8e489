"""Identity of a search: what a storage must have been made with to be taken up again."""

import hashlib
from typing import Any

import torch
from torch import nn

from torchshear.searching._candidate import CandidateMaker
from torchshear.searching._early_stopping import name_of_early
from torchshear.searching._request import SearchRequest, find_method
from torchshear.searching._reused_activations import feed_tensor

_FORMAT = 1


def identity_of(request: SearchRequest, maker: CandidateMaker) -> dict[str, Any]:
    """Return all that the sequence of a search and its scores depend on, as far as it can be told, as plain data.

    What the user's functions do cannot be told, nor what the data is; how many trials there may be does not count.
    """
    space = maker.space
    criterion = space.ranked.selector.request.criterion
    allowed = hashlib.sha256(repr(space.allowed).encode()).hexdigest()[:16]
    return {
        "format": _FORMAT,
        "model": space.budget.groups.graph.fingerprint,
        "weights": weights_digest(maker.model),
        "groups": hashlib.sha256(repr(space.names).encode()).hexdigest()[:16],
        "allowed widths": allowed,
        "budget": {str(limit.resource): limit.share for limit in space.budget.limits},
        "method": repr(find_method(request.method)),
        "seed": int(request.seed),
        "criterion": criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom"),
        "compensate": request.compensate,
        "finetune": request.finetune is not None,
        "stop_early": name_of_early(request.stop_early),
        "reuse_activations": request.reuse_activations,
        "form": request.form,
    }


def weights_digest(model: nn.Module) -> str:
    """Return a hash of all parameters and buffers of a model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor) and not value.is_meta:
            digest.update(name.encode())
            feed_tensor(digest, value)
    return digest.hexdigest()[:32]
