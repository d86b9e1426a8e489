"""One run of a model in which the calls of some of its modules are recorded, and what else touches their tensors."""

import difflib
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError, CaptureError, first_line
from torchshear.graph._inputs import ExampleInputs
from torchshear.graph._parts import PartRun, Parts
from torchshear.graph.capture._check import run_model
from torchshear.graph.model._checks import check_module
from torchshear.graph.model._meta import buffers_on_meta, is_on_meta
from torchshear.graph.model._state import in_mode

_SOURCES_TO_SKIP = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")
_CAPTURED_LEAVES = (Tensor, bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)
# What the rest of a model may ask of a tensor without depending on its sizes or values.
_HARMLESS = frozenset({"dim", "get_device", "data_ptr", "element_size", "type", "requires_grad_"})


@dataclass(frozen=True, slots=True)
class PartCall:
    """One call of a part: its name, and what it was called with."""

    part: str
    inputs: ExampleInputs


@dataclass(slots=True)
class Recording:
    """What a run shows.

    Attributes:
        calls: calls of the parts with distinct signatures, in order.
        called: names of all modules that were called.
        reads: id of a tensor of a part -> source line outside the parts that reads it.
    """

    calls: list[PartCall] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    reads: dict[int, str] = field(default_factory=dict)


def record_parts(model: nn.Module, submodules: Sequence[str], inputs: ExampleInputs) -> tuple[PartRun, ExampleInputs]:
    """Run a model once in eval mode and give the calls of its parts as a model with example inputs of its own.

    Hooks are there during the run only; buffers, mode and random state are what they were afterwards. A model on the
    meta device may stop where its code asks for values: the calls until then count.

    Args:
        model: the whole model.
        submodules: qualified names of the parts.
        inputs: example inputs of the whole model.

    Returns:
        The calls as one module, and what it is called with.

    Raises:
        ArgumentError: a name is unknown, names the whole model or lies in another part, or a part is never called.
        CaptureError: the model does not run on the inputs, or a part gets an argument that no graph can take.
    """
    modules = _find_parts(model, submodules)
    recording = Recording()
    failure = _run_recorded(model, modules, inputs, recording)
    missing = [name for name in modules if all(call.part != name for call in recording.calls)]
    if failure is not None and (missing or not is_on_meta(model)):
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs, so the calls of its parts are not known: "
            f"{type(failure).__name__}: {first_line(failure)} Check args and kwargs."
        ) from failure
    if missing:
        raise ArgumentError(_never_called(missing[0], model, recording.called))
    for call in recording.calls:
        _check_leaves(call, modules[call.part])
    pinned = _read_outside(model, recording.reads) | _held_outside(model, modules)
    parts = Parts(tuple(call.part for call in recording.calls), pinned)
    calls = tuple((call.inputs.args, call.inputs.kwargs) for call in recording.calls)
    return PartRun(model, parts), ExampleInputs(calls, {})


def first_calls(model: nn.Module, inputs: ExampleInputs) -> tuple[dict[str, ExampleInputs], Exception | None]:
    """What each module is first called with during a run: shapes only, no values. And what ended the run early, if so.

    Args:
        model: the whole model.
        inputs: its example inputs.
    """
    found: dict[str, ExampleInputs] = {}

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in found:
            found[name] = ExampleInputs(args, kwargs).map(lambda t: torch.empty_like(t, device="meta"))

    with in_mode(model, "eval"), _hooked(model, enter, lambda name: None):
        try:
            run_model(model, inputs)
        except Exception as error:  # the model's own code may raise anything
            return found, error
    return found, None


def _run_recorded(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: ExampleInputs, recording: Recording
) -> Exception | None:
    """Run the model and note what happens; gives the exception that ended the run, if one did."""
    running: list[str] = []
    seen: set[Any] = set()

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.called.add(name)
        if name in ("", *modules):
            running.append(name)
        if name in modules:
            call = PartCall(name, ExampleInputs(args, kwargs).copy())
            signature = (name, call.inputs.signature())
            if signature not in seen:
                seen.add(signature)
                recording.calls.append(call)

    def leave(name: str) -> None:
        if name in ("", *modules):
            running.pop()

    watched = {id(tensor) for module in modules.values() for _, tensor in _own_tensors(module, recurse=True)}
    watch = _OutsideReads(watched, recording.reads, lambda: running[-1:] == [""])
    with in_mode(model, "eval"), _hooked(model, enter, leave), _values_where_parameters_are(model) as move:
        try:
            with watch:
                run_model(model, move(inputs))
        except Exception as error:  # the model's own code may raise anything
            return error
    return None


@contextmanager
def _values_where_parameters_are(model: nn.Module) -> Iterator[Callable[[ExampleInputs], ExampleInputs]]:
    """Where parameters are on the meta device have buffers there for a while; gives what does so with inputs."""
    if not is_on_meta(model):
        yield lambda inputs: inputs
        return
    with buffers_on_meta(model):
        yield lambda inputs: inputs.map(lambda tensor: tensor.to("meta"))


@contextmanager
def _hooked(
    model: nn.Module, enter: Callable[[str, tuple[Any, ...], dict[str, Any]], None], leave: Callable[[str], None]
) -> Iterator[None]:
    """Have functions called around every call of a module: with what the caller gave, before hooks of the user's."""
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
            given = pytree.tree_leaves((args, kwargs))
            for leaf in given:
                if isinstance(leaf, Tensor) and id(leaf) in self._watched and not _is_harmless(func, result):
                    self._reads.setdefault(id(leaf), _source_line())
        return result


def _is_harmless(func: Any, result: Any) -> bool:
    """Whether a result says nothing about sizes or values: a dtype, a device, a flag, the number of dimensions."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return isinstance(result, bool | torch.dtype | torch.device | torch.layout | type(None)) or (
            func == Tensor.ndim.__get__  # type: ignore[attr-defined]
        )
    return name in _HARMLESS or name.startswith("is_")


def _source_line() -> str:
    """The innermost line of the stack that is neither torch's nor ours, as "file.py:12"."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_SOURCES_TO_SKIP):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "unknown line"


# -- checks ------------------------------------------------------------------------------------------------------------


def _find_parts(model: nn.Module, submodules: Sequence[str]) -> dict[str, nn.Module]:
    """The parts by the name that `named_modules` gives them.

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
            raise ArgumentError(_unknown(name, model, list(known)))
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


def _unknown(name: Any, model: nn.Module, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.7)
    children = [child for child, _ in model.named_children()]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{type(model).__name__} has no module {name!r}.{hint} Its children are {', '.join(map(repr, children))}."


def _never_called(name: str, model: nn.Module, called: set[str]) -> str:
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


def _check_leaves(call: PartCall, part: nn.Module) -> None:
    """Raise CaptureError if a part gets an object that a graph cannot take."""
    for leaf in pytree.tree_leaves((call.inputs.args, call.inputs.kwargs)):
        if not isinstance(leaf, _CAPTURED_LEAVES):
            inside = [f"{call.part}.{name}" for name, child in part.named_children() if holds_layers(child)]
            advice = f", as {inside[0]!r}" if inside else ""
            raise CaptureError(
                f"part {call.part!r} is called with an object of type {type(leaf).__name__}, which torch.export does "
                f"not take. Expected tensors and numbers, in tuples, lists and dicts. Name modules inside it instead"
                f"{advice}, or register the type with torch.utils._pytree."
            )


def holds_layers(module: nn.Module) -> bool:
    """Whether there are two weights in a module: a single layer between fixed boundaries cannot shrink."""
    return sum(parameter.ndim > 1 for parameter in module.parameters()) > 1


# -- what is not the parts' alone --------------------------------------------------------------------------------------


def _own_tensors(module: nn.Module, *, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes of a module, with those of all modules inside if asked."""
    for prefix, one in module.named_modules() if recurse else [("", module)]:
        for own in (one._parameters, one._buffers, vars(one)):
            for name, value in own.items():
                if isinstance(value, Tensor):
                    yield (f"{prefix}.{name}" if prefix else name), value


def _canonical_names(model: nn.Module) -> dict[int, str]:
    """Id of a tensor -> its first qualified name; parameters come before buffers, those before other attributes."""
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers(), *_own_tensors(model, recurse=True)):
        names.setdefault(id(tensor), name)
    return names


def _held_outside(model: nn.Module, parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """Tensors of the parts that a module holds which can be reached without going through a part."""
    inside = {id(tensor) for part in parts.values() for _, tensor in _own_tensors(part, recurse=True)}
    names, stop = _canonical_names(model), {id(part) for part in parts.values()}
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


def _read_outside(model: nn.Module, reads: Mapping[int, str]) -> dict[str, str]:
    names = _canonical_names(model)
    return {names[tensor]: f"also read outside the parts, at {line}" for tensor, line in reads.items()}
