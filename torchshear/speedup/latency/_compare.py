"""`compare_latency`: ONNX files against each other in onnxruntime."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from torchshear._arguments import check_count, check_kind, quote
from torchshear.calibration import Progress
from torchshear.calibration._progress import check_progress
from torchshear.errors import ArgumentError, LatencyError
from torchshear.speedup.latency._comparison import LatencyComparison, Rounds
from torchshear.speedup.latency._device import Device, cpu_name
from torchshear.speedup.onnx._session import CPU, check_inputs, make_inputs, open_session, run_of

_Opened = tuple[onnxruntime.InferenceSession, Mapping[str, np.ndarray]]


def compare_latency(  # noqa: PLR0913  each argument is one knob of the measurement, with a default that is safe
    models: Mapping[str, str | os.PathLike[str]],
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    batch: int = 1,
    threads: int = 1,
    provider: str = CPU,
    rounds: int = 50,
    warmup: int = 10,
    min_seconds: float = 0.002,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Progress = True,
) -> LatencyComparison:
    """Measure ONNX models against each other in onnxruntime.

    Every round times each model once, in an order drawn anew, so that a machine that slows down slows all of them. The
    threads do not spin between inferences: two spinning sessions in one process disturb each other by up to a factor
    of two, while without spinning repeated medians of one thread agree within 1 to 2 % (measured).

    Args:
        models: name -> ONNX file; the first is the baseline.
        inputs: input name -> array, given to every model. Without them each model gets inputs made from its signature:
            standard normal floats, zeros for integers, true for bools, all drawn with `seed`.
        batch: size of a free first dimension where inputs are made; not used with `inputs`.
        threads: intra-op threads per session; inter-op is always 1.
        provider: the execution provider of onnxruntime; see `torchshear.speedup.latency.Device`.
        rounds: times kept per model; 20 or more for an interval that means something.
        warmup: inferences per model before the first round.
        min_seconds: shortest duration of one sample; shorter inferences are run several times in a row and averaged.
            The default of 2 ms keeps the clock and the call below 1 % of a sample.
        confidence: of all intervals, between 0 and 1.
        seed: of the inputs, of the order and of the bootstrap.
        progress: see `torchshear.collect`; what is done are rounds.

    Returns:
        The times and what follows from them. Sessions are closed.

    Raises:
        ArgumentError: there is no model, a number is out of its range, or the provider is not installed.
        LatencyError: a file is missing, invalid or holds an operator that onnxruntime does not run; or inputs do not
            fit a model, or cannot be made for it, or differ between the models.

    Example:
        >>> import tempfile, torch, torchshear
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = torchshear.export_onnx(torch.nn.Linear(4, 8), f"{folder}/model.onnx", torch.randn(1, 4))
        ...     list(torchshear.compare_latency({"dense": file.path}, rounds=2, min_seconds=1e-4).results)
        ['dense']
    """
    _check_numbers(models, inputs, batch=batch, threads=threads, rounds=rounds, warmup=warmup, seed=seed)
    check_progress(progress)
    if not isinstance(confidence, int | float) or not 0 < confidence < 1:
        raise ArgumentError(f"confidence must be between 0 and 1 exclusive, but got confidence={quote(confidence)}.")
    if not isinstance(min_seconds, int | float) or not 0 <= min_seconds <= 3600:
        raise ArgumentError(f"min_seconds must be a duration of 0 to 3600 s, but got min_seconds={quote(min_seconds)}.")
    device = Device(threads=threads, batch=batch, provider=provider)
    opened = _open_models(models, inputs, device, seed)
    measuring = Rounds(
        rounds=rounds, warmup=warmup, min_seconds=min_seconds, confidence=confidence, seed=seed, progress=progress
    )
    runs = {name: run_of(session, feeds) for name, (session, feeds) in opened.items()}
    results = measuring.time(runs, {name: Path(path) for name, path in models.items()})
    first, (_, feeds) = next(iter(opened.items()))
    size = next((array.shape[0] for array in feeds.values() if array.ndim), 1)
    return LatencyComparison(results, first, size, threads, device.runtime_name, cpu_name())


def _open_models(
    models: Mapping[str, str | os.PathLike[str]], inputs: Mapping[str, np.ndarray] | None, device: Device, seed: int
) -> dict[str, _Opened]:
    """Open every model and give it inputs of the same shapes and types."""
    opened: dict[str, _Opened] = {}
    for name, path in models.items():
        session = open_session(path, device.threads, provider=device.provider)
        made = make_inputs(name, session, device.batch, seed) if inputs is None else check_inputs(name, session, inputs)
        opened[name] = (session, made)
    first, (_, feeds) = next(iter(opened.items()))
    for name, (_, others) in opened.items():
        wanted, got = _signature(feeds), _signature(others)
        if wanted != got:
            raise LatencyError(
                f"{name!r} takes {got}, but {first!r} takes {wanted}; their times cannot be compared. "
                f"Export both with the same example inputs."
            )
    return opened


def _signature(feeds: Mapping[str, np.ndarray]) -> list[str]:
    """Return type and shape of each input."""
    return [f"{array.dtype}{list(array.shape)}" for array in feeds.values()]


def _check_numbers(models: Mapping[str, object], inputs: Mapping[str, object] | None, **numbers: int) -> None:
    """Refuse an empty mapping and counts below their minimum."""
    check_kind("models", models, Mapping, "a mapping from names to ONNX files")
    is_named = inputs is None or (isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs))
    if not is_named:
        raise ArgumentError(f"inputs={quote(inputs)}; expected a mapping from names to arrays, or None.")
    if not models:
        raise ArgumentError(
            "models is empty. Expected at least one entry, name -> ONNX file; the first is the baseline."
        )
    for name, value in numbers.items():
        check_count(name, value, least=0 if name in ("seed", "warmup") else 1)
