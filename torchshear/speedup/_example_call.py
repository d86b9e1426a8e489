"""Example inputs of a call, flattened, with what is known about their batch and the length of their sequences."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError
from torchshear.speedup._traced import signature_of

_LEAST_LENGTH = 3  # shorter sequences are left as they are: a length of 1 is a case of its own to most models


@dataclass(frozen=True, slots=True)
class ExampleCall:
    """Example inputs of one call.

    Attributes:
        leaves: the flat arguments.
        spec: their structure.
        signature: signature of the model's forward.
        batched: places of the tensors that have the batch in front.
        sequences: places of those among them that hold a sequence of integers for each sample, as tokens are.
        batch: number of samples, None if there is no batch.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    signature: inspect.Signature
    batched: frozenset[int]
    sequences: frozenset[int]
    batch: int | None

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "ExampleCall":
        """Bind the examples to the parameters of forward, in whose order torch.export wants them."""
        signature = signature_of(model)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(
                f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}."
            ) from error
        order = {name: place for place, name in enumerate(signature.parameters)}
        ordered = dict(sorted(kwargs.items(), key=lambda item: order.get(item[0], len(order))))
        leaves, spec = pytree.tree_flatten((args, ordered))
        sizes = {place: leaf.shape[0] for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim}
        if 0 in sizes.values():
            raise ArgumentError("an example input has an empty first dimension. Pass at least one sample.")
        batch = next(iter(sizes.values()), None)
        batched = frozenset(place for place, size in sizes.items() if size == batch)
        sequences = frozenset(place for place in batched if _is_sequence(leaves[place]))
        return cls(tuple(leaves), spec, signature, batched, sequences, batch)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The examples as torch is called with them: args and kwargs."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    @property
    def places(self) -> range:
        """Places of all leaves."""
        return range(len(self.leaves))

    def tensors(self) -> dict[int, Tensor]:
        """Give place -> tensor, in the order of the inputs of the ONNX file."""
        return {place: leaf for place, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)}

    def resized(self, batch: int | None) -> "ExampleCall":
        """Copy the examples, with batches repeated or cut to `batch` samples.

        Repetition i is rolled by i along the last dimension, so that samples differ and hold values of the examples.
        """
        leaves = list(self.leaves)
        for place, tensor in self.tensors().items():
            if place not in self.batched or batch is None or self.batch is None:
                leaves[place] = tensor.detach().clone()
                continue
            copies = [
                tensor.detach().roll(repetition, -1) if tensor.ndim > 1 else tensor.detach()
                for repetition in range(-(-batch // self.batch))
            ]
            leaves[place] = torch.cat(copies)[:batch].clone()
        return replace(self, leaves=tuple(leaves), batch=batch)

    def shortened(self) -> "ExampleCall":
        """Copy the examples, with all sequences shorter by one."""
        leaves = [leaf[:, :-1].clone() if place in self.sequences else leaf for place, leaf in enumerate(self.leaves)]
        return replace(self, leaves=tuple(leaves))

    def dynamic_shapes(self, lengths: bool) -> dict[str, Any]:
        """Give parameter name -> the structure of its example, with free sizes left to torch.export to find.

        Args:
            lengths: whether the lengths of sequences are to be free beside the batch.
        """
        auto = torch.export.Dim.AUTO
        free = [{0: auto, 1: auto} if lengths and place in self.sequences else {0: auto} for place in self.places]
        marks = [mark if place in self.batched else None for place, mark in zip(self.places, free, strict=True)]
        args, kwargs = pytree.tree_unflatten(marks, self.spec)
        return dict(self.signature.bind(*args, **kwargs).arguments)


def _is_sequence(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and not tensor.is_floating_point() and tensor.shape[1] >= _LEAST_LENGTH
