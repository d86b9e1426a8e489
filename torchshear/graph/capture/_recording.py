"""One run of a model that records the calls of some of its modules, and what else touches their tensors."""

import difflib
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError, CaptureError, first_line
from torchshear.graph._graph import PartRun, Parts
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._run import run_model
from torchshear.graph.model._checks import check_module
from torchshear.graph.model._meta import buffers_on_meta, is_on_meta
from torchshear.graph.model._state import in_mode

_SKIPPED_SOURCES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")
_CAPTURED_LEAVES = (Tensor, bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)
# Methods that the rest of a model may call on a tensor without depending on its sizes or values.
_HARMLESS = frozenset({"dim", "get_device", "data_ptr", "element_size", "type", "requires_grad_"})


@dataclass(slots=True)
class Recording:
    """The events of a run.

    Attributes:
        calls: name and arguments of the calls of parts with distinct signatures, in order.
        called: names of all modules that were called.
        reads: id of a tensor of a part -> source line outside the parts that reads it.
        failure: the exception that ended the run early, if one did.
    """

    calls: list[tuple[str, ExampleInputs]] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    reads: dict[int, str] = field(default_factory=dict)
    failure: Exception | None = None


def record_parts(model: nn.Module, submodules: Sequence[str], inputs: ExampleInputs) -> tuple[PartRun, ExampleInputs]:
    """Run a model once in eval mode and return the calls of its parts as a model with example inputs of its own.

    Hooks exist during the run only; buffers, mode and random state are restored. A model on the meta device may stop
    where its code asks for values: the calls until then count.

    Args:
        model: the whole model.
        submodules: qualified names of the parts.
        inputs: example inputs of the whole model.

    Returns:
        The calls as one module, and its inputs.

    Raises:
        ArgumentError: a name is unknown, names the whole model or lies in another part, or a part is never called.
        CaptureError: the model does not run on the inputs, or a part gets an argument that no graph can take.
    """
    modules = _find_parts(model, submodules)
    recording = _record_run(model, modules, inputs)
    failure, called_parts = recording.failure, {part for part, _ in recording.calls}
    missing = [name for name in modules if name not in called_parts]
    if failure is not None and (missing or not is_on_meta(model)):
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs, so the calls of its parts are not known: "
            f"{type(failure).__name__}: {first_line(failure)} Check args and kwargs."
        ) from failure
    if missing:
        raise ArgumentError(_never_called(missing[0], model, recording.called))
    for part, given in recording.calls:
        _check_leaves(part, given, modules[part])
    names = _canonical_names(model)
    pinned = {names[id_]: f"also read outside the parts, at {line}" for id_, line in recording.reads.items()}
    parts = Parts(tuple(part for part, _ in recording.calls), pinned | _held_outside(model, modules, names))
    return PartRun(model, parts), ExampleInputs(tuple((given.args, given.kwargs) for _, given in recording.calls), {})


def first_calls(model: nn.Module, inputs: ExampleInputs) -> tuple[dict[str, ExampleInputs], Exception | None]:
    """Return the arguments of the first call of each module in a run, without values, and the error that ended the run.

    Args:
        model: the whole model.
        inputs: its example inputs.
    """
    found: dict[str, ExampleInputs] = {}

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in found:
            found[name] = ExampleInputs(args, kwargs).map(lambda t: torch.empty_like(t, device="meta"))

    with in_mode(model, "eval"), _hook_calls(model, enter, lambda name: None):
        try:
            run_model(model, inputs)
        except Exception as error:  # the model's own code may raise anything
            return found, error
    return found, None


def _record_run(model: nn.Module, modules: Mapping[str, nn.Module], inputs: ExampleInputs) -> Recording:
    """Run the model and return the events of the run."""
    recording = Recording()
    running: list[str] = []  # parts under way; "" is the model itself
    seen: set[Any] = set()

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.called.add(name)
        if name in ("", *modules):
            running.append(name)
        if name in modules:
            given = ExampleInputs(args, kwargs).copy()
            signature = (name, given.signature())
            if signature not in seen:
                seen.add(signature)
                recording.calls.append((name, given))

    def leave(name: str) -> None:
        if name in ("", *modules):
            running.pop()

    watched = {id(tensor) for module in modules.values() for _, tensor in _own_tensors(module, recurse=True)}
    reads = _OutsideReads(watched, recording.reads, lambda: running[-1:] == [""])
    buffers: AbstractContextManager[None] = nullcontext()
    if is_on_meta(model):
        buffers, inputs = buffers_on_meta(model), inputs.map(lambda tensor: tensor.to("meta"))
    with in_mode(model, "eval"), _hook_calls(model, enter, leave), buffers:
        try:
            with reads:
                run_model(model, inputs)
        except Exception as error:  # the model's own code may raise anything
            recording.failure = error
    return recording


@contextmanager
def _hook_calls(
    model: nn.Module, enter: Callable[[str, tuple[Any, ...], dict[str, Any]], None], leave: Callable[[str], None]
) -> Iterator[None]:
    """Have functions called before and after every call of a module in a block.

    Args:
        model: the model.
        enter: receives the name of the module and the arguments of the caller, before hooks of the user's change them.
        leave: receives the name of the module.
    """
    handles = []
    try:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs, name=name: enter(name, args, kwargs), prepend=True, with_kwargs=True
                    )
                )
                handles.append(module.register_forward_hook(lambda *_, name=name: leave(name), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _OutsideReads(TorchFunctionMode):
    """Notes the source line of every use of a watched tensor outside the parts that tells its size or values."""

    def __init__(self, watched: set[int], reads: dict[int, str], is_outside: Callable[[], bool]) -> None:
        super().__init__()
        self._watched = watched
        self._reads = reads
        self._is_outside = is_outside

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_outside():
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and id(leaf) in self._watched and not _is_harmless(func, result):
                    lines = (
                        f"{Path(frame.filename).name}:{frame.lineno}"
                        for frame in reversed(traceback.extract_stack())
                        if not frame.filename.startswith(_SKIPPED_SOURCES)
                    )
                    self._reads.setdefault(id(leaf), next(lines, "unknown line"))
        return result


def _is_harmless(func: Any, result: Any) -> bool:
    """Return whether a result tells no sizes or values: a dtype, a device, a flag, the number of dimensions."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return isinstance(result, bool | torch.dtype | torch.device | torch.layout | type(None)) or (
            func == Tensor.ndim.__get__  # type: ignore[attr-defined]
        )
    return name in _HARMLESS or name.startswith("is_")


def _find_parts(model: nn.Module, submodules: Sequence[str]) -> dict[str, nn.Module]:
    """Return the parts by the name that `named_modules` gives them.

    Raises:
        ArgumentError: the names are no list of names of separate modules below the model.
    """
    check_module(model)
    if isinstance(submodules, str) or not isinstance(submodules, Sequence) or not submodules:
        raise ArgumentError(f"submodules={submodules!r}; expected a list of names of modules, as ['backbone'].")
    canonical = {id(module): name for name, module in model.named_modules()}
    known = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for name in submodules:
        if not isinstance(name, str) or name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.7)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            children = ", ".join(repr(child) for child, _ in model.named_children())
            raise ArgumentError(f"{type(model).__name__} has no module {name!r}.{hint} Its children are {children}.")
        if known[name] is model:
            raise ArgumentError(f"submodules names {name!r}, which is the whole model; leave submodules out for that.")
        if canonical[id(known[name])] in found:
            raise ArgumentError(f"submodules names {name!r} twice; name each part once.")
        found[canonical[id(known[name])]] = known[name]
    for outer, module in found.items():
        inside = {id(one) for one in module.modules()} - {id(module)}
        for inner, other in found.items():
            if id(other) in inside:
                raise ArgumentError(f"part {inner!r} lies in part {outer!r}; name one of them, or separate ones.")
    return found


def _never_called(name: str, model: nn.Module, called: set[str]) -> str:
    """Return the message that a part is never called, with the modules that could be named in its place."""
    inside = sorted(other for other in called if other.startswith(f"{name}."))
    tops = [one for one in inside if not any(one.startswith(f"{other}.") for other in inside)]
    if tops:
        more = ", ..." if len(tops) > 6 else ""
        advice = f"called inside it are {', '.join(map(repr, tops[:6]))}{more}: name these"
    else:
        own = [one for one in called if one and "." not in one]
        advice = f"called in this run are {', '.join(map(repr, sorted(own)))}"
    return (
        f"part {name!r} of {type(model).__name__} is never called in a run on the example inputs, so nothing is known "
        f"of its inputs; {advice}. Only calls of the module itself count, not of its other methods."
    )


def _check_leaves(name: str, inputs: ExampleInputs, part: nn.Module) -> None:
    """Raise CaptureError if a part gets an object that a graph cannot take."""
    for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)):
        if not isinstance(leaf, _CAPTURED_LEAVES):
            inside = [f"{name}.{child_name}" for child_name, child in part.named_children() if holds_layers(child)]
            advice = f", as {inside[0]!r}" if inside else ""
            raise CaptureError(
                f"part {name!r} is called with an object of type {type(leaf).__name__}, which torch.export does "
                f"not take. Expected tensors and numbers, in tuples, lists and dicts. Name modules inside it instead"
                f"{advice}, or register the type with torch.utils._pytree."
            )


def holds_layers(module: nn.Module) -> bool:
    """Return whether a module has two weights: a single layer between fixed boundaries cannot shrink."""
    return sum(parameter.ndim > 1 for parameter in module.parameters()) > 1


def _own_tensors(module: nn.Module, *, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of parameters, buffers and plain tensor attributes, if asked also of all modules inside."""
    for prefix, one in module.named_modules() if recurse else [("", module)]:
        for own in (one._parameters, one._buffers, vars(one)):
            for name, value in own.items():
                if isinstance(value, Tensor):
                    yield (f"{prefix}.{name}" if prefix else name), value


def _canonical_names(model: nn.Module) -> dict[int, str]:
    """Return the id of each tensor -> its first name, of parameters before buffers before other attributes."""
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers(), *_own_tensors(model, recurse=True)):
        names.setdefault(id(tensor), name)
    return names


def _held_outside(model: nn.Module, parts: Mapping[str, nn.Module], names: Mapping[int, str]) -> dict[str, str]:
    """Return the tensors of the parts that a module holds which can be reached without going through a part.

    Args:
        model: the whole model.
        parts: the parts by name.
        names: id of a tensor -> its canonical name.

    Returns:
        Canonical name of a tensor -> a phrase that says which module holds it.
    """
    inside = {id(tensor) for part in parts.values() for _, tensor in _own_tensors(part, recurse=True)}
    stop = {id(part) for part in parts.values()}
    pinned: dict[str, str] = {}
    reached, waiting = {id(model)}, [("", model)]
    while waiting:
        path, module = waiting.pop()
        for name, tensor in _own_tensors(module, recurse=False):
            if id(tensor) in inside:
                holder = f"{path}.{name}" if path else name
                pinned.setdefault(names[id(tensor)], f"also held outside the parts, as {holder!r}")
        for name, child in module.named_children():
            if id(child) not in reached | stop:
                reached.add(id(child))
                waiting.append((f"{path}.{name}" if path else name, child))
    return pinned
