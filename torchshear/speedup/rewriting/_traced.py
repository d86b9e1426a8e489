"""The traced form of a shrunk model: one store of parameters, and a graph for each mode."""

import importlib
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError, CaptureError, OutputError
from torchshear.speedup.rewriting._lost_backwards import without_gradients

RunGraph = Callable[..., Any]
"""Called with a module that holds a graph's tensors, and with the flat inputs; returns the flat outputs."""


class GraphCode:
    """Python code of a graph: a function of the module and the flat inputs, that can be pickled.

    Args:
        source: the code, of a function `forward`.
        scope: what it calls by name, modules as `_ModuleName`.
    """

    def __init__(self, source: str, scope: Mapping[str, Any]) -> None:
        self._made_of = (source, dict(scope))
        names: dict[str, Any] = {
            name: importlib.import_module(value) if isinstance(value, _ModuleName) else value
            for name, value in scope.items()
        }
        exec(compile(source, "<traced graph>", "exec"), names)  # made from the graph's own nodes, not from a file
        self._run: Callable[..., Any] = names["forward"]

    @classmethod
    def of(cls, graph: fx.Graph) -> "GraphCode":
        """Compile a graph to a function of the module and the flat inputs."""
        follow_device(graph)
        code = graph.python_code("self")
        scope = {
            name: _ModuleName(value.__name__) if isinstance(value, ModuleType) else value
            for name, value in code.globals.items()
        }
        return cls(code.src, scope)

    def __call__(self, module: nn.Module, *leaves: Any) -> Any:
        """Run the graph."""
        return self._run(module, *leaves)

    def __reduce__(self) -> Any:
        """Pickle the code, to be compiled again."""
        return GraphCode, self._made_of


class _ModuleName(str):
    """Name of a Python module, which itself cannot be pickled."""


def follow_device(graph: fx.Graph) -> None:
    """Replace the device that calls of a graph name by the one on which the model's tensors are when it runs.

    A model that was captured on the meta device, or moved after its capture, then makes its masks and positions where
    its weights are. Graphs that name several devices stay as they are.

    Args:
        graph: changed in place.
    """
    devices = {
        node: {leaf for leaf in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, torch.device)}
        for node in graph.nodes
        if node.op == "call_function"
    }
    weight = next((node for node in graph.nodes if node.op == "get_attr"), None)
    if weight is None or len(set().union(*devices.values())) != 1:
        return
    with graph.inserting_after(weight):
        device = graph.call_function(device_of, (weight,))
    for node in (node for node, named in devices.items() if named):
        node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, (node.args, node.kwargs))


def device_of(tensor: Tensor) -> torch.device:
    """Return the device of a tensor."""
    return tensor.device


@dataclass(frozen=True, slots=True)
class CallSpec:
    """Calling convention of a traced module.

    Attributes:
        in_spec: tree structure of `(args, kwargs)`.
        out_specs: mode -> tree structure of the outputs.
        signature: signature of the original model's forward.
        shapes: for each flat input the sizes that it was captured with, None where any will do; None for no tensor.
        examples: the same with the sizes of the example inputs.
    """

    in_spec: pytree.TreeSpec
    out_specs: Mapping[str, pytree.TreeSpec]
    signature: inspect.Signature
    shapes: tuple[tuple[int | None, ...] | None, ...]
    examples: tuple[tuple[int, ...] | None, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallSpec":
        """Return it itself: it never changes, so copies of a module share it."""
        return self

    def __reduce__(self) -> Any:
        """Pickle it without annotations.

        Raises:
            OutputError: a signature or container of the user cannot be pickled; says what can be saved instead.
        """
        plain = [one.replace(annotation=inspect.Parameter.empty) for one in self.signature.parameters.values()]
        signature = inspect.Signature(plain)
        parts = (self.in_spec, dict(self.out_specs), signature, self.shapes, self.examples)
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch's own trees
                content = pickle.dumps(parts)
        except Exception as error:  # objects of the user's classes may refuse in any way
            raise OutputError(
                f"this traced model cannot be pickled, since {type(error).__name__}: {error}. Save its plan and its "
                f"weights: result.plan.save('plan.json'), torch.save(model.state_dict(), 'weights.pt'). They become it "
                f"again by small = torchshear.shrink(Model(), torchshear.PruningPlan.load('plan.json')), "
                f"small.load_state_dict(torch.load('weights.pt'))."
            ) from error
        return _unpickle_spec, (content,)


def _unpickle_spec(content: bytes) -> CallSpec:
    """Return the specification that `CallSpec` pickled."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return CallSpec(*pickle.loads(content))


@dataclass(frozen=True, slots=True)
class StateEntry:
    """A tensor of a traced module with all its names."""

    names: tuple[str, ...]
    tensor: Tensor
    is_persistent: bool


@dataclass(frozen=True, slots=True, eq=False)
class TracedCall:
    """The graphs of a traced module for one way of calling it.

    Attributes:
        forwards: mode -> function of the module and the flat inputs.
        spec: how it is called.
        train_error: why there is no graph for train mode; "" where there is one.
        gradient_error: why the graph for eval mode gives no gradients; "" where it does.
    """

    forwards: Mapping[str, RunGraph]
    spec: CallSpec
    train_error: str
    gradient_error: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedCall":
        """Return it itself: it never changes, so copies of a module share it."""
        return self

    @classmethod
    def of(
        cls, graphs: Mapping[str, fx.Graph], spec: CallSpec, train_error: str = "", gradient_error: str = ""
    ) -> "TracedCall":
        """Compile the graphs of the modes."""
        return cls({mode: GraphCode.of(graph) for mode, graph in graphs.items()}, spec, train_error, gradient_error)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Flatten arguments into the inputs of the graphs.

        Raises:
            ArgumentError: they have another structure, or other shapes, than those of the capture. The graphs hold
                sizes of their inputs as constants and would compute other shapes wrongly.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec.in_spec:
            try:
                leaves, spec = pytree.tree_flatten(self._arrange(args, kwargs))
            except (TypeError, KeyError) as error:
                raise ArgumentError(f"the arguments do not fit the model: {error}.") from error
        if spec != self.spec.in_spec:
            raise ArgumentError(
                f"the arguments have structure {spec}; expected {self.spec.in_spec}, that of the example inputs. Call "
                f"the model as it was traced, or trace it as it is called."
            )
        for number, (leaf, expected) in enumerate(zip(leaves, self.spec.shapes, strict=True)):
            if isinstance(leaf, Tensor) and expected is not None:
                fits = [a == b or b is None for a, b in zip(leaf.shape, expected, strict=False)]
                if len(leaf.shape) != len(expected) or not all(fits):
                    sizes = ", ".join("any" if size is None else str(size) for size in expected)
                    raise ArgumentError(
                        f"input {number} has shape {tuple(leaf.shape)}; the model was captured for ({sizes}). Prune it "
                        f"with example inputs of the sizes that it is used with."
                    )
        return list(leaves)

    def _arrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give arguments by position or by name, and names in the order, as in the example inputs."""
        given = dict(self.spec.signature.bind(*args, **kwargs).arguments)
        for parameter in self.spec.signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        positions, names = self.spec.in_spec.children()
        taken = list(self.spec.signature.parameters)[: positions.num_children]
        by_position = tuple(given.pop(name) for name in taken)
        by_name = {name: given.pop(name) for name in names.context if name in given}
        return by_position, by_name | given

    def is_as_captured(self, leaves: list[Any]) -> bool:
        """Check that the inputs have the very sizes of the capture, its batch included."""
        return all(
            not isinstance(leaf, Tensor) or tuple(leaf.shape) == example
            for leaf, example in zip(leaves, self.spec.examples, strict=True)
        )

    def run(self, module: nn.Module, leaves: list[Any]) -> Any:
        """Run the graph of the module's mode.

        Raises:
            CaptureError: the model is in train mode and could not be captured in that mode.
        """
        mode = "train" if module.training else "eval"
        if mode not in self.forwards:
            raise CaptureError(
                f"this model has no graph for train mode: {self.train_error} Use it in eval mode, after model.eval()."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            outputs = pytree.tree_unflatten(list(self.forwards[mode](module, *leaves)), self.spec.out_specs[mode])
        return without_gradients(outputs, self.gradient_error) if self.gradient_error else outputs


class TracedModule(nn.Module):
    """A model that runs captured graphs over parameters and buffers under their original names.

    In eval mode the graph captured in eval mode runs, in train mode the other, so that dropout and batch statistics
    behave as in the original. `state_dict`, `to`, `deepcopy`, `torch.save` and optimizers work as on any module; a
    module saved whole is read by `torch.load(..., weights_only=False)`, with the same version of torch. A part that its
    model calls in several ways has graphs for each way; those that fit the arguments run.
    """

    def __init__(self, state: Sequence[StateEntry], calls: Sequence[TracedCall]) -> None:
        super().__init__()
        for entry in state:
            for name in entry.names:
                *path, last = name.split(".")
                module: nn.Module = self
                for part in path:
                    if part not in module._modules:
                        module.add_module(part, nn.Module())
                    module = module._modules[part]  # type: ignore[assignment]
                if isinstance(entry.tensor, nn.Parameter):
                    module.register_parameter(last, entry.tensor)
                else:
                    module.register_buffer(last, entry.tensor, persistent=entry.is_persistent)
        self._calls = tuple(calls)

    @property
    def original_signature(self) -> inspect.Signature:
        """Signature of the original model's forward."""
        return self._calls[0].spec.signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode.

        Raises:
            ArgumentError: the arguments have another structure than those that the model was captured with.
            CaptureError: the model is in train mode and could not be captured in that mode.
        """
        misfits: list[ArgumentError] = []
        fits: list[tuple[TracedCall, list[Any]]] = []
        for call in self._calls:
            try:
                fits.append((call, call.flatten(args, kwargs)))
            except ArgumentError as error:
                misfits.append(error)
        if not fits:
            raise misfits[0]
        if len(fits) > 1:  # a graph of these very sizes goes before one with a free batch
            fits.sort(key=lambda fit: not fit[0].is_as_captured(fit[1]))
        call, leaves = fits[0]
        return call.run(self, leaves)

    def extra_repr(self) -> str:
        """Return the modes that can run."""
        return f"modes={sorted(self._calls[0].forwards)}"


def explain_limits(traced: TracedModule) -> str:
    """Return clauses for the reason of a traced form, which say what it cannot do; "" where it can do all."""
    found = ""
    for call in traced._calls:
        if "train" not in call.forwards and not call.gradient_error:  # of that `explain_untrainable` speaks
            found = f"; it does not run in train mode: {call.train_error.partition(' Expected ')[0]}"
    for spec in (call.spec for call in traced._calls):
        batches = sorted({shape[0] for shape in spec.examples if shape})
        if batches and not any(shape and shape[0] is None for shape in spec.shapes):
            sizes = " and ".join(map(str, batches))
            why = f", since its inputs begin with {sizes}" if len(batches) > 1 else f" ({sizes})"
            return f"{found}; its batch stays that of the example{why}"
    return found


@contextmanager
def showing_signature(model: nn.Module) -> Iterator[None]:
    """Have the forward of a traced model show the signature of the original, which torch.export reads, for a while."""
    if not isinstance(model, TracedModule):
        yield
        return
    run = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    forward.__signature__ = model.original_signature  # type: ignore[attr-defined]
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
