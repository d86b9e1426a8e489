"""The traced form of a shrunk model: one store of parameters, and a graph for each mode."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError, CaptureError
from torchshear.speedup._devices import follow_device

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class CallSpec:
    """How a traced module is called.

    Attributes:
        in_spec: tree structure of `(args, kwargs)`.
        out_specs: mode -> tree structure of the outputs.
        signature: signature of the original model's forward.
        shapes: for each flat input the sizes that it was captured with, None where any will do; None for no tensor.
    """

    in_spec: pytree.TreeSpec
    out_specs: Mapping[str, pytree.TreeSpec]
    signature: inspect.Signature
    shapes: tuple[tuple[int | None, ...] | None, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallSpec":
        """Nothing in it ever changes, so copies of a module share it."""
        return self


@dataclass(frozen=True, slots=True)
class StateEntry:
    """A tensor of a traced module: all names that it goes by, and what it is."""

    names: tuple[str, ...]
    tensor: Tensor
    is_persistent: bool


class TracedModule(nn.Module):
    """A model that runs captured graphs over parameters and buffers under their original names.

    In eval mode the graph captured in eval mode runs, in train mode the other, so that dropout and batch statistics
    behave as in the original. `state_dict`, `to`, `deepcopy` and optimizers work as on any module.
    """

    def __init__(
        self, state: Sequence[StateEntry], graphs: Mapping[str, fx.Graph], call: CallSpec, train_error: str = ""
    ) -> None:
        super().__init__()
        for entry in state:
            for name in entry.names:
                _register(self, name, entry)
        self._forwards = {mode: _compile(graph) for mode, graph in graphs.items()}
        self._call = call
        self._train_error = train_error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode.

        Raises:
            ArgumentError: the arguments have another structure than those that the model was captured with.
            CaptureError: the model is in train mode and could not be captured in that mode.
        """
        leaves = self._flatten(args, kwargs)
        self._check_shapes(leaves)
        mode = "train" if self.training else "eval"
        if mode not in self._forwards:
            raise CaptureError(
                f"this model has no graph for train mode: {self._train_error} Use it in eval mode, after model.eval()."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return pytree.tree_unflatten(list(self._forwards[mode](self, *leaves)), self._call.out_specs[mode])

    def _check_shapes(self, leaves: list[Any]) -> None:
        """The graph holds sizes of its inputs as constants, so others would be computed wrongly."""
        for number, (leaf, expected) in enumerate(zip(leaves, self._call.shapes, strict=True)):
            if isinstance(leaf, Tensor) and expected is not None:
                fits = [a == b or b is None for a, b in zip(leaf.shape, expected, strict=False)]
                if len(leaf.shape) != len(expected) or not all(fits):
                    sizes = ", ".join("any" if size is None else str(size) for size in expected)
                    raise ArgumentError(
                        f"input {number} has shape {tuple(leaf.shape)}; the model was captured for ({sizes}). Prune it "
                        f"with example inputs of the sizes that it is used with."
                    )

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec == self._call.in_spec:
            return list(leaves)
        try:
            given = self._call.signature.bind(*args, **kwargs).arguments
            n_args = len(self._call.in_spec.children()[0].children())
            names = list(self._call.signature.parameters)
            by_position = tuple(given[name] for name in names[:n_args])
            by_name = {name: value for name, value in given.items() if name not in names[:n_args]}
        except (TypeError, KeyError) as error:
            raise ArgumentError(f"the arguments do not fit the model: {error}.") from error
        leaves, spec = pytree.tree_flatten((by_position, by_name))
        if spec != self._call.in_spec:
            raise ArgumentError(
                f"the arguments have structure {spec}; expected {self._call.in_spec}, that of the example inputs. Call "
                f"the model as it was traced, or trace it as it is called."
            )
        return list(leaves)

    def extra_repr(self) -> str:
        """The modes that can run."""
        return f"modes={sorted(self._forwards)}"


def _register(root: nn.Module, name: str, entry: StateEntry) -> None:
    *path, last = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if isinstance(entry.tensor, nn.Parameter):
        module.register_parameter(last, entry.tensor)
    else:
        module.register_buffer(last, entry.tensor, persistent=entry.is_persistent)


def _compile(graph: fx.Graph) -> Forward:
    """Python code of a graph as a function of the module and the flat inputs."""
    follow_device(graph)
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<traced graph>", "exec"), scope)  # code made from the graph's own nodes, not from a file
    forward: Forward = scope["forward"]
    return forward


def signature_of(model: nn.Module) -> inspect.Signature:
    """Signature of a model's forward; of a traced one, that of the original."""
    return model._call.signature if isinstance(model, TracedModule) else inspect.signature(model.forward)


@contextmanager
def signed(model: nn.Module) -> Iterator[None]:
    """Have the forward of a traced model show the signature of the original for a while, which torch.export reads."""
    if not isinstance(model, TracedModule):
        yield
        return
    run = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    forward.__signature__ = model._call.signature  # type: ignore[attr-defined]
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
