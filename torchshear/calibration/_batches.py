"""Batches of a loader as calls of a model: the one reader of data, for statistics, recalibration and verification."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchshear._arguments import check_count
from torchshear.errors import ArgumentError, DataError
from torchshear.graph import ExampleInputs, Graph

DEFAULT_BATCHES: Final = 32
FORMS = (
    "expected a tensor; a tuple of the positional arguments with or without a target behind them; a pair (inputs, "
    "target) whose inputs are a tensor, a tuple of the positional arguments or a dictionary; or a dictionary by names "
    "of the parameters of forward, whose other keys are for the loss"
)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One batch of a loader, as a call of the model.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        target: what the loss is given beside the output: the target of a batch, or the batch itself if it has none.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any


@dataclass(frozen=True, slots=True, eq=False)
class CallForm:
    """Form of the calls of a model, by which batches are taken apart.

    Attributes:
        signature: signature of the model's forward.
        example: a call with the arguments that batches are to hold, in the same places. None: any call that forward
            takes, in which a tuple holds the required positional arguments.

    Raises:
        ArgumentError: forward does not take the arguments of the example.
    """

    signature: inspect.Signature
    example: ExampleInputs | None = None
    _bound: inspect.BoundArguments | None = field(init=False)

    def __post_init__(self) -> None:
        """Bind the example to the parameters of forward."""
        example = self.example
        try:
            bound = None if example is None else self.signature.bind(*example.args, **example.kwargs)
        except TypeError as error:
            raise ArgumentError(f"the example inputs do not fit forward{self.signature}: {error}.") from error
        object.__setattr__(self, "_bound", bound)

    @property
    def n_positional(self) -> int:
        """Number of positional arguments in a batch that is a tuple."""
        if self._bound is not None:
            return len(self._bound.args)
        required = [parameter for parameter in self.signature.parameters.values() if _is_required(parameter)]
        return max(1, sum(parameter.kind is not inspect.Parameter.KEYWORD_ONLY for parameter in required))

    def first_is(self, kind: type | tuple[type, ...]) -> bool:
        """Return whether the first positional argument of the example is of a type."""
        return self._bound is not None and len(self._bound.args) > 0 and isinstance(self._bound.args[0], kind)

    def by_name(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the items of a dictionary that are arguments.

        Raises:
            KeyError: one is missing, or there is none; holds the names.
        """
        parameters = self.signature.parameters.values()
        if self._bound is not None:
            wanted = {**self._bound.arguments, **self._bound.kwargs}
            variadic = {p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
            names = [name for name in wanted if name not in variadic]
            missing = [name for name in names if name not in batch]
        else:
            takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
            names = [name for name in batch if takes_any or name in self.signature.parameters]
            missing = [p.name for p in parameters if _is_required(p) and p.name not in batch]
        if missing or not names:
            raise KeyError(", ".join(missing) or "all arguments of forward")
        return {name: batch[name] for name in names}

    def arrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments in the places of the example's, where they are the same parameters.

        Raises:
            TypeError: forward does not take them.
        """
        bound = self.signature.bind(*args, **kwargs)
        if self._bound is None or self.example is None or bound.arguments.keys() != self._bound.arguments.keys():
            return args, kwargs
        n_args = len(self.example.args)
        names = list(self.signature.parameters)[n_args : len(bound.args)]
        by_name = dict(zip(names, bound.args[n_args:], strict=False)) | bound.kwargs
        if by_name.keys() != self.example.kwargs.keys():
            return args, kwargs
        return bound.args[:n_args], {name: by_name[name] for name in self.example.kwargs}


def read_batches(
    loader: Iterable[Any], count: int | None, form: CallForm, device: torch.device, most: int = DEFAULT_BATCHES
) -> Iterator[Batch]:
    """Yield the first batches of a loader as calls, on a device.

    Floating numbers are given in the type of the example's, if these have one type.

    Args:
        loader: gives batches; an endless one is stopped.
        count: how many to take; None: all, but no more than `most`.
        form: the form of the calls.
        device: the device of the model.
        most: how many to take where none are asked for.

    Raises:
        DataError: the loader is empty or gives fewer batches, or is nothing that gives any; or a batch has none of the
            forms, or holds tensors without values.
    """
    examples = form.example.tensors() if form.example is not None else []
    types = {tensor.dtype for tensor in examples if tensor.is_floating_point()}
    dtype = types.pop() if len(types) == 1 else None

    def move(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        moved = tensor.to(device, dtype if tensor.is_floating_point() else None)
        return moved.clone() if moved.is_inference() else moved  # no gradient can be taken through the latter

    for number, given in enumerate(_first(loader, count, most)):
        try:
            leaves = pytree.tree_leaves(given)
        except RecursionError as error:
            raise DataError(f"batch {number} holds itself, or is nested too deeply to be taken apart.") from error
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
            raise DataError(f"batch {number} holds a tensor on the meta device; expected numbers.")
        batch = _split(given, form, number)
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: move(tensor, dtype), (batch.args, batch.kwargs))
        yield Batch(args, kwargs, pytree.tree_map_only(Tensor, move, batch.target))


def read_graph_inputs(loader: Iterable[Any], count: int | None, graph: Graph) -> Iterator[tuple[list[Any], Any]]:
    """Yield the first batches of a loader as flat inputs of a graph, each with its target.

    Args:
        loader: gives batches.
        count: how many to take; None: all, but no more than `DEFAULT_BATCHES`.
        graph: the captured model.

    Raises:
        DataError: as for `read_batches`; or a batch does not have the structure, sizes and types of the capture, or
            holds NaN.
    """
    device = next((t.device for t in graph.inputs.tensors()), torch.device("cpu"))
    form = CallForm(graph.signature, graph.inputs)
    for number, batch in enumerate(read_batches(loader, count, form, device)):
        leaves, spec = pytree.tree_flatten((batch.args, batch.kwargs))
        examples = pytree.tree_leaves((graph.inputs.args, graph.inputs.kwargs))
        if spec != graph.in_spec:
            raise DataError(
                f"batch {number} is {describe(batch.args, batch.kwargs)}; the model was captured with "
                f"{describe(graph.inputs.args, graph.inputs.kwargs)}."
            )
        for leaf, example in zip(leaves, examples, strict=True):
            if isinstance(example, Tensor):
                _check_tensor(leaf, example, graph, number)
        yield [_cast_like(example, leaf) for leaf, example in zip(leaves, examples, strict=True)], batch.target


def check_batches(count: object) -> None:
    """Raise ArgumentError for a number of batches that is neither None nor a positive whole number."""
    if count is not None:
        check_count("batches", count)


def number_of_batches(loader: Iterable[Any], count: int | None) -> int:
    """Return how many batches will be run, as far as the loader's length tells: for progress."""
    if count is not None:
        return count
    try:
        return min(len(loader), DEFAULT_BATCHES)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return DEFAULT_BATCHES


def describe(*values: Any) -> str:
    """Return structure, shapes and dtypes of nested values, in short."""
    if len(values) == 2 and isinstance(values[0], tuple) and isinstance(values[1], dict):
        values = (*values[0], values[1]) if values[1] else values[0]
    return ", ".join(_describe_one(value) for value in values) or "nothing"


def _describe_one(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_describe_one(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(_describe_one(item) for item in value)})"
    return type(value).__name__


def _first(loader: Iterable[Any], count: int | None, most: int) -> Iterator[Any]:
    """Yield as many batches as are asked for, or raise DataError."""
    done = 0
    try:
        given = islice(loader, most if count is None else count)
    except (TypeError, NotImplementedError) as error:
        raise DataError(f"the loader is {type(loader).__name__}; expected something that gives batches.") from error
    for batch in given:
        yield batch
        done += 1
    if done < (1 if count is None else count):
        raise DataError(
            f"the loader ended after {done} of {count} batches; give a longer one, or ask for batches={done}."
            if done
            else "the loader gave no batch; expected at least one. An iterator that was used before is empty."
        )


def _split(batch: Any, form: CallForm, number: int) -> Batch:
    """Take a batch apart into arguments and target.

    Raises:
        DataError: it has none of the forms, or forward does not take what is in it.
    """
    target: Any = batch
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    is_row, n_args = isinstance(batch, tuple | list), form.n_positional
    first = batch[0] if is_row and len(batch) == 2 else None
    try:
        if isinstance(batch, Tensor) or (isinstance(batch, Mapping) and form.first_is(Mapping)):
            args = (batch,)
        elif isinstance(batch, Mapping):
            kwargs = form.by_name(batch)
        elif isinstance(first, Mapping) and not form.first_is(Mapping):
            kwargs, target = form.by_name(first), batch[1]
        elif type(first) in (tuple, list) and not form.first_is((tuple, list)):
            args, target = tuple(first), batch[1]  # type: ignore[arg-type]
        elif is_row and n_args and len(batch) in (n_args, n_args + 1):
            args, target = tuple(batch[:n_args]), batch[n_args] if len(batch) > n_args else batch
        else:
            needed = f"{n_args} positional argument{'s' * (n_args > 1)}" if n_args else "keyword arguments"
            more = " To give more, write ((first, second), target)." if is_row and form.example is None else ""
            raise DataError(
                f"batch {number} is {describe(batch)}; forward{form.signature} is to be called with {needed}; "
                f"{FORMS}.{more}"
            )
        args, kwargs = form.arrange(args, kwargs)
    except KeyError as error:
        given = ", ".join(map(str, batch if isinstance(batch, Mapping) else batch[0]))
        raise DataError(f"batch {number} is a dictionary with {given}; {error.args[0]} missing: {FORMS}.") from error
    except TypeError as error:
        raise DataError(
            f"batch {number} is {describe(batch)}, which does not fit forward{form.signature}: {error}; {FORMS}."
        ) from error
    return Batch(args, kwargs, target)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def _check_tensor(leaf: Any, example: Tensor, graph: Graph, number: int) -> None:
    """Raise DataError for what cannot stand in the place of a tensor that the model was captured with."""
    if not isinstance(leaf, Tensor):
        raise DataError(
            f"batch {number} holds {type(leaf).__name__}; the model was captured with {_describe_one(example)} there."
        )
    is_free = graph.batch_hint is not None
    skipped = 1 if is_free and example.ndim else 0
    if leaf.ndim != example.ndim or leaf.shape[skipped:] != example.shape[skipped:]:
        any_batch = " with any batch" if is_free else ", whose batch is fixed (use drop_last=True)"
        raise DataError(
            f"batch {number} holds a tensor of shape {tuple(leaf.shape)}; the model was captured for "
            f"{tuple(example.shape)}{any_batch}."
        )
    if leaf.is_floating_point() != example.is_floating_point():
        raise DataError(
            f"batch {number} holds a tensor of dtype {leaf.dtype}; the model was captured for {example.dtype}."
        )
    if leaf.is_floating_point() and bool(leaf.isnan().any()):
        raise DataError(f"batch {number} holds NaN; expected numbers. Check the data.")


def _cast_like(example: Any, leaf: Any) -> Any:
    is_floating = isinstance(leaf, Tensor) and isinstance(example, Tensor) and example.is_floating_point()
    return leaf.to(example.dtype) if is_floating else leaf
