"""Names of a model's outputs: keys, fields and places on the way to each tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError
from torchshear.graph._graph import Graph, shape_of
from torchshear.graph._names import as_names, close_to, matches


def output_names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    """Name of each output in the order in which they are flattened.

    Keys of dictionaries (and of what derives from them), fields of dataclasses and named tuples, places in tuples and
    lists, joined by dots: "logits", "features.3". A single output is called "0".
    """
    return tuple(".".join(path) or "0" for path in _paths(spec))


def _paths(spec: pytree.TreeSpec) -> Iterator[tuple[str, ...]]:
    if spec.is_leaf():
        yield ()
        return
    children = spec.children()
    for name, child in zip(_child_names(spec, len(children)), children, strict=True):
        for path in _paths(child):
            yield (name, *path)


def _child_names(spec: pytree.TreeSpec, count: int) -> list[str]:
    """What a container calls its children: it is built of marks, which are looked for in it."""
    marks = [_Mark() for _ in range(count)]
    by_place = [str(place) for place in range(count)]
    try:
        made = pytree.SUPPORTED_NODES[spec.type].unflatten_fn(marks, spec.context)
    except Exception:  # a container of the user's may refuse what is not a tensor in any way; places are names, too
        return by_place
    named = {id(value): name for name, value in _items(made)}
    return [named.get(id(mark), place) for mark, place in zip(marks, by_place, strict=True)]


class _Mark:
    """Stands for an output."""


def _items(container: Any) -> list[tuple[str, Any]]:
    if isinstance(container, Mapping):
        return [(str(key), value) for key, value in container.items()]
    if is_dataclass(container):
        return [(field.name, getattr(container, field.name)) for field in fields(container)]
    names = getattr(container, "_fields", ())
    return list(zip(names, container, strict=True)) if names else []


def output_nodes(graph: Graph) -> list[tuple[str, Any]]:
    """Name and value of each output of a graph; values that no node makes are constants."""
    end = next(node for node in reversed(graph.fx_graph.nodes) if node.op == "output")
    values = pytree.tree_leaves(end.args[0], is_leaf=lambda value: isinstance(value, fx.Node))
    return list(zip(output_names(graph.out_spec), values, strict=True))


def check_outputs(graph: Graph, given: object) -> tuple[str, ...]:
    """Names or patterns of outputs that may shrink, each of which must fit one.

    Raises:
        ArgumentError: one fits no output; lists the outputs with their shapes. Or the graph is of parts of a model.
    """
    patterns = as_names("prunable_outputs", given)
    if patterns and graph.parts is not None:
        raise ArgumentError(
            f"prunable_outputs={list(patterns)!r} with submodules; outputs of parts keep their shapes, since the rest "
            f"of the model reads them. Leave prunable_outputs out."
        )
    outputs = output_nodes(graph)
    for pattern in patterns:
        if not any(matches(pattern, name) for name, _ in outputs):
            names = [name for name, _ in outputs]
            known = ", ".join(f"{name} {_shape(graph, value)}" for name, value in outputs[:40])
            raise ArgumentError(
                f"prunable_outputs: {pattern!r} fits no output of {graph.model_type}, which has {known}"
                f"{', ...' if len(outputs) > 40 else ''}. Name one of these, or a pattern such as 'features.*'."
                f"{close_to(pattern, names)}"
            )
    return patterns


def shape_with_batch(graph: Graph, node: fx.Node) -> tuple[int | None, ...]:
    """Sizes of a node's value, None where they follow the batch."""
    return tuple(None if graph.is_free(node, dim) else size for dim, size in enumerate(shape_of(node)))


def _shape(graph: Graph, value: Any) -> str:
    if not isinstance(value, fx.Node) or not isinstance(shape_of(value), tuple):
        return "(no tensor)"
    return f"({', '.join('batch' if size is None else str(size) for size in shape_with_batch(graph, value))})"
