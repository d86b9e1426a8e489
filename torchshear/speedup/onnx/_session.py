"""Sessions of onnxruntime, and inputs for them."""

import os
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnxruntime

from torchshear._arguments import quote
from torchshear.errors import LatencyError
from torchshear.storage._reading import as_path

CPU: Final = "CPUExecutionProvider"
_DTYPES: Final[Mapping[str, str]] = MappingProxyType(
    {"float": "float32", "double": "float64", "float16": "float16", "bool": "bool"}
    | {f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)


def open_session(
    path: str | os.PathLike[str],
    threads: int = 1,
    profile: str | os.PathLike[str] | None = None,
    provider: str = CPU,
) -> onnxruntime.InferenceSession:
    """Open an ONNX file with every graph optimisation, pinned threads and no spinning.

    Args:
        path: the ONNX file.
        threads: intra-op threads; inter-op is 1.
        profile: what the name of a file begins with, into which the time of every kernel goes; None for no such file.
        provider: the execution provider; the CPU's runs the operators that it lacks.

    Returns:
        The session, ready to run.

    Raises:
        LatencyError: the file is missing, is no ONNX model, or holds an operator that onnxruntime does not run; or the
            provider does not start.
    """
    path = as_path(path, "the path of an ONNX file")
    if not os.path.isfile(path):
        raise LatencyError(
            f"no file at {str(path)!r}. Write it first, with torchshear's export_onnx or torch.onnx.export."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile)
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=list(dict.fromkeys((provider, CPU))))
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        where = "on the CPU" if provider == CPU else f"with {provider}"
        raise LatencyError(
            f"onnxruntime {onnxruntime.__version__} does not run {str(path)!r} {where}: {error_reason(error)}"
        ) from error
    if session.get_providers()[0] != provider:
        raise LatencyError(
            f"{provider} is installed, but does not start; onnxruntime would run {str(path)!r} with "
            f"{session.get_providers()[0]} instead. Check its libraries and drivers, or measure with another provider."
        )
    return session


def run_of(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """Return a function that runs a session once on some inputs."""
    run, given = session.run, dict(feeds)
    return lambda: run(None, given)


def error_reason(error: BaseException) -> str:
    """Return the message of an onnxruntime exception in one line, without its code, with a full stop."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return text if text.endswith(".") else f"{text}."


def make_inputs(name: str, session: onnxruntime.InferenceSession, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Make inputs from a model's signature.

    Args:
        name: name of the model, for messages.
        session: the model.
        batch: size of every first dimension that is free.
        seed: of the values.

    Returns:
        Input name -> array: standard normal floats, zeros for integers, true for bools.

    Raises:
        LatencyError: a dimension other than the first is free, a type is not a number, or no input takes the batch.
    """
    rng = np.random.default_rng(seed)
    feeds = {}
    is_batched = batch == 1
    for node in session.get_inputs():
        dtype = _DTYPES.get(node.type.removeprefix("tensor(").removesuffix(")"))
        sizes = [batch if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(node.shape)]
        if dtype is None or not all(isinstance(size, int) for size in sizes):
            raise LatencyError(
                f"cannot make input {node.name!r} of {name!r}: it is a {node.type} of shape {node.shape}, and only a "
                f"first dimension may be free. Pass inputs={{{node.name!r}: array, ...}}."
            )
        is_batched |= sizes[:1] == [batch]
        feeds[node.name] = _example_array(np.dtype(dtype), sizes, rng)
    if not is_batched:
        raise LatencyError(
            f"no input of {name!r} takes a batch of {batch}. Export it with a dynamic batch, or use batch=1."
        )
    return feeds


def _example_array(dtype: np.dtype[Any], shape: list[int], rng: np.random.Generator) -> np.ndarray:
    """Make normal floats, zero integers (always a valid index) or true bools."""
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    return np.full(shape, dtype.kind == "b", dtype)


def check_inputs(
    name: str, session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Check that the caller's inputs are what a model takes.

    Args:
        name: name of the model, for messages.
        session: the model.
        inputs: input name -> array.

    Returns:
        The inputs, each contiguous.

    Raises:
        LatencyError: a name is missing or unknown, or a type or shape does not fit.
    """
    nodes = {node.name: node for node in session.get_inputs()}
    if set(nodes) != set(inputs):
        raise LatencyError(f"{name!r} takes the inputs {sorted(nodes)}, but got {quote(sorted(inputs))}.")
    for key, node in nodes.items():
        array = np.asarray(inputs[key])
        dtype = _DTYPES.get(node.type.removeprefix("tensor(").removesuffix(")"), node.type)
        fits = len(node.shape) == array.ndim and all(
            not isinstance(size, int) or size == actual for size, actual in zip(node.shape, array.shape, strict=True)
        )
        if not fits or array.dtype != dtype:
            raise LatencyError(
                f"input {key!r} of {name!r} is {node.type} of shape {node.shape}, but got {array.dtype} of shape "
                f"{list(array.shape)}."
            )
    return {key: np.ascontiguousarray(inputs[key]) for key in nodes}
