"""Running a model, to see whether it runs and whether a captured graph computes the same."""

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchshear.errors import first_line
from torchshear.graph._contract import output_leaves
from torchshear.graph._graph import Graph, Mode
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._keeping import kept_state
from torchshear.graph._mode import in_mode
from torchshear.graph._run import graph_output


def agrees(graph: Graph, model: nn.Module) -> bool:
    """Whether a graph computes what the model does, on up to four samples of the example and on one more.

    It may not if the model's Python looks at the batch size. A model on the meta device is believed.

    Args:
        graph: the captured model.
        model: the model, in the graph's mode.
    """
    if any(tensor.is_meta for tensor in [*graph.inputs.tensors(), *(entry.tensor for entry in graph.state.values())]):
        return True
    batch = min(graph.inputs.batch_size() or 1, 4)
    # Batch norms over one value a channel cannot be trained.
    batches = (batch, batch + 1) if graph.mode == "eval" else (max(batch, 2),)
    try:
        return all(_agree_on(graph, model, graph.inputs.with_batch(size)) for size in batches)
    except Exception:  # the model's own code, or a call in the graph, does not take this batch
        return False


def _agree_on(graph: Graph, model: nn.Module, inputs: ExampleInputs) -> bool:
    """Compare on some inputs. What is drawn at random, as a dropout mask is, is drawn alike."""
    torch.manual_seed(0)
    expected = run_model(model, inputs)
    torch.manual_seed(0)
    own = inputs.copy()
    state = {name: entry.tensor for name, entry in graph.state.items()}
    with torch.no_grad():
        actual = graph_output(graph.fx_graph, state, pytree.tree_leaves((own.args, own.kwargs)))
    return _are_close(output_leaves(expected), output_leaves(actual))


def failure_of(model: nn.Module, inputs: ExampleInputs, mode: Mode) -> str | None:
    """What a model raises when it is run in a mode, in a line, or None if it runs; it is left as it was."""
    with in_mode(model, mode):
        try:
            run_model(model, inputs)
        except Exception as error:  # a forward may raise anything
            return f"{type(error).__name__}: {first_line(error)[:160]}"
    return None


def differs_in_training(model: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether outputs have another structure or other shapes in train mode than in eval mode, where both run."""
    batched = inputs.with_batch(2) if inputs.batch_size() == 1 else inputs  # batch norms need two values a channel
    found = []
    for mode in ("eval", "train"):
        with in_mode(model, mode):
            try:
                leaves, spec = pytree.tree_flatten(run_model(model, batched))
            except Exception:  # the model's own code may not run in this mode
                return False
        found.append((spec, [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]))
    return found[0] != found[1]


def run_model(model: nn.Module, inputs: ExampleInputs) -> Any:
    """The model's outputs; its state is put back."""
    own = inputs.copy()
    with torch.no_grad(), kept_state(model):
        return model(*own.args, **own.kwargs)


def _are_close(left: list[Any], right: list[Any]) -> bool:
    if len(left) != len(right):
        return False
    for a, b in zip(left, right, strict=True):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            continue
        if a.shape != b.shape:
            return False
        one, two = (value.to(torch.complex128 if value.is_complex() else torch.float64) for value in (a, b))
        scale = float(two.abs().nan_to_num(0, 0).max()) if b.numel() else 0.0
        if not torch.allclose(one, two, rtol=0, atol=max(1e-2 * scale, 1e-12), equal_nan=True):
            return False
    return True
