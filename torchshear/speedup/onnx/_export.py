"""Export to ONNX that is checked: a file is written only if onnxruntime computes with it what torch computes."""

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchshear.errors import ArgumentError, ExportError, LatencyError
from torchshear.graph import ExampleInputs
from torchshear.graph._outputs import drop_opaque_outputs
from torchshear.graph.capture._export import without_stack_traces
from torchshear.graph.model._checks import check_module
from torchshear.graph.model._process import run_exclusively, silence_torch
from torchshear.graph.model._state import preserve_state
from torchshear.speedup._relative_error import typical_magnitude
from torchshear.speedup.onnx._arguments import DynamicShapes, ExampleCall, check_limits, check_tensors
from torchshear.speedup.onnx._decompositions import decompose
from torchshear.speedup.onnx._registry import gathering_once
from torchshear.speedup.onnx._session import error_reason, open_session
from torchshear.speedup.rewriting._traced import showing_signature
from torchshear.storage._reading import as_path
from torchshear.storage._writing import DRAFT, atomic_path

Dynamic = Literal["batch and length", "batch", "nothing"]

logger = logging.getLogger(__name__)

_MAX_EMBEDDED_BYTES: Final = 2**31 - 2**26  # protobuf ends at 2 GiB; the graph itself needs some of it


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """An ONNX file that was run and compared.

    Attributes:
        path: the file.
        size_bytes: its size, weights stored beside it included.
        opset: version of the ONNX operator set.
        max_error: largest difference from torch of any element, relative to it and to the ordinary values of its
            output, over all outputs and batches.
        batches_checked: batch sizes that onnxruntime ran.
        dynamic_batch: whether the file takes any batch size.
        static_reason: why the batch is fixed; None where it is not.
        dynamic_length: whether sequences of integers (tokens) may have another length than in the examples.
        dynamic_sizes: names of the other dynamic sizes, as they were asked for.
    """

    path: Path
    size_bytes: int
    opset: int
    max_error: float
    batches_checked: tuple[int, ...]
    dynamic_batch: bool
    static_reason: str | None = None
    dynamic_length: bool = False
    dynamic_sizes: tuple[str, ...] = ()


@run_exclusively()
def export_onnx(  # noqa: PLR0913 - keywords, each a choice of its own
    model: nn.Module,
    path: str | os.PathLike[str],
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    opset: int | None = None,
    dynamic_shapes: DynamicShapes = None,
    check_batches: Sequence[int] = (1, 3),
    rtol: float = 2e-4,
    atol: float = 1e-6,
) -> OnnxFile:
    """Write a model as ONNX, run the file in onnxruntime and compare every output with torch.

    The batch is the first dimension of the first tensor input, and of every other tensor input whose first dimension is
    as long. It is dynamic in the file, with the name "batch"; if the model does not allow that, the file has the batch
    of the examples and the result says why. Inputs of integers with two dimensions or more are sequences. Their length
    is dynamic as well, with the name "length", if the model allows it; a length of one less is then compared, too.
    Weights are constants: up to 2 GB inside the file, above that in PATH.data. Outputs that torch.export does not know,
    such as a cache of keys and values, are left out.

    The model is exported in evaluation mode; its mode, its buffers and the state of the random generators are the same
    afterwards. A file at `path` is replaced only after every check has passed.

    Args:
        model: any module that torch.export can capture; its weights may be float16, float32 or float64.
        path: the file to create or replace.
        args: example inputs by position, batch first.
        kwargs: example inputs by name.
        opset: version of the ONNX operator set that the file is to have; None for that of torch (20 at present). Older
            ones are converted, which not every operator allows.
        dynamic_shapes: sizes that are dynamic beside the batch, as for torch.export: parameter of forward ->
            dimension -> name, as `{"x": {2: "height", 3: "width"}}`. Inputs with these sizes doubled are compared, too.
        check_batches: batch sizes to compare beside that of the examples; made by repeating or cutting the examples.
        rtol: allowed difference of an element as a share of its own value and of the ordinary values of its output,
            never of the largest, which may be a filler; integers must be equal.
        atol: allowed difference that is added to it.

    Returns:
        What was written and how it was checked.

    Raises:
        ArgumentError: a tolerance, a batch size or the opset is out of range, `dynamic_shapes` names what is not there,
            or the examples do not fit the model's signature.
        WeightError: a weight is on the meta device.
        ExportError: torch cannot convert the model, or not to this opset; the model fixes a size that was to be free;
            onnxruntime does not run it, or an output differs.
        OutputError: the file cannot be written.

    Example:
        >>> import tempfile, torch, torchshear
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torchshear.export_onnx(model, f"{folder}/model.onnx", torch.randn(1, 4)).max_error < 1e-4
        True

    Reference: `torch.onnx.export(dynamo=True)`, https://docs.pytorch.org/docs/stable/onnx_export.html
    """
    check_module(model)
    check_limits(check_batches, rtol, atol, opset)
    given = ExampleInputs.of(args, kwargs)
    call = ExampleCall.of(model, given.args, given.kwargs, dynamic_shapes)
    check_tensors(model, call)
    target, check = as_path(path, "the path of an ONNX file"), _Tolerance(float(rtol), float(atol))
    if not str(target).isprintable():
        raise ArgumentError(f"the path {str(target)!r} has characters that onnx cannot write; choose another name.")
    with _eval_mode(model), drop_opaque_outputs(model):
        if call.batch is None:
            reason = "no example input is a tensor with a first dimension"
        else:
            batches = tuple(dict.fromkeys((call.batch, *check_batches)))
            for free in ("batch and length", "batch") if call.sequences else ("batch",):
                try:
                    return _export(model, target, call, batches, check, free, opset)
                except ExportError as error:
                    reason = str(error)
        logger.info("exporting %s with a fixed batch: %s", type(model).__name__, reason)
        batches = () if call.batch is None else (call.batch,)
        return replace(_export(model, target, call, batches, check, "nothing", opset), static_reason=reason)


@dataclass(frozen=True, slots=True)
class _Tolerance:
    """Allowed difference of an output of onnxruntime from that of torch."""

    rtol: float
    atol: float

    def compare(self, name: str, batch: int | None, expected: np.ndarray, actual: np.ndarray) -> float:
        """Return the relative error of one output, or raise ExportError if it is too large."""
        where = f"output {name!r}" + ("" if batch is None else f" at batch {batch}")
        if expected.shape != actual.shape:
            raise ExportError(f"{where} has shape {actual.shape} in onnxruntime, but {expected.shape} in torch.")
        if not expected.size:
            return 0.0
        wanted, got = (torch.from_numpy(array).to(torch.float64) for array in (expected, actual.astype(expected.dtype)))
        if expected.dtype.kind == "f":
            scale = typical_magnitude(wanted, wanted)
            allowed = self.atol + self.rtol * (wanted.abs() + scale)
        else:
            scale, allowed = 1.0, torch.zeros_like(wanted)
        same = (wanted == got) | (wanted.isnan() & got.isnan())
        gaps = (wanted - got).abs().masked_fill(same, 0).nan_to_num(torch.inf, torch.inf)
        if bool((gaps > allowed).any()):
            worst = int((gaps - allowed).argmax())
            there, limit, gap = (float(values.flatten()[worst]) for values in (wanted, allowed, gaps))
            raise ExportError(
                f"{where} differs from torch by {gap:.3g}, with {limit:.3g} allowed where torch gives {there:.3g}. If "
                f"the model computes in half precision, raise rtol; if it draws random numbers or changes its own "
                f"buffers in evaluation mode, it has no fixed output to compare."
            )
        return float((gaps / (wanted.abs() + scale)).masked_fill(same, 0).max())


def _export(
    model: nn.Module,
    target: Path,
    call: ExampleCall,
    batches: tuple[int, ...],
    check: _Tolerance,
    free: Dynamic,
    opset: int | None,
) -> OnnxFile:
    """Convert, save beside the target, check, and move into place."""
    calls = [call.with_batch(batch) for batch in batches] or [call.with_batch(None)]
    calls += [calls[0].with_larger_sizes()] if call.requested else []
    expected = [_run_torch(model, one) for one in calls]
    traced = call.with_batch(max(call.batch, 2)) if free != "nothing" and call.batch is not None else call
    program = _convert(model, traced, free, opset)
    place = Path(os.path.realpath(target))
    with atomic_path(place) as temporary, tempfile.TemporaryDirectory(prefix=DRAFT, dir=place.parent) as folder:
        draft = Path(folder) / place.name
        proto = _save(program, draft, traced, free)
        if _has_length(proto):
            calls.append(calls[0].with_shorter_sequences())
            expected.append(_run_torch(model, calls[-1]))
        max_error = _check_file(draft, model, calls, expected, check)
        size_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
        weights = draft.with_name(f"{draft.name}.data")
        if weights.exists():
            with atomic_path(place.with_name(weights.name)) as temporary_weights:
                weights.replace(temporary_weights)
                place.unlink(missing_ok=True)  # or its old graph would read the new weights if the process ended here
        draft.replace(temporary)
    dynamic, version = free != "nothing", _opset_of(proto)
    sizes = tuple(dict.fromkeys(name for names in call.requested.values() for name in names.values()))
    return OnnxFile(target, size_bytes, version, max_error, batches, dynamic, None, _has_length(proto), sizes)


def _opset_of(proto: onnx.ModelProto) -> int:
    return int(next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")))


def _run_torch(model: nn.Module, call: ExampleCall) -> list[np.ndarray]:
    """Run the model in torch on copies of its buffers, and return its output tensors in order."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    own = call.with_batch(call.batch)
    try:
        result = torch.func.functional_call(model, buffers, *own.arguments)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} itself fails at batch {call.batch}{call.note}: {_cause(error)}"
        ) from error
    leaves = pytree.tree_leaves(result)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor):
            raise ExportError(
                f"{type(model).__name__} returns a {type(leaf).__name__} beside its tensors, which ONNX cannot hold. "
                f"Return tensors, or None, in tuples, lists or dicts."
            )
    return [leaf.detach().cpu().numpy() for leaf in leaves if leaf is not None]


def _convert(model: nn.Module, call: ExampleCall, free: Dynamic, opset: int | None) -> torch.onnx.ONNXProgram:
    """Capture the model and translate it to ONNX in memory."""
    shapes = None
    if free != "nothing" or call.requested:
        shapes = call.dynamic_shapes(batch=free != "nothing", lengths=free == "batch and length")
    try:
        with silence_torch(), showing_signature(model), gathering_once(), without_stack_traces():
            # With stack traces files would hold paths of sources.
            captured = torch.export.export(model, *call.arguments, dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(decompose(captured), dynamo=True, verbose=False, opset_version=opset)
    except Exception as error:
        raise ExportError(
            f"torch cannot turn {type(model).__name__} into ONNX: {_cause(error)} "
            f"Replace what it names in the model, or see the full report with torch.export.export(model, args)."
        ) from error
    if program is None:
        raise ExportError(f"torch.onnx.export gave no program for {type(model).__name__}. Update torch and onnxscript.")
    written = _opset_of(program.model_proto)
    if opset is not None and written != opset:
        raise ExportError(
            f"{type(model).__name__} has opset {written} as torch {torch.__version__} writes it, and cannot be "
            f"converted to opset {opset}: an operator of it has no form there. Ask for a newer opset."
        )
    return program


def _save(program: torch.onnx.ONNXProgram, draft: Path, call: ExampleCall, free: Dynamic) -> onnx.ModelProto:
    """Write the program and return its graph; weights over the limit of protobuf go into a file beside it."""
    weights = (value.const_value for value in program.model.graph.initializers.values())
    if sum(weight.nbytes for weight in weights if weight is not None) > _MAX_EMBEDDED_BYTES:
        program.save(draft, external_data=True)
        proto = onnx.load(draft, load_external_data=False)
    else:
        proto = program.model_proto
    if free != "nothing" or call.requested:
        _name_sizes(proto, call, free)
    draft.write_bytes(proto.SerializeToString())
    return proto


def _has_length(proto: onnx.ModelProto) -> bool:
    """Check that an input has a dynamic length."""
    return any(dim.dim_param == "length" for value in proto.graph.input for dim in value.type.tensor_type.shape.dim)


def _name_sizes(proto: onnx.ModelProto, call: ExampleCall, free: Dynamic) -> None:
    """Name the dynamic sizes of a file in place: "batch", "length", and the names that were asked for.

    Raises:
        ExportError: an input has the batch, or a size that was asked for, fixed.
    """
    names: dict[str, str] = {}
    for node, place in zip(proto.graph.input, call.tensors(), strict=True):
        sizes = node.type.tensor_type.shape.dim
        for dim, name in call.requested.get(place, {}).items():
            if not sizes[dim].dim_param.isidentifier():
                raise ExportError(
                    f"the model fixes dimension {dim} of input {node.name!r}, {name!r}, or ties it to another size. "
                    f"Leave it out of dynamic_shapes."
                )
            names.setdefault(sizes[dim].dim_param, name)
        if free != "nothing" and place in call.batched:
            if not sizes[0].dim_param.isidentifier():  # a size the model fixes comes as a number
                raise ExportError(f"the model fixes the first dimension of input {node.name!r}.")
            names.setdefault(sizes[0].dim_param, "batch")
        if free == "batch and length" and place in call.sequences and sizes[1].dim_param.isidentifier():
            count = sum(name.startswith("length") for name in names.values())
            names.setdefault(sizes[1].dim_param, f"length_{count + 1}" if count else "length")
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = pattern.sub(lambda found: names[found[0]], dim.dim_param)


def _check_file(
    draft: Path, model: nn.Module, calls: Sequence[ExampleCall], expected: Sequence[list[np.ndarray]], check: _Tolerance
) -> float:
    """Validate the file, run it on every call, and return the largest relative error."""
    try:
        onnx.checker.check_model(draft)
        session = open_session(draft)
    except (onnx.checker.ValidationError, LatencyError) as error:
        reason = error_reason(error.__cause__ or error)
        raise ExportError(f"onnxruntime does not run {type(model).__name__}: {reason}{_dtype_hint(model)}") from error
    names, outputs = [node.name for node in session.get_inputs()], session.get_outputs()
    errors = [0.0]
    for call, wanted in zip(calls, expected, strict=True):
        arrays = [tensor.cpu().numpy() for tensor in call.tensors().values()]
        if len(arrays) != len(names) or len(outputs) != len(wanted):
            raise ExportError(
                f"the ONNX file takes {len(names)} inputs and gives {len(outputs)} outputs, "
                f"but the model takes {len(arrays)} and gives {len(wanted)}."
            )
        try:
            got = session.run(None, dict(zip(names, arrays, strict=True)))
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise ExportError(f"onnxruntime fails at batch {call.batch}{call.note}: {error_reason(error)}") from error
        errors += [
            check.compare(node.name, call.batch, one, other)
            for node, one, other in zip(outputs, wanted, got, strict=True)
        ]
    return max(errors)


def _dtype_hint(model: nn.Module) -> str:
    """Say what to do about float64, for which onnxruntime has MatMul and Gemm but no Conv."""
    if any(tensor.dtype == torch.float64 for tensor in (*model.parameters(), *model.buffers())):
        return " onnxruntime has few float64 kernels: export copy.deepcopy(model).float(), with float32 inputs."
    return ""


def _cause(error: BaseException) -> str:
    """Give the first line of the innermost cause, without colours and with a full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    line = text.splitlines()[0].strip() if text else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode without gradients; mode, state and random state are restored."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {tensor.get_device() for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    for module, _ in modes:
        module.training = False
    try:
        with preserve_state(model), torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
