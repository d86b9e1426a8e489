"""Example inputs of a call, flattened, with what is known about their batch and the length of their sequences."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError
from torchshear.graph import signature_of

DynamicShapes = Mapping[str, Any] | Sequence[Any] | None

_AUTO = torch.export.Dim.AUTO
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
        asked: place of a tensor -> dimension -> name, of the sizes that the caller wants free.
        note: what is to be known of its sizes, for messages.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    signature: inspect.Signature
    batched: frozenset[int]
    sequences: frozenset[int]
    batch: int | None
    asked: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def of(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: DynamicShapes = None
    ) -> "ExampleCall":
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
        asked = _asked_sizes(signature.bind(*args, **kwargs).arguments, leaves, dynamic_shapes)
        return cls(tuple(leaves), spec, signature, batched, sequences, batch, asked)

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

    def enlarged(self) -> "ExampleCall":
        """Copy the examples, with all sizes that the caller wants free twice as large; but not the batch."""
        leaves = list(self.leaves)
        for place, names in self.asked.items():
            for dim in names:
                if dim or place not in self.batched:
                    leaves[place] = torch.cat([leaves[place], leaves[place].flip(dim)], dim)
        return replace(self, leaves=tuple(leaves), note=" with the sizes of dynamic_shapes doubled")

    def dynamic_shapes(self, batch: bool, lengths: bool) -> dict[str, Any]:
        """Give parameter name -> the structure of its example, with free sizes left to torch.export to find.

        Args:
            batch: whether the batch is to be free beside what the caller asked for.
            lengths: whether the lengths of sequences are to be free, too.
        """
        free: list[dict[int, Any]] = [dict.fromkeys(self.asked.get(place, ()), _AUTO) for place in self.places]
        for place in self.batched if batch else ():
            free[place][0] = _AUTO
        for place in self.sequences if lengths else ():
            free[place][1] = _AUTO
        args, kwargs = pytree.tree_unflatten([mark or None for mark in free], self.spec)
        return dict(self.signature.bind(*args, **kwargs).arguments)


def _asked_sizes(
    given: Mapping[str, Any], leaves: Sequence[Any], dynamic_shapes: DynamicShapes
) -> dict[int, dict[int, str]]:
    """Place of a tensor -> dimension -> name, as a caller of torch.export writes them.

    Raises:
        ArgumentError: they are not of this form, or name no tensor or dimension of the examples.
    """
    if dynamic_shapes is None:
        return {}
    wanted = f"a mapping from parameters of forward ({', '.join(given)}) to dimensions, as {{'x': {{2: 'height'}}}}"
    if isinstance(dynamic_shapes, tuple | list):
        dynamic_shapes = dict(zip(given, dynamic_shapes, strict=False))
    if not isinstance(dynamic_shapes, Mapping):
        raise ArgumentError(f"dynamic_shapes is {type(dynamic_shapes).__name__}; expected {wanted}.")
    found: dict[int, dict[int, str]] = {}
    for name, dims in dynamic_shapes.items():
        if dims is None:
            continue
        tensor = given.get(name)
        place = next((place for place, leaf in enumerate(leaves) if leaf is tensor), None)
        if not isinstance(tensor, Tensor) or place is None or not isinstance(dims, Mapping):
            raise ArgumentError(f"dynamic_shapes: {name!r}: {dims!r}; expected {wanted}, of inputs that are tensors.")
        for dim, size in dims.items():
            if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < tensor.ndim:
                raise ArgumentError(
                    f"dynamic_shapes: {name!r} has no dimension {dim!r}; its example has shape {tuple(tensor.shape)}."
                )
            label = size if isinstance(size, str) else getattr(size, "__name__", f"{name}_{dim}")
            if not label.isidentifier():
                raise ArgumentError(f"dynamic_shapes: {label!r} is no name of a size; expected one as 'height'.")
            found.setdefault(place, {})[dim] = label
    return found


def _is_sequence(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and not tensor.is_floating_point() and tensor.shape[1] >= _LEAST_LENGTH
