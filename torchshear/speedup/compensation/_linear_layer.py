"""Linear layers of a graph as systems of rows: y = W u + b at every sample and position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.nn import functional

from torchshear.calibration._samples import batch_dimension, sample_numbers
from torchshear.dependency.rules._call import bind_arguments
from torchshear.dependency.rules._weights import weight_behind
from torchshear.graph._nodes import is_from_state, shape_of, tensor_operands
from torchshear.graph._operator_record import operator_name, operator_of
from torchshear.speedup.compensation._einsum_form import EinsumForm
from torchshear.speedup.compensation._stored_parts import StoredPart, StoredParts, is_einsum

MAX_UNKNOWNS: Final = 4608
"""The largest system that is solved, in unknowns for each output."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearLayer:
    """A call that multiplies values with a weight of the model.

    Attributes:
        node: name of the call.
        operand: name of the node that it reads.
        weight: its weight.
        bias: its bias, or None.
        order: dimensions of a whole weight in the order in which the call reads them.
        kind: "dense"; "batched", one weight for each entry of dimension 0; "single", a batch of one weight;
            "convolution" or "transposed"; "einsum".
        is_rows_first: the weight has outputs before inputs, as that of `linear`.
        n_dims: spatial dimensions of a convolution.
        batch_dim: the dimension of what it reads that holds the batch.
        given: arguments of the call in the smaller network, by name.
        einsum: dimensions of an einsum by what they are for.
    """

    node: str
    operand: str
    weight: StoredPart
    bias: StoredPart | None
    order: tuple[int, ...]
    kind: str
    is_rows_first: bool
    n_dims: int
    batch_dim: int
    given: Mapping[str, Any]
    einsum: EinsumForm | None = None

    @property
    def n_groups(self) -> int:
        """Number of systems that share nothing: groups of a convolution, or 1."""
        return int(self.given.get("groups", 1))

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as W of shape (G, O, K)."""
        weight = weight.permute(self.order)
        if self.einsum is not None:
            return self.einsum.to_matrix(weight)
        if self.kind in ("batched", "single"):  # (E, in, out)
            return weight.mT
        if self.kind == "dense":
            return (weight if self.is_rows_first else weight.mT).unsqueeze(0)
        if self.kind == "transposed":  # (in, out / G, taps) -> a convolution with the taps reversed
            taps = weight.shape[2:]
            weight = weight.reshape(self.n_groups, -1, *weight.shape[1:]).transpose(1, 2)
            weight = weight.flip(tuple(range(3, 3 + len(taps))))
            return weight.flatten(2)
        return weight.reshape(self.n_groups, weight.shape[0] // self.n_groups, -1)

    def to_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return a matrix of shape (G, O, K) as a weight of the model's shape and type."""
        shape = [like.shape[dim] for dim in self.order]
        if self.einsum is not None:
            value = self.einsum.to_weight(matrix, shape)
        elif self.kind in ("batched", "single"):
            value = matrix.mT
        elif self.kind == "dense":
            value = matrix[0] if self.is_rows_first else matrix[0].mT
        elif self.kind == "transposed":
            value = matrix.reshape(self.n_groups, shape[1], shape[0] // self.n_groups, *shape[2:])
            value = value.flip(tuple(range(3, 3 + self.n_dims))).transpose(1, 2).reshape(shape)
        else:
            value = matrix.reshape(shape)
        inverse = [self.order.index(dim) for dim in range(len(self.order))]
        return value.permute(inverse).to(like)

    def rows(
        self,
        operand: Tensor,
        output: Tensor,
        taps: Sequence[int],
        n_rows: int,
        generator: torch.Generator,
        n_samples: int,
    ) -> "Rows":
        """Draw positions, and return the inputs and the wanted outputs of the layer there.

        Args:
            operand: value that the layer reads.
            output: value that it is to give.
            taps: sizes of a convolution's kernel.
            n_rows: how many positions to draw at most, of all samples together.
            generator: draws them.
            n_samples: number of samples in the batch.
        """
        if self.einsum is not None:
            inputs, outputs = self.einsum.rows(operand, output)
            chosen = draw_positions(inputs.shape[1], n_rows, generator)
            samples = sample_numbers(operand.shape[self.batch_dim], n_samples)
            places = self.einsum.numbers_along(self.batch_dim, operand.shape)[chosen]
            return Rows(inputs[:, chosen], outputs[:, chosen], samples[places])
        if self.kind == "batched":
            chosen = draw_positions(operand.shape[1], n_rows, generator)
            return Rows(operand[:, chosen], output[:, chosen], sample_numbers(operand.shape[1], n_samples)[chosen])
        if self.kind in ("dense", "single"):
            leading = operand.shape[:-1]
            inputs, outputs = operand.reshape(-1, operand.shape[-1]), output.reshape(-1, output.shape[-1])
            chosen = samples = draw_positions(len(inputs), n_rows, generator)
            if leading:
                dim = min(self.batch_dim, len(leading) - 1)
                samples = sample_numbers(leading[dim], n_samples)[torch.unravel_index(chosen, leading)[dim]]
            return Rows(inputs[chosen].unsqueeze(0), outputs[chosen].unsqueeze(0), samples)
        if operand.ndim == self.n_dims + 1:  # one sample without a batch
            operand, output = operand.unsqueeze(0), output.unsqueeze(0)
        rows = self._patches(operand, output, list(taps), n_rows, generator)
        return replace(rows, samples=sample_numbers(len(operand), n_samples)[rows.samples])

    def _patches(
        self, operand: Tensor, output: Tensor, taps: list[int], n_rows: int, generator: torch.Generator
    ) -> "Rows":
        """Gather the patches of a convolution under some positions of its output."""
        n, groups, sizes = self.n_dims, self.n_groups, output.shape[2:]
        stride, dilation = _spread(self.given["stride"], n), _spread(self.given["dilation"], n)
        reach = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
        if self.given["padding"] == "same":
            before = [whole // 2 for whole in reach]
        else:
            before = _spread(0 if self.given["padding"] == "valid" else self.given["padding"], n)
        if self.kind == "transposed":  # a convolution over the values spread apart
            spread = [(size - 1) * step + 1 for size, step in zip(operand.shape[2:], stride, strict=True)]
            apart = operand.new_zeros(*operand.shape[:2], *spread)
            every: tuple[slice, ...] = tuple(slice(None, None, step) for step in stride)
            apart[(slice(None), slice(None), *every)] = operand
            operand, stride = apart, [1] * n
            before = [whole - low for whole, low in zip(reach, before, strict=True)]
        last = [(size - 1) * step + whole + 1 for size, step, whole in zip(sizes, stride, reach, strict=True)]
        after = [end - own - low for end, own, low in zip(last, operand.shape[2:], before, strict=True)]
        pads = [side for low, high in zip(reversed(before), reversed(after), strict=True) for side in (low, high)]
        padded = functional.pad(operand, pads).movedim(1, -1)
        positions = sizes.numel()
        chosen = draw_positions(output.shape[0] * positions, n_rows, generator)
        sample, place = chosen // positions, chosen % positions
        starts = torch.unravel_index(place, sizes)
        index: list[Tensor] = [sample.reshape(-1, *[1] * n)]
        for dim in range(n):
            offsets = torch.arange(taps[dim]) * dilation[dim]
            line = [1] * n
            line[dim] = -1
            index.append((starts[dim] * stride[dim]).reshape(-1, *[1] * n) + offsets.reshape(1, *line))
        found = padded[tuple(one.to(padded.device) for one in index)]  # (rows, *taps, channels)
        found = found.movedim(-1, 1).reshape(len(chosen), groups, -1)
        wanted = output.movedim(1, -1).reshape(-1, output.shape[1])[chosen].reshape(len(chosen), groups, -1)
        return Rows(found.transpose(0, 1), wanted.transpose(0, 1), sample)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a layer's system.

    Attributes:
        inputs: u, shape (G, rows, K).
        outputs: y, shape (G, rows, O).
        samples: number of the sample of each row within its batch, shape (rows,).
    """

    inputs: Tensor
    outputs: Tensor
    samples: Tensor


def linear_layer(
    node: fx.Node,
    smaller: fx.Node,
    carriers: Mapping[str, fx.Node],
    parts: StoredParts,
    batch_hint: int | None,
) -> LinearLayer | str:
    """Return the linear layer that a call is, "" for another call, or the reason why a layer cannot be refitted.

    Args:
        node: the call in the captured graph.
        smaller: the same call in the smaller network.
        carriers: name of a node that computes a weight -> the tensor of the model that it stands for.
        parts: the tensors that calls of the network read.
        batch_hint: the free batch of the capture; None if it is fixed.
    """
    if is_einsum(node):
        return _einsum_layer(node, smaller, carriers, parts, batch_hint)
    product = operator_of(node).product
    if product is None or not operator_name(node).startswith("aten."):
        return _reason_for_no_layer(node)
    given = bind_arguments(node)
    operand, factor = given.get(product.left), given.get(product.right)
    bias = given.get(product.bias) if product.bias else None
    if not isinstance(operand, fx.Node) or not isinstance(factor, fx.Node) or weight_behind(operand, carriers):
        return _reason_for_no_layer(node)
    weight = parts.behind(factor)
    if weight is None:
        if weight_behind(factor, {}) is not None:
            return "its weight is read in another shape"
        return "its weight is computed of parameters" if is_from_state(factor) else ""
    shape = shape_of(factor)
    summed = product.contracted[1] % len(shape)
    kind = "dense"
    if "stride" in given:
        kind = "convolution" if summed == 1 else "transposed"
    elif len(shape) == 3 and operand.meta["val"].ndim == 3:
        kind = "single" if shape[0] == 1 else "batched"
    elif len(shape) != 2:
        return "its weight is multiplied in another form than that of a matrix"
    problem = weight.problem or _find_obstacle(node, (operand, factor, bias), kind, parts)
    return problem or LinearLayer(
        node=node.name,
        operand=operand.name,
        weight=weight,
        bias=parts.behind(bias) if isinstance(bias, fx.Node) else None,
        order=_order_of(factor, weight),
        kind=kind,
        is_rows_first=summed == 1,
        n_dims=len(shape) - 2 if "stride" in given else 0,
        batch_dim=batch_dimension(operand, batch_hint) or 0,
        given=bind_arguments(smaller),
    )


def _einsum_layer(
    node: fx.Node, smaller: fx.Node, carriers: Mapping[str, fx.Node], parts: StoredParts, batch_hint: int | None
) -> LinearLayer | str:
    """Return the linear layer that an einsum of a value and a weight is; see `linear_layer`."""
    operands = tensor_operands(node)
    held = [weight_behind(operand, carriers) is not None or is_from_state(operand) for operand in operands]
    if all(held) or not any(held):
        return ""
    reason = "aten.einsum is not refitted in this form"
    if len(operands) != 2:
        return reason
    place = held.index(True)
    operand, factor = operands[1 - place], operands[place]
    weight = parts.behind(factor)
    if weight is None:
        return "its weight is computed of parameters"
    given, shapes = bind_arguments(node), (shape_of(operands[0]), shape_of(operands[1]))
    form = EinsumForm.of(given["equation"], shapes, place)
    batch_dim = batch_dimension(operand, batch_hint) or 0
    if form is None or batch_dim not in form.operand[1] or weight.problem:
        return weight.problem or reason
    if not factor.meta["val"].is_floating_point():
        return "its weight is not of real numbers"
    return LinearLayer(
        node=node.name,
        operand=operand.name,
        weight=weight,
        bias=None,
        order=_order_of(factor, weight),
        kind="einsum",
        is_rows_first=False,
        n_dims=0,
        batch_dim=batch_dim,
        given=bind_arguments(smaller),
        einsum=form,
    )


def _order_of(factor: fx.Node, weight: StoredPart) -> tuple[int, ...]:
    """Return the dimensions of a weight in the order in which an operand has them; a part has them in its own."""
    behind = weight_behind(factor, {}) if weight.is_whole else None
    places = behind[1] if behind is not None else range(len(shape_of(factor)))
    return tuple(place for place in places if place is not None)


def _reason_for_no_layer(node: fx.Node) -> str:
    """Return the reason why a call that multiplies with tensors of the model is not refitted; "" for any other call."""
    known, name = operator_of(node), ".".join(operator_name(node).split(".")[:2])
    operands = tensor_operands(node)
    is_product = known.product is not None or name in ("aten.einsum", "aten.bilinear")
    if is_product and any(map(is_from_state, operands)) and not all(map(is_from_state, operands)):
        return f"{name} is not refitted in this form"
    return ""


def _find_obstacle(node: fx.Node, known: tuple[Any, ...], kind: str, parts: StoredParts) -> str:
    """Say why a layer cannot be refitted; "" if it can.

    Args:
        node: the call.
        known: its input, weight and bias.
        kind: see `LinearLayer`.
        parts: the tensors that calls of the network read.
    """
    given, (_, weight, bias) = bind_arguments(node), known
    if not weight.meta["val"].is_floating_point():
        return "its weight is not of real numbers"
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        return "its result is multiplied by a number"
    if any(operand not in known for operand in node.all_input_nodes):
        return "it reads more than an input, a weight and a bias"
    if isinstance(bias, fx.Node):
        own = parts.behind(bias)
        if own is None or own.problem or bias.meta["val"].ndim != 1 or kind in ("batched", "single"):
            return "its bias is computed, or not one number for each output"
        counts = [parts.n_reads(part) for part in (parts.behind(weight), own) if part is not None]
        if counts[0] != counts[1]:
            return f"its weight is read by {counts[0]} calls, and its bias by {counts[1]}"
    return ""


def draw_positions(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw positions without repetition, in order; all of them if there are no more."""
    if total <= count:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[:count].sort().values


def _spread(value: int | Sequence[int], n: int) -> list[int]:
    """Return one number for each spatial dimension."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * n if len(numbers) == 1 else numbers
