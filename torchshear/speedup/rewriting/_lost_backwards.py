"""Autograd functions whose backward a graph does not hold: without it a traced form must not be trained in silence."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchshear.errors import CaptureError
from torchshear.graph import Graph
from torchshear.graph._function_call import FunctionCall


def explain_lost_backwards(graph: Graph) -> str:
    """Say why gradients through a graph are not those of the model, and what to do; "" where they are."""
    calls = list(dict.fromkeys(map(str, graph.lost_backwards)))
    if not calls:
        return ""
    more = f" and {len(calls) - 1} more" if len(calls) > 1 else ""
    is_unsure = any(entry.tensor.is_meta for entry in graph.state.values())
    unsure = ", or may not give on the meta device, where nothing was compared" if is_unsure else ""
    return (
        f"a captured graph does not hold the backward of {calls[0]}{more}, which the operators in its forward do not "
        f"give{unsure}, so that it would be trained with wrong gradients. To train the pruned model have it in native "
        f"form: keep whole what the reason for the traced form names, by exclude=[...], or prune other modules only, "
        f"by submodules=[...]."
    )


def explain_untrainable(calls: Iterable[FunctionCall]) -> str:
    """Return a clause for the reason of a traced form, which says that it cannot be trained; "" for no functions."""
    names = ", ".join(dict.fromkeys(map(str, calls)))
    return f"; it cannot be trained, since a graph does not hold the backward of {names}" if names else ""


def check_backwards(graph: Graph) -> None:
    """Raise CaptureError if gradients through a graph are not those of the model."""
    problem = explain_lost_backwards(graph)
    if problem:
        raise CaptureError(problem)


class WithoutGradients(torch.autograd.Function):
    """Identity that refuses to give its gradient.

    It is a function, not a hook, so that a capture of the model holds it and refuses gradients as well.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, problem: str) -> Tensor:
        """Copy the value, which may be written to."""
        ctx.problem = problem
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        """Raise CaptureError."""
        raise CaptureError(f"no gradients can be taken of this model: {ctx.problem}")


def without_gradients(outputs: Any, problem: str) -> Any:
    """Return outputs of the same values, of which no gradient can be taken: that raises CaptureError."""
    return pytree.tree_map_only(
        Tensor,
        lambda value: WithoutGradients.apply(value, problem) if value.requires_grad else value,  # type: ignore[no-untyped-call]
        outputs,
    )
