"""The outputs that a model is held to: tensors and plain values, in containers that torch can take apart.

What else a model returns, such as the cache of keys and values that a language model keeps for the next token, is an
object of its own that torch.export does not know. It is left out of the capture, so that the tensors which it holds
may shrink; the model itself goes on returning it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear.graph._output_names import output_names

_PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.SymInt)


def output_leaves(output: Any) -> list[Any]:
    """The flat outputs of a model, in which objects that are neither tensors nor plain values count as None."""
    return flat_output(output)[0]


def flat_output(output: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """As `output_leaves`, with the structure that they are taken from."""
    leaves, spec = pytree.tree_flatten(_plain(output))
    return list(leaves), spec


def register_dataclasses(value: Any) -> None:
    """Let torch take apart the dataclasses that a value holds, as it does tuples and dicts; torch asks for it once."""
    for leaf in pytree.tree_leaves(value):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            register_dataclasses(leaf)


def _plain(output: Any) -> Any:
    register_dataclasses(output)
    return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, _PLAIN) else None, output)


def left_out(output: Any) -> tuple[str, ...]:
    """Types of the objects in an output that `output_leaves` leaves out, with their places."""
    leaves, spec = pytree.tree_flatten(output)  # classes may be registered without names of their parts
    names = [""] if spec.is_leaf() else output_names(spec)
    return tuple(
        f"{name or 'output'} ({type(leaf).__name__})"
        for name, leaf in zip(names, leaves, strict=True)
        if leaf is not None and not isinstance(leaf, _PLAIN)
    )


@contextmanager
def drop_opaque_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Have the model return None in place of objects that torch.export does not know, for a while.

    Gives a list that a call of the model fills with what was left out.
    """
    dropped: list[str] = []

    def plain(_: nn.Module, __: Any, output: Any) -> Any:
        register_dataclasses(output)
        dropped[:] = left_out(output)
        plain_output = _plain(output)
        return () if plain_output is None else plain_output  # None would mean: as it was

    handle = model.register_forward_hook(plain)
    try:
        yield dropped
    finally:
        handle.remove()
