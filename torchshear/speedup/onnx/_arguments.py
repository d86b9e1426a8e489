"""Arguments of an export: example inputs with their batch and sequences, and checks of limits and tensors."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear._arguments import MOST, check_count, check_kind, is_whole, quote
from torchshear.errors import ArgumentError, ExportError, WeightError
from torchshear.graph.model._checks import signature_of

DynamicShapes = Mapping[str, Any] | Sequence[Any] | None

_AUTO = torch.export.Dim.AUTO
_LEAST_LENGTH = 3  # shorter sequences are left as they are: a length of 1 is a case of its own to most models


@dataclass(frozen=True, slots=True)
class ExampleCall:
    """Example inputs of one call.

    Attributes:
        leaves: flat arguments.
        spec: structure of the arguments.
        signature: signature of the model's forward.
        batched: indices in `leaves` of the tensors with the batch in front.
        sequences: indices of those among them that hold a sequence of integers for each sample, such as tokens.
        batch: number of samples, None if there is no batch.
        requested: index of a tensor -> dimension -> name, of the sizes that the caller wants dynamic.
        note: a remark on its sizes, for messages.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    signature: inspect.Signature
    batched: frozenset[int]
    sequences: frozenset[int]
    batch: int | None
    requested: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def of(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: DynamicShapes = None
    ) -> "ExampleCall":
        """Bind the examples to the parameters of forward, in whose order torch.export takes them."""
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
        sequences = frozenset(
            place
            for place in batched
            if leaves[place].ndim > 1
            and not leaves[place].is_floating_point()
            and leaves[place].shape[1] >= _LEAST_LENGTH
        )
        requested = _requested_sizes(signature.bind(*args, **kwargs).arguments, leaves, dynamic_shapes)
        return cls(tuple(leaves), spec, signature, batched, sequences, batch, requested)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Args and kwargs of the call."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    def tensors(self) -> dict[int, Tensor]:
        """Return index -> tensor, in the order of the inputs of the ONNX file."""
        return {place: leaf for place, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)}

    def with_batch(self, batch: int | None) -> "ExampleCall":
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

    def with_shorter_sequences(self) -> "ExampleCall":
        """Copy the examples, with all sequences shorter by one."""
        leaves = [leaf[:, :-1].clone() if place in self.sequences else leaf for place, leaf in enumerate(self.leaves)]
        return replace(self, leaves=tuple(leaves))

    def with_larger_sizes(self) -> "ExampleCall":
        """Copy the examples, with all sizes that the caller wants dynamic, except the batch, twice as large."""
        leaves = list(self.leaves)
        for place, names in self.requested.items():
            for dim in names:
                if dim or place not in self.batched:
                    leaves[place] = torch.cat([leaves[place], leaves[place].flip(dim)], dim)
        return replace(self, leaves=tuple(leaves), note=" with the sizes of dynamic_shapes doubled")

    def dynamic_shapes(self, batch: bool, lengths: bool) -> dict[str, Any]:
        """Return parameter name -> structure of its example, with `Dim.AUTO` at dynamic sizes.

        Args:
            batch: whether the batch is dynamic, beside the sizes that the caller asked for.
            lengths: whether the lengths of sequences are dynamic as well.
        """
        free: list[dict[int, Any]] = [
            dict.fromkeys(self.requested.get(place, ()), _AUTO) for place in range(len(self.leaves))
        ]
        for place in self.batched if batch else ():
            free[place][0] = _AUTO
        for place in self.sequences if lengths else ():
            free[place][1] = _AUTO
        args, kwargs = pytree.tree_unflatten([mark or None for mark in free], self.spec)
        return dict(self.signature.bind(*args, **kwargs).arguments)


def _requested_sizes(
    given: Mapping[str, Any], leaves: Sequence[Any], dynamic_shapes: DynamicShapes
) -> dict[int, dict[int, str]]:
    """Return index of a tensor -> dimension -> name, from `dynamic_shapes` as torch.export takes it.

    Raises:
        ArgumentError: it has another form, or names no tensor or dimension of the examples.
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


def check_limits(check_batches: Sequence[int], rtol: float, atol: float, opset: int | None) -> None:
    """Refuse batch sizes and opsets below 1 and tolerances that are negative or no number.

    Raises:
        ArgumentError: one of them is.
    """
    if opset is not None:
        check_count("opset", opset)
    check_kind("check_batches", check_batches, Sequence, "sizes of batches, as (1, 3)")
    for batch in check_batches:
        if not is_whole(batch) or not 1 <= batch <= MOST:
            raise ArgumentError(f"check_batches must hold whole numbers of at least 1, but got {quote(batch)}.")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise ArgumentError(f"{name} must be a finite number of at least 0, but got {name}={quote(value)}.")


def check_tensors(model: nn.Module, call: ExampleCall) -> None:
    """Refuse weights without values, and bfloat16: onnxruntime has no CPU kernel for its Conv, Gemm or MatMul.

    Raises:
        WeightError: a weight is on the meta device.
        ArgumentError: an input is.
        ExportError: a weight or an input is in bfloat16, or the model holds a ScriptModule.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise WeightError(f"{name!r} is on the meta device and has no values. Load the weights before the export.")
    if any(tensor.is_meta for tensor in call.tensors().values()):
        raise ArgumentError("an example input is on the meta device and has no values; expected numbers.")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ExportError("the model holds a ScriptModule, which torch.export refuses; give what it was made from.")
    tensors = (*model.parameters(), *model.buffers(), *call.tensors().values())
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise ExportError(
            f"{type(model).__name__} or an input of it is in bfloat16, for which onnxruntime has no CPU kernels. "
            f"Export copy.deepcopy(model).float(), with float32 inputs."
        )
