import gc
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from torchshear.errors import ArgumentError, LatencyError
from torchshear.speedup.latency import _comparison
from torchshear.speedup.latency._compare import compare_latency
from torchshear.speedup.latency._comparison import LatencyComparison, LatencyResult, Rounds

BATCHED = ("batch", 4)


def write_model(path, operator="Relu", domain="", dtype=TensorProto.FLOAT, shape=BATCHED, name="x"):
    node = helper.make_node(operator, [name], ["y"], domain=domain)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, shape)],
    )
    opsets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def comparison(**times_ms):
    results = {name: LatencyResult(name, f"{name}.onnx", tuple(times)) for name, times in times_ms.items()}
    return LatencyComparison(results, next(iter(results)), cpu="test processor")


def quick(models, **options):
    return compare_latency(models, **({"rounds": 4, "warmup": 0, "min_seconds": 0.0} | options))


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "relu.onnx")


def test_real_models_are_measured(tmp_path, model):
    other = write_model(tmp_path / "exp.onnx", "Exp")
    seen = []
    result = compare_latency(
        {"dense": model, "small": other},
        batch=3,
        rounds=6,
        warmup=2,
        min_seconds=0.0005,
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(done, 6, "measuring") for done in range(1, 7)]
    assert list(result.results) == ["dense", "small"]
    assert (result.baseline, result.batch, result.threads) == ("dense", 3, 1)
    for entry in result.results.values():
        assert len(entry.times_ms) == 6
        assert min(entry.times_ms) > 0
        assert entry.runs_per_sample > 1
    assert result["small"].path == other
    assert result.speedup("small") == pytest.approx(result["dense"].median_ms / result["small"].median_ms)
    assert result.runtime.startswith("onnxruntime ")
    assert result.cpu
    assert gc.isenabled()


def test_given_inputs_are_used(model):
    result = quick({"dense": model}, inputs={"x": np.ones((5, 4), np.float32)})
    assert result.batch == 5


@pytest.mark.parametrize(
    "dtype", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL]
)
def test_inputs_of_every_type_are_made(tmp_path, dtype):
    path = write_model(tmp_path / "identity.onnx", "Identity", dtype=dtype)
    assert quick({"dense": path}, batch=2).batch == 2


@pytest.mark.parametrize("progress", [False, lambda done, rounds, what: 1 / 0])
def test_garbage_collection_is_restored(model, progress):
    if not progress:
        quick({"dense": model})
    else:
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            quick({"dense": model}, progress=progress)
    assert gc.isenabled()


def test_statistics_of_one_model():
    result = LatencyResult("a", "a.onnx", (1.0, 2.0, 3.0, 4.0, 100.0))
    assert result.median_ms == 3.0
    assert result.iqr_ms == 2.0
    low, high = result.interval_ms
    assert 1.0 <= low <= 3.0 <= high <= 100.0
    assert result.interval_ms == (low, high)


class Clock:
    """A clock that stands still but for what is measured, by times of 0.1 s of which some are longer."""

    def __init__(self, noise):
        self.seconds, self.noise, self.rng = 0.0, noise, np.random.default_rng(0)

    def perf_counter(self):
        return self.seconds

    def measure(self, run, n_runs):
        self.seconds += 0.1
        return run() * (1 + self.noise * self.rng.random())


@pytest.mark.parametrize(
    ("noise", "most_seconds", "rounds"),
    [(0.0, 0.0, 8), (0.0, 3.0, 8), (0.0, 10.0, 13), (0.1, 100.0, None), (0.5, 6.0, 33), (0.5, 0.0, 8)],
)
def test_rounds_end_when_speedups_are_known_or_time_is_up(monkeypatch, noise, most_seconds, rounds):
    clock = Clock(noise)
    monkeypatch.setattr(_comparison, "time", clock)
    monkeypatch.setattr(_comparison, "_mean_ms", clock.measure)
    measuring = Rounds(rounds=8, warmup=3, min_seconds=0.0, precision=0.005, most_seconds=most_seconds)
    results = measuring.time({"dense": lambda: 3.0, "small": lambda: 2.0}, {"dense": None, "small": None})
    found = LatencyComparison(results, "dense")
    assert len(found["dense"].times_ms) == len(found["small"].times_ms)
    if rounds is None:
        assert 0 < found.uncertainty("small") <= 0.005
        assert found.speedup("small") == pytest.approx(1.5, rel=0.015)
    else:
        assert len(found["small"].times_ms) == rounds


def test_intervals_are_wider_where_slow_rounds_follow_each_other():
    slow, in_turn = np.repeat([1.0, 1.3], 40), np.tile([1.0, 1.3], 40)
    rng = np.random.default_rng(0)
    widths = []
    for times in (in_turn, slow):
        low, high = comparison(dense=np.ones(80), small=times + 0.2 * rng.random(80)).speedup_interval("small")
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_uncertainty_counts_slow_spells_once():
    """Of as many slow rounds those in a row say less of the median, which the interval over single rounds overlooks."""
    slow = np.repeat([1.0, 1.3], 40)
    in_turn = np.tile([1.0, 1.3], 40)
    alone, spells = (comparison(dense=np.ones(80), small=2 * times).uncertainty("small") for times in (in_turn, slow))
    assert alone == 0
    assert spells == pytest.approx(np.std(1 / slow, ddof=0) * np.sqrt(8 / 7) / np.mean(1 / slow) / np.sqrt(8))
    assert comparison(dense=[1.0], small=[1.0]).uncertainty("small") == np.inf
    with pytest.raises(ArgumentError, match="no model is called 'other'"):
        comparison(dense=[1.0]).uncertainty("other")


def test_constant_times_have_no_spread():
    result = LatencyResult("a", "a.onnx", (2.5,) * 8)
    assert (result.median_ms, result.iqr_ms, result.interval_ms) == (2.5, 0.0, (2.5, 2.5))


def test_the_interval_of_the_median_covers_it():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(100):
        times = tuple(10 + generator.exponential(1.0, 40))
        low, high = LatencyResult("a", "a.onnx", times, seed=trial).interval_ms
        hits += low <= 10 + np.log(2) <= high
    assert 88 <= hits <= 100


def test_a_wider_confidence_gives_a_wider_interval():
    times = tuple(np.random.default_rng(1).uniform(1, 2, 30))
    (low_50, high_50), (low_99, high_99) = (
        LatencyResult("a", "a.onnx", times, confidence=share).interval_ms for share in (0.5, 0.99)
    )
    assert low_99 < low_50 < high_50 < high_99


def test_speedup_uses_that_rounds_are_paired():
    load = np.random.default_rng(2).uniform(1.0, 3.0, 40)
    result = comparison(dense=2 * load, small=load)
    assert result.speedup("small") == pytest.approx(2.0)
    low, high = result.speedup_interval("small")
    assert low == pytest.approx(2.0)
    assert high == pytest.approx(2.0)
    assert result.is_faster("small")
    assert result.speedup_interval("dense") == (1.0, 1.0)
    assert not result.is_faster("dense")


def test_notes_name_slower_undecided_and_noisy_models():
    steady = np.linspace(1.0, 1.01, 20)
    result = comparison(
        dense=steady, slow=2 * steady, same=steady[::-1], fast=steady / 2, noisy=np.linspace(0.1, 0.5, 20)
    )
    slow, same, noisy = result.notes
    assert slow == "'slow' is slower than 'dense': speed-up 0.50 (0.50 to 0.50)."
    assert same.startswith("'same' is not measurably faster than 'dense': speed-up 1.00")
    assert noisy.startswith("The times of 'noisy' are noisy: their quartiles are 67% of the median apart.")


def test_the_dictionary_is_json():
    result = comparison(dense=[2.0, 2.0, 2.0], small=[1.0, 1.0, 1.0])
    data = json.loads(json.dumps(result.to_dict()))
    assert data["baseline"] == "dense"
    assert data["cpu"] == "test processor"
    assert data["runtime"].startswith("onnxruntime ")
    assert data["results"]["small"]["times_ms"] == [1.0, 1.0, 1.0]
    assert data["results"]["small"]["speedup"] == 2.0
    assert data["results"]["small"]["is_faster"] is True
    assert data["notes"] == []


def test_the_text_is_a_table_with_notes():
    text = str(comparison(dense=[2.0] * 5, slow=[4.0] * 5))
    assert "onnxruntime" in text
    assert "test processor, 1 thread, batch 1" in text
    assert "2.000 to 2.000" in text
    assert "'slow' is slower than 'dense': speed-up 0.50" in text
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LatencyResult("a", "a.onnx", ()), "times_ms of 'a' must be positive finite numbers"),
        (lambda: LatencyResult("a", "a.onnx", (1.0, 0.0)), "must be positive"),
        (lambda: LatencyResult("a", "a.onnx", (float("nan"),)), "must be positive finite"),
        (lambda: LatencyComparison({}, "a"), "baseline 'a' is none of the results: none"),
        (lambda: comparison(a=[1.0], b=[1.0, 2.0]), "same number of rounds, but got {'a': 1, 'b': 2}"),
        (lambda: comparison(a=[1.0])["b"], "no model is called 'b'. Measured: a"),
        (lambda: comparison(a=[1.0]).speedup("b"), "no model is called 'b'"),
    ],
)
def test_impossible_results_are_refused(build, message):
    with pytest.raises(ArgumentError, match=message):
        build()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": {}}, "models is empty"),
        ({"threads": 0}, "threads must be a whole number of at least 1, but got threads=0"),
        ({"threads": True}, "but got threads=True"),
        ({"rounds": 0}, "rounds must be"),
        ({"batch": -1}, "batch must be"),
        ({"warmup": -1}, "warmup must be a whole number of at least 0"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1 exclusive, but got confidence=1.0"),
        ({"min_seconds": -0.1}, "min_seconds must be"),
        ({"min_seconds": float("inf")}, "min_seconds must be"),
    ],
)
def test_bad_arguments_are_refused(model, options, message):
    with pytest.raises(ArgumentError, match=message):
        compare_latency(**({"models": {"dense": model}} | options))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(LatencyError, match=r"no file at '.*absent.onnx'"):
        quick({"dense": tmp_path / "absent.onnx"})


@pytest.mark.parametrize("content", [b"", b"this is no model", bytes(range(256))])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "text.onnx"
    path.write_bytes(content)
    with pytest.raises(LatencyError, match=r"does not run '.*text.onnx' on the CPU: "):
        quick({"dense": path})


@pytest.mark.parametrize(
    ("operator", "domain", "dtype", "message"),
    [
        ("Shear", "com.example", TensorProto.FLOAT, "com.example:Shear"),
        ("Tan", "", TensorProto.DOUBLE, "Could not find an implementation for Tan"),
    ],
)
def test_an_operator_that_does_not_run_is_named(tmp_path, operator, domain, dtype, message):
    path = write_model(tmp_path / "model.onnx", operator, domain, dtype)
    with pytest.raises(LatencyError, match=message):
        quick({"dense": path})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"z": np.ones((1, 4), np.float32)}, r"'dense' takes the inputs \['x'\], but got \['z'\]"),
        ({}, r"takes the inputs \['x'\], but got \[\]"),
        ({"x": np.ones((1, 5), np.float32)}, r"of shape \['batch', 4\], but got float32 of shape \[1, 5\]"),
        ({"x": np.ones(4, np.float32)}, r"but got float32 of shape \[4\]"),
        ({"x": np.ones((1, 4))}, r"is tensor\(float\).*but got float64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, inputs, message):
    with pytest.raises(LatencyError, match=message):
        quick({"dense": model}, inputs=inputs)


def test_a_free_dimension_asks_for_inputs(tmp_path):
    path = write_model(tmp_path / "free.onnx", shape=("batch", "length"))
    with pytest.raises(LatencyError, match=r"inputs={'x': array"):
        quick({"dense": path})
    assert quick({"dense": path}, inputs={"x": np.ones((2, 9), np.float32)}).batch == 2


def test_a_type_that_cannot_be_made_asks_for_inputs(tmp_path):
    path = write_model(tmp_path / "text.onnx", "Identity", dtype=TensorProto.STRING)
    with pytest.raises(LatencyError, match=r"it is a tensor\(string\)"):
        quick({"dense": path})


def test_a_fixed_batch_cannot_be_changed(tmp_path):
    path = write_model(tmp_path / "fixed.onnx", shape=(1, 4))
    assert quick({"dense": path}).batch == 1
    with pytest.raises(LatencyError, match="no input of 'dense' takes a batch of 8"):
        quick({"dense": path}, batch=8)


def test_models_with_other_inputs_are_not_compared(tmp_path, model):
    other = write_model(tmp_path / "other.onnx", shape=("batch", 5))
    with pytest.raises(
        LatencyError, match=r"'small' takes \['float32\[1, 5\]'\], but 'dense' takes \['float32\[1, 4\]'\]"
    ):
        quick({"dense": model, "small": other})


def test_input_names_may_differ(tmp_path, model):
    other = write_model(tmp_path / "other.onnx", name="image")
    assert list(quick({"dense": model, "small": other}).results) == ["dense", "small"]
