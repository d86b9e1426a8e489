"""Times of models that were taken in the same rounds, what follows from them, and the rounds themselves."""

import gc
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from torchshear._arguments import quote
from torchshear.calibration import Progress
from torchshear.calibration._progress import with_progress
from torchshear.errors import ArgumentError, LatencyError
from torchshear.speedup.onnx._session import error_reason

Run = Callable[[], object]  # one inference; it returns when that is done

_RESAMPLES: Final = 2000
_NOISY_IQR: Final = 0.1  # share of the median, as torch.utils.benchmark.Measurement warns
_BLOCKS: Final = 8  # of consecutive rounds
_BATCH: Final = 5  # rounds that are added at a time
_LEAST_SHARE: Final = 0.2  # of the longest duration of rounds, before which they do not end by their precision


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """Times of one model.

    Attributes:
        name: name of the model.
        path: its ONNX file; None where a module was run.
        times_ms: one time per round, in milliseconds per inference; each is the mean of `runs_per_sample` runs.
        runs_per_sample: inferences in a row that make one time.
        confidence: of the interval, between 0 and 1.
        seed: of the bootstrap.

    Raises:
        ArgumentError: there is no time, or one is not a positive finite number.
    """

    name: str
    path: Path | None
    times_ms: tuple[float, ...]
    runs_per_sample: int = 1
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse times that have no median."""
        if not self.times_ms or not all(math.isfinite(time_ms) and time_ms > 0 for time_ms in self.times_ms):
            raise ArgumentError(
                f"times_ms of {self.name!r} must be positive finite numbers, but got {self.times_ms!r}."
            )

    @property
    def median_ms(self) -> float:
        """Median time of one inference, in milliseconds."""
        return float(np.median(self.times_ms))

    @property
    def interval_ms(self) -> tuple[float, float]:
        """Percentile bootstrap interval of the median, in milliseconds (Efron and Tibshirani 1993, chapter 13).

        Blocks of consecutive rounds are drawn, each an eighth of them, that go on with the first round behind the last
        (Politis and Romano 1992): what disturbs a machine lasts for more than a round.
        """
        times_ms = np.asarray(self.times_ms)
        medians = np.median(times_ms[_resamples(len(times_ms), self.seed)], axis=1)
        return _percentile_interval(medians, self.confidence)

    @property
    def iqr_ms(self) -> float:
        """Distance between the quartiles, in milliseconds."""
        low, high = np.percentile(self.times_ms, (25, 75))
        return float(high - low)


@dataclass(frozen=True, slots=True)
class LatencyComparison:
    """Times of several models, taken in the same rounds.

    Attributes:
        results: name -> times; all have the same number of rounds, and time i of each is from round i.
        baseline: the name that the others are compared with.
        batch: size of the first dimension of the inputs.
        threads: intra-op threads of every model.
        runtime: name and version of the runtime, and its execution provider unless that is the CPU's.
        cpu: name of the processor.

    Raises:
        ArgumentError: there is no result, the baseline is not among them, or the numbers of rounds differ.
    """

    results: Mapping[str, LatencyResult]
    baseline: str
    batch: int = 1
    threads: int = 1
    runtime: str = f"onnxruntime {onnxruntime.__version__}"
    cpu: str = "unknown"

    def __post_init__(self) -> None:
        """Freeze the mapping and check that rounds can be paired."""
        object.__setattr__(self, "results", MappingProxyType(dict(self.results)))
        if self.baseline not in self.results:
            raise ArgumentError(
                f"baseline {self.baseline!r} is none of the results: {', '.join(self.results) or 'none'}."
            )
        rounds = {name: len(result.times_ms) for name, result in self.results.items()}
        if len(set(rounds.values())) > 1:
            raise ArgumentError(f"all models must have the same number of rounds, but got {rounds}.")

    def __getitem__(self, name: str) -> LatencyResult:
        if not isinstance(name, str) or name not in self.results:
            raise ArgumentError(f"no model is called {quote(name)}. Measured: {', '.join(self.results)}.")
        return self.results[name]

    def speedup(self, name: str) -> float:
        """Return how many times faster a model is than the baseline: the ratio of the medians.

        Raises:
            ArgumentError: no model has this name.
        """
        return self[self.baseline].median_ms / self[name].median_ms

    def speedup_interval(self, name: str) -> tuple[float, float]:
        """Return the interval of the speed-up, by a bootstrap over blocks of rounds, which keeps both models paired.

        Raises:
            ArgumentError: no model has this name.
        """
        result, baseline = self[name], self[self.baseline]
        rounds = _resamples(len(result.times_ms), result.seed)
        medians = np.median(np.asarray(result.times_ms)[rounds], axis=1)
        ratios = np.median(np.asarray(baseline.times_ms)[rounds], axis=1) / medians
        return _percentile_interval(ratios, result.confidence)

    def uncertainty(self, name: str) -> float:
        """Return the standard error of the speed-up, as a share of it; infinite after one round.

        It is that of eight blocks of consecutive rounds, or as many as there are rounds: what slows several rounds in a
        row down counts once.

        Raises:
            ArgumentError: no model has this name.
        """
        return _standard_error(self[self.baseline].times_ms, self[name].times_ms)

    def is_faster(self, name: str) -> bool:
        """Check that the whole interval of the speed-up lies above 1.

        Raises:
            ArgumentError: no model has this name.
        """
        return self.speedup_interval(name)[0] > 1

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the figures, one sentence each: models that are not faster, and noisy times."""
        notes = []
        for name in self.results:
            low, high = self.speedup_interval(name)
            if name != self.baseline and low <= 1:
                verdict = "is slower than" if high < 1 else "is not measurably faster than"
                ratio = f"{self.speedup(name):.2f} ({low:.2f} to {high:.2f})"
                notes.append(f"{name!r} {verdict} {self.baseline!r}: speed-up {ratio}.")
        for name, result in self.results.items():
            share = result.iqr_ms / result.median_ms
            if share > _NOISY_IQR:
                notes.append(
                    f"The times of {name!r} are noisy: their quartiles are {share:.0%} of the median apart. "
                    f"Close other programs, or raise rounds or min_seconds."
                )
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold, raw times in milliseconds included."""
        return {
            "baseline": self.baseline,
            "batch": self.batch,
            "threads": self.threads,
            "runtime": self.runtime,
            "cpu": self.cpu,
            "notes": list(self.notes),
            "results": {
                name: {
                    "path": None if result.path is None else str(result.path),
                    "median_ms": result.median_ms,
                    "interval_ms": list(result.interval_ms),
                    "iqr_ms": result.iqr_ms,
                    "confidence": result.confidence,
                    "seed": result.seed,
                    "speedup": self.speedup(name),
                    "speedup_interval": list(self.speedup_interval(name)),
                    "is_faster": self.is_faster(name),
                    "runs_per_sample": result.runs_per_sample,
                    "times_ms": list(result.times_ms),
                }
                for name, result in self.results.items()
            },
        }

    def __str__(self) -> str:
        """Return a table of 100 columns, with the notes below it."""
        first = self[self.baseline]
        table = Table(
            title=f"{self.runtime}, {self.cpu}, {self.threads} thread{'s' * (self.threads > 1)}, batch {self.batch}"
        )
        table.add_column("model")
        headings = (
            "median ms",
            f"{first.confidence:.0%} interval",
            "IQR ms",
            "speed-up",
            f"{first.confidence:.0%} interval",
        )
        for heading in headings:
            table.add_column(heading, justify="right")
        for name, result in self.results.items():
            cells = (f"{result.median_ms:.3f}", _format_interval(result.interval_ms, 3), f"{result.iqr_ms:.3f}")
            table.add_row(name, *cells, f"{self.speedup(name):.2f}", _format_interval(self.speedup_interval(name), 2))
        console = Console(file=io.StringIO(), width=100, color_system=None, markup=False)
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip("\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """A way of timing models against each other.

    Attributes:
        rounds: times kept per model, at least.
        warmup: inferences per model before the first round, 3 at least.
        min_seconds: shortest duration of one sample; shorter inferences are run several times in a row and averaged.
        precision: standard error of the speed-ups over the first model, as a share, at which rounds end. That counts
            after a fifth of `most_seconds`, since disturbances last for seconds.
        most_seconds: time after which no more rounds are added to the first ones.
        confidence: of all intervals, between 0 and 1.
        seed: of the order and of the bootstrap.
        progress: see `torchshear.collect`; what is done are rounds.
    """

    rounds: int
    warmup: int
    min_seconds: float
    precision: float = math.inf
    most_seconds: float = 0.0
    confidence: float = 0.95
    seed: int = 0
    progress: Progress = False

    def time(self, runs: Mapping[str, Run], paths: Mapping[str, Path | None]) -> dict[str, LatencyResult]:
        """Time models in rounds, each once a round and in an order drawn anew.

        Args:
            runs: name -> one inference.
            paths: name -> its ONNX file, None for a module.

        Raises:
            LatencyError: a model fails on its inputs.
        """
        counts = {name: self._runs_of_a_sample(name, run) for name, run in runs.items()}
        times_ms: dict[str, list[float]] = {name: [] for name in runs}
        names, order = list(runs), np.random.default_rng(self.seed)
        start = time.perf_counter()
        with without_garbage_collection():
            while (n_rounds := self._rounds_to_add(times_ms, time.perf_counter() - start)) > 0:
                for _ in with_progress(range(n_rounds), n_rounds, "measuring", self.progress):
                    for index in order.permutation(len(names)):
                        name = names[index]
                        times_ms[name].append(_mean_ms(runs[name], counts[name]))
        return {
            name: LatencyResult(name, paths[name], tuple(times_ms[name]), counts[name], self.confidence, self.seed)
            for name in names
        }

    def _rounds_to_add(self, times_ms: Mapping[str, Sequence[float]], seconds: float) -> int:
        """Return how many rounds are made next, behind those that took some seconds; 0 at the end."""
        first = next(iter(times_ms.values()))
        if not first:
            return self.rounds
        if seconds >= self.most_seconds:
            return 0
        error = max(_standard_error(first, times) for times in times_ms.values())
        return 0 if error <= self.precision and seconds >= _LEAST_SHARE * self.most_seconds else _BATCH

    def _runs_of_a_sample(self, name: str, run: Run) -> int:
        """Warm up, and give the number of runs that last `min_seconds` together."""
        try:
            run()
        except Exception as error:  # exceptions of onnxruntime, and of modules, share no base but Exception
            raise LatencyError(f"{name!r} fails on the inputs it was given: {error_reason(error)}") from error
        times_ms = [_mean_ms(run, 1) for _ in range(max(self.warmup, 3))]
        return max(1, math.ceil(self.min_seconds * 1e3 / max(float(np.median(times_ms)), 1e-3)))


def _mean_ms(run: Run, n_runs: int) -> float:
    """Run `n_runs` times in a row and give the milliseconds of one."""
    start = time.perf_counter_ns()
    for _ in range(n_runs):
        run()
    return (time.perf_counter_ns() - start) / n_runs / 1e6


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector out of the times, as the standard library's timeit does."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _standard_error(baseline_ms: Sequence[float], times_ms: Sequence[float]) -> float:
    """Return the standard error of a speed-up, as a share of it, from blocks of consecutive rounds."""
    n_blocks = min(_BLOCKS, len(times_ms))
    if n_blocks == 1:
        return math.inf
    baseline, own = (np.array_split(np.asarray(times), n_blocks) for times in (baseline_ms, times_ms))
    speedups = np.array([np.median(before) / np.median(now) for before, now in zip(baseline, own, strict=True)])
    return float(np.std(speedups, ddof=1) / np.mean(speedups) / math.sqrt(n_blocks))


def _resamples(n_times: int, seed: int) -> np.ndarray:
    """Draw rounds for every bootstrap sample in blocks of consecutive ones: indices of shape (resamples, n_times)."""
    size = math.ceil(n_times / _BLOCKS)
    starts = np.random.default_rng(seed).integers(0, n_times, (_RESAMPLES, math.ceil(n_times / size), 1))
    return ((starts + np.arange(size)) % n_times).reshape(_RESAMPLES, -1)[:, :n_times]


def _percentile_interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the central interval that holds a share `confidence` of the values."""
    low, high = np.quantile(values, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


def _format_interval(interval: tuple[float, float], digits: int) -> str:
    """Write an interval for the table."""
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"
