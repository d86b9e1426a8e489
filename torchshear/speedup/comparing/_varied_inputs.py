"""Inputs that exercise a model: every tensor of the example drawn anew, within what the model takes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchshear.errors import ArgumentError
from torchshear.graph import ExampleInputs, Graph, output_leaves
from torchshear.graph._run import arguments_by_name
from torchshear.graph.capture._check import run_model
from torchshear.graph.model._state import in_mode

_HANDED_ON = frozenset(
    f"aten.{name}"
    for name in (
        "_to_copy",
        "alias",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "flatten",
        "reshape",
        "select",
        "slice",
    )
) | {"aten.to", "aten.transpose", "aten.unsqueeze", "aten.view", "aten.permute", "aten.squeeze"}
_KEPT = 0.7  # share of a mask that is true


def check_examples(example: ExampleInputs) -> None:
    """Refuse inputs on which every model gives the same.

    Raises:
        ArgumentError: a tensor is empty, on the meta device, or holds NaN.
    """
    for number, tensor in enumerate(example.tensors()):
        shape = tuple(tensor.shape)
        if tensor.is_meta:
            raise ArgumentError(
                f"tensor {number} of the example inputs, of shape {shape}, is on the meta device and has no values, "
                f"while the model has: nothing can be compared. Give example inputs with values."
            )
        if 0 in shape:
            raise ArgumentError(
                f"tensor {number} of the example inputs has shape {shape} and so no values: nothing can be compared. "
                f"Give at least one sample."
            )
        if bool(tensor.isnan().any()):
            raise ArgumentError(f"tensor {number} of the example inputs holds NaN; expected numbers.")


def table_sizes(graph: Graph) -> dict[int, int]:
    """For flat inputs that are looked up in tables, the number of rows of the smallest table.

    Args:
        graph: the captured model.

    Returns:
        Place of the input among the flat tensors -> number of rows.
    """
    found: dict[int, int] = {}
    placeholders = [node for node in graph if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)]
    for place, node in enumerate(placeholders):
        sizes = [rows for reader, operand in _readers(node) if (rows := _n_rows(reader, operand))]
        if sizes:
            found[place] = min(sizes)
    return found


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Calls that read a value, also behind calls that hand it on; with the operand that it is there."""
    for user in node.users:
        yield user, node
        if str(user.target).rpartition(".")[0] in _HANDED_ON:
            yield from _readers(user)


def _n_rows(reader: fx.Node, operand: fx.Node) -> int | None:
    """Rows of the table in which a call looks an operand up; None if it does something else."""
    name = str(reader.target).rpartition(".")[0]
    given = arguments_by_name(reader.target, reader.args, reader.kwargs)
    if name in ("aten.embedding", "aten.embedding_bag") and given["indices"] is operand:
        return int(given["weight"].meta["val"].shape[0])
    if name == "aten.index" and operand in given["indices"]:
        return int(given["self"].meta["val"].shape[given["indices"].index(operand)])
    return int(given["num_classes"]) if name == "aten.one_hot" and given["num_classes"] > 0 else None


def varied_inputs(
    example: ExampleInputs, tables: dict[int, int], runs: Callable[[ExampleInputs], bool], seed: int
) -> ExampleInputs:
    """Inputs of the example's shapes with all values drawn anew.

    Floating tensors have the spread of the example, or its two values where it has no more, as masks do. Integers that
    are looked up run over the whole table, zeros and ones are drawn as masks, others within the range of the example.

    Args:
        example: the example inputs.
        tables: see `table_sizes`.
        runs: whether the model takes some inputs; asked where there are others than finite floating tensors.
        seed: seed of the draw.

    Returns:
        The first of these that the model takes: everything drawn; with masks the other way round, so that no row hides
        everything; integers in another order; the example's integers and infinities.
    """
    if all(_is_plain(tensor) for tensor in example.tensors()):
        return random_like(example, seed)
    for draw in (_drawn, _turned, _shuffled, _as_given):
        generator = torch.Generator().manual_seed(seed)
        numbers = iter(range(len(example.tensors())))
        inputs = example.map(lambda t, draw=draw: draw(t, tables.get(next(numbers)), generator))  # noqa: B023
        if runs(inputs):
            return inputs
    return inputs


def gives_numbers(model: nn.Module, inputs: ExampleInputs, example: ExampleInputs) -> bool:
    """Whether a model takes some inputs in eval mode, with NaN in no more of its outputs than on the example.

    Args:
        model: the model.
        inputs: what it is tried on.
        example: inputs that it takes.
    """
    with in_mode(model, "eval"):
        try:
            n_bad = n_outputs_with_nan(output_leaves(run_model(model, inputs)))
        except Exception:  # a forward may raise anything
            return False
        return not n_bad or n_bad <= n_outputs_with_nan(output_leaves(run_model(model, example)))


def n_outputs_with_nan(outputs: list[Any]) -> int:
    """Number of flat outputs that hold a NaN, as attention gives where a mask hides all that it could see."""
    return sum(bool(v.isnan().any()) for v in outputs if isinstance(v, Tensor) and v.is_floating_point())


def random_like(inputs: ExampleInputs, seed: int) -> ExampleInputs:
    """Inputs of the same shapes: finite floating tensors drawn anew with the spread of the examples, others as given.

    Args:
        inputs: the example inputs.
        seed: seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    return inputs.map(lambda tensor: _as_given(tensor, None, generator))


def _is_plain(tensor: Tensor) -> bool:
    """Whether any numbers will do in place of a tensor's: it is floating, and no mask of infinities."""
    return (tensor.is_floating_point() or tensor.is_complex()) and (tensor.is_meta or bool(tensor.isfinite().all()))


def _as_given(tensor: Tensor, rows: int | None, generator: torch.Generator) -> Tensor:
    return _numbers(tensor, generator) if _is_plain(tensor) else tensor.detach().clone()


def _shuffled(tensor: Tensor, rows: int | None, generator: torch.Generator) -> Tensor:
    if tensor.is_meta or _is_plain(tensor):
        return _as_given(tensor, rows, generator)
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.detach().flatten()[order].reshape(tensor.shape)


def _drawn(tensor: Tensor, rows: int | None, generator: torch.Generator) -> Tensor:
    if tensor.is_meta or tensor.is_floating_point() or tensor.is_complex():
        return _numbers(tensor, generator)
    low, high = int(tensor.min()), int(tensor.max())
    if _is_mask(tensor, rows):
        return _mask(tensor, generator)
    low, high = (min(low, 0), rows - 1) if rows else (low, high)
    drawn = torch.randint(low, high + 1, tensor.shape, generator=generator)
    return drawn.to(tensor.device, tensor.dtype)


def _turned(tensor: Tensor, rows: int | None, generator: torch.Generator) -> Tensor:
    """As drawn, but for masks, whose truth values are exchanged: in some models true means hidden."""
    drawn = _drawn(tensor, rows, generator)
    return drawn.logical_not().to(tensor.dtype) if not tensor.is_meta and _is_mask(tensor, rows) else drawn


def _is_mask(tensor: Tensor, rows: int | None) -> bool:
    """Whether integers are truth values: zeros and ones that are looked up in no table."""
    if tensor.is_floating_point() or tensor.is_complex():
        return False
    return tensor.dtype == torch.bool or (rows is None and 0 <= int(tensor.min()) <= int(tensor.max()) <= 1)


def _mask(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Truth values, of which the first along the last dimension is true, so that no row is empty."""
    drawn = torch.rand(tensor.shape, generator=generator) < _KEPT
    if tensor.ndim:
        drawn[..., 0] = True
    return drawn.to(tensor.device, tensor.dtype)


def _numbers(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Floating numbers with the spread of those given, or their two values where they have no more."""
    if tensor.is_meta or not tensor.numel():
        return tensor.detach().clone()
    values = _values(tensor)
    if len(values) == 2:
        return values[(torch.rand(tensor.shape, generator=generator) < _KEPT).long().to(tensor.device)]
    kind = torch.complex128 if tensor.is_complex() else torch.float64
    spread = float(tensor.detach().to(kind).std(correction=0))
    spread = spread if 0 < spread < float("inf") else 1.0
    return (torch.randn(tensor.shape, generator=generator, dtype=kind) * spread).to(tensor.device, tensor.dtype)


def _values(tensor: Tensor) -> Tensor:
    """The two values that a floating tensor consists of; others, or none, where it does not."""
    some = tensor.detach().flatten()
    few = not tensor.is_complex() and some.numel() > 2 and torch.unique(some[:64]).numel() <= 2
    return torch.unique(some) if few else some[:0]
