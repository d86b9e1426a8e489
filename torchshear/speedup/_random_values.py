"""Inputs and weights that exercise a model: random values of the kind that it has, and images of few pixels.

Weights that a model has may hide a difference.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from torchshear.errors import ArgumentError
from torchshear.graph import ExampleInputs, Graph
from torchshear.graph._operator_record import operator_of
from torchshear.graph._outputs import output_leaves
from torchshear.graph._run import arguments_by_name, run_graph, run_model
from torchshear.graph.model._state import Cache, clear_caches, in_mode
from torchshear.speedup._relative_error import relative_error, tolerance

Variant = Literal["random", "inverted masks", "permuted", "as given"]

_TRUE_SHARE = 0.7  # share of a random mask that is true
_LARGE_IMAGE, _SMALL_IMAGE = 128, 64  # rows and columns
_PERIOD = 65537  # a prime, so that no two rows of a matrix are the same


def check_examples(example: ExampleInputs) -> None:
    """Refuse inputs on which all models give the same.

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
    """Find the inputs that are indices into tables, such as tokens into an embedding.

    Args:
        graph: the captured model.

    Returns:
        Number of the input among the flat tensors -> number of rows of the smallest table that it indexes.
    """
    placeholders = [node for node in graph if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)]
    rows = {place: list(_indexed_rows(node)) for place, node in enumerate(placeholders)}
    return {place: min(sizes) for place, sizes in rows.items() if sizes}


def _indexed_rows(node: fx.Node) -> Iterator[int]:
    """Yield the number of rows of each table that a value indexes, also behind calls that only reshape it."""
    for reader in node.users:
        name = str(reader.target).rpartition(".")[0]
        if operator_of(reader).keeps_values:
            yield from _indexed_rows(reader)
        if name not in ("aten.embedding", "aten.embedding_bag", "aten.index", "aten.one_hot"):
            continue
        given = arguments_by_name(reader.target, reader.args, reader.kwargs)
        if name == "aten.index":
            if node in given["indices"]:
                yield int(given["self"].meta["val"].shape[given["indices"].index(node)])
        elif name == "aten.one_hot":
            if given["num_classes"] > 0:
                yield int(given["num_classes"])
        elif given["indices"] is node:
            yield int(given["weight"].meta["val"].shape[0])


def random_inputs(
    example: ExampleInputs, tables: dict[int, int], takes: Callable[[ExampleInputs], bool], seed: int
) -> ExampleInputs:
    """Return random inputs of the example's shapes that a model takes.

    Floating tensors have the spread of the example; those of two values, as masks, have these values. Indices run over
    their whole table, zeros and ones are random truth values, other integers lie in the range of the example.

    Where there are other tensors than finite floating ones, the first of these that the model takes is returned: all
    values random; masks inverted, since in some models true means hidden and a row that hides everything gives NaN;
    integers and masks of infinities permuted; integers and masks of infinities as given.

    Args:
        example: the example inputs.
        tables: see `table_sizes`.
        takes: tells whether the model takes some inputs.
        seed: seed of the values.
    """
    tensors = example.tensors()
    if all((t.is_floating_point() or t.is_complex()) and (t.is_meta or bool(t.isfinite().all())) for t in tensors):
        return random_like(example, seed)
    variants: tuple[Variant, ...] = ("random", "inverted masks", "permuted", "as given")
    for variant in variants:
        generator = torch.Generator().manual_seed(seed)
        rows = iter([tables.get(place) for place in range(len(tensors))])
        inputs = example.map(lambda t, rows=rows, g=generator, v=variant: _random_tensor(t, next(rows), g, v))
        if takes(inputs):
            break
    return inputs


def random_like(inputs: ExampleInputs, seed: int) -> ExampleInputs:
    """Return inputs with random finite floating tensors, of the spread of the examples, and all others as given.

    Args:
        inputs: the example inputs.
        seed: seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    return inputs.map(lambda tensor: _random_tensor(tensor, None, generator, "as given"))


def _random_tensor(tensor: Tensor, rows: int | None, generator: torch.Generator, variant: Variant) -> Tensor:
    """Return other values of the kind that a tensor holds.

    Args:
        tensor: the example.
        rows: number of rows of the table that it indexes; None if it indexes none.
        generator: source of the values.
        variant: how far other values than finite floating ones change; see `random_inputs`.
    """
    if tensor.is_meta or not tensor.numel():
        return tensor.detach().clone()
    is_number = tensor.is_floating_point() or tensor.is_complex()
    if is_number and (variant in ("random", "inverted masks") or bool(tensor.isfinite().all())):
        flat = tensor.detach().flatten()
        if not tensor.is_complex() and flat.numel() > 2 and torch.unique(flat[:64]).numel() <= 2:
            values: Tensor = torch.unique(flat)
            if len(values) == 2:  # a mask: a random choice of its two values
                return values[(torch.rand(tensor.shape, generator=generator) < _TRUE_SHARE).long().to(tensor.device)]
        # Normal numbers with the spread of the example.
        dtype = torch.complex128 if tensor.is_complex() else torch.float64
        spread = float(flat.to(dtype).std(correction=0))
        spread = spread if 0 < spread < float("inf") else 1.0
        return (torch.randn(tensor.shape, generator=generator, dtype=dtype) * spread).to(tensor.device, tensor.dtype)
    if variant == "as given":
        return tensor.detach().clone()
    if variant == "permuted":
        order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
        return tensor.detach().flatten()[order].reshape(tensor.shape)
    low, high = int(tensor.min()), int(tensor.max())
    if tensor.dtype == torch.bool or (rows is None and 0 <= low <= high <= 1):
        mask = torch.rand(tensor.shape, generator=generator) < _TRUE_SHARE
        if tensor.ndim:
            mask[..., 0] = True  # no row is empty
        return (mask if variant == "random" else ~mask).to(tensor.device, tensor.dtype)
    low, high = (min(low, 0), rows - 1) if rows else (low, high)
    return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor.device, tensor.dtype)


def gives_numbers(model: nn.Module, inputs: ExampleInputs, example: ExampleInputs) -> bool:
    """Check that a model takes some inputs in eval mode, with NaN in no more of its outputs than on the example.

    Args:
        model: the model.
        inputs: inputs to try.
        example: inputs that it takes.
    """
    with in_mode(model, "eval"):
        try:
            n_bad = n_outputs_with_nan(output_leaves(run_model(model, inputs)))
        except Exception:  # a forward may raise anything
            return False
        return not n_bad or n_bad <= n_outputs_with_nan(output_leaves(run_model(model, example)))


def n_outputs_with_nan(outputs: list[Any]) -> int:
    """Count the flat outputs that hold NaN, as attention gives where a mask hides all that it could see."""
    return sum(bool(v.isnan().any()) for v in outputs if isinstance(v, Tensor) and v.is_floating_point())


def smaller_inputs(graph: Graph, model: nn.Module, example: ExampleInputs | None = None) -> ExampleInputs:
    """Return the example with large images cut to few pixels, on which convolutions compute the same in less time.

    The example itself is returned if the graph does not take smaller images, or gives another result for them than the
    model: if sizes of the images are numbers in the graph, as the number of patches is in transformers.

    Args:
        graph: the captured model.
        model: the model; it is run, and left as it was.
        example: the inputs; None for the example that the graph was captured with.
    """

    def crop(tensor: Tensor) -> Tensor:
        is_image = tensor.ndim >= 4 and tensor.is_floating_point() and min(tensor.shape[-2:]) >= _LARGE_IMAGE
        return tensor[..., :_SMALL_IMAGE, :_SMALL_IMAGE].contiguous() if is_image else tensor

    example = graph.inputs if example is None else example
    small = example.map(crop)
    shapes = [[tensor.shape for tensor in inputs.tensors()] for inputs in (example, small)]
    if graph.parts is not None or shapes[0] == shapes[1]:
        return example
    one = small.with_batch(1) if graph.batch_hint is not None else small
    try:
        with in_mode(model, "eval"):
            found = output_leaves(run_graph(graph, one))
            expected = output_leaves(run_model(model, one))
    except Exception:  # the code, or a call in the graph, does not take this size, and may say so in any way
        return example
    return small if relative_error(expected, found) <= tolerance(expected) else example


class SharedWeights:
    """Tensors that a graph and a native form share, with the model's own values or with random ones.

    Attention that is nearly even does not show that its heads have a wrong size, and a layer that is all zeros shows
    nothing of the layers before it; after some training both would. Sharing them saves a copy.

    Attributes:
        tensors: canonical name -> tensor in the dtype to compute in; parameters are `nn.Parameter`s.

    Args:
        own: canonical name -> tensor of the model.
        dtype: dtype to compute in.
        random: names of the tensors that may get random values: floating parameters of at least one dimension.
        caches: attributes in which a model keeps values computed from its weights.
    """

    def __init__(
        self, own: Mapping[str, Tensor], dtype: torch.dtype, random: Sequence[str], caches: Sequence[Cache]
    ) -> None:
        self._own = own
        self._random = random
        self._caches = caches
        self._seed: int | None = None
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in own.items():
            value = tensor.detach().to(dtype, copy=True) if tensor.is_floating_point() else tensor.detach()
            is_parameter = isinstance(tensor, nn.Parameter)
            self.tensors[name] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value

    def set_values(self, seed: int | None, model: nn.Module | None = None) -> None:
        """Give the tensors the random values of a seed, or the model's own.

        Args:
            seed: seed of the values; None for the model's own.
            model: the model that computes with them next; its caches are cleared.
        """
        if seed != self._seed:
            with torch.no_grad():
                generator = torch.Generator()
                for name in self._random if seed is None else ():
                    self.tensors[name].copy_(self._own[name])
                if seed is not None:
                    generator.manual_seed(seed)
                    for name in self._random:
                        fill_randomly(self.tensors[name], self._own[name], generator)
            self._seed = seed
        if model is not None and self._caches:
            clear_caches(model, self._caches)


def fill_randomly(tensor: Tensor, own: Tensor, generator: torch.Generator) -> None:
    """Write random weights into a tensor, with which every layer has an effect on the output.

    Matrices get normal numbers of variance 2 / fan-in, which keeps the size of activations; vectors change a little. In
    a large tensor the random numbers repeat, since drawing them takes long.

    Args:
        tensor: a parameter; written to.
        own: its values in the model, of the same shape.
        generator: source of the numbers.
    """
    size = own.numel()
    if not size:
        return
    if size <= _PERIOD:
        noise = torch.randn(own.shape, generator=generator)
    else:
        period, n_whole = torch.randn(_PERIOD, generator=generator), size // _PERIOD
        flat = torch.empty(size)
        flat[: n_whole * _PERIOD].view(n_whole, _PERIOD).copy_(period)
        flat[n_whole * _PERIOD :] = period[: size % _PERIOD]
        noise = flat.view(own.shape)
    if own.ndim > 1:
        tensor.copy_(noise.mul_(sqrt(2 / max(1, own[0].numel()))))
    else:
        tensor.copy_(own).add_(noise.mul_(0.1).to(own.device))
