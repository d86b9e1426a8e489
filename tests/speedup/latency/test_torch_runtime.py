"""Modules run by torch, eagerly and compiled: what is timed, with which settings, and what is put back."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchshear
from torchshear.dependency import ChannelGroups
from torchshear.errors import ArgumentError, LatencyError, WeightError
from torchshear.speedup.latency import Device, LatencyTable, _candidates, measure_staircase, measure_table
from torchshear.speedup.latency._candidates import Candidates
from torchshear.speedup.latency._comparison import LatencyResult, Rounds
from torchshear.speedup.latency._device import cpu_name


@torch.library.custom_op("torchshear_tests::doze", mutates_args=())
def doze(x: torch.Tensor) -> torch.Tensor:
    """An operator that takes five milliseconds at least."""
    time.sleep(0.005)
    return x.clone()


@doze.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Net(nn.Module):
    """Two convolutions and a layer; what happens in its forward can be watched."""

    def __init__(self, watch: Callable[[], object] = lambda: None, width: int = 16) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, width, 3), nn.Conv2d(width, 8, 1), nn.Linear(8, 5)
        self.watch = watch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.watch()
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


X = torch.randn(1, 3, 10, 10)


def groups_of(model: nn.Module) -> ChannelGroups:
    return torchshear.analyze(torchshear.trace(model, X))


def candidates(model: nn.Module, folder: Path, runtime: str = "torch", **options: Any) -> Candidates:
    """Candidates of a network; its analysis is that of one that is not watched."""
    return Candidates(model, groups_of(Net().eval()), X, None, Device(runtime=runtime, **options), folder)


def test_operators_are_timed_with_the_shapes_of_what_they_read_and_write(tmp_path: Path) -> None:
    profile = candidates(Net(), tmp_path, batch=2).dense.profile()
    found = {one.name: one for one in profile.kernels}
    first, second, head = found["aten.conv2d"], found["aten.conv2d#1"], found["aten.linear"]
    assert [shape for _, shape in first.inputs] == [(2, 3, 10, 10), (16, 3, 3, 3), (16,)]
    assert first.outputs == (("float32", (2, 16, 8, 8)),)
    assert [shape for _, shape in second.inputs] == [(2, 16, 8, 8), (8, 16, 1, 1), (8,)]
    assert head.outputs == (("float32", (2, 5)),)
    assert {"aten.relu", "aten.relu#1", "aten.mean"} <= set(found)
    assert all(one.ms >= 0 for one in profile.kernels)
    assert profile.total_ms == profile.whole_ms


def test_the_time_of_an_operator_is_its_own(tmp_path: Path) -> None:
    class Sleepy(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(doze(x))

    profile = candidates(Sleepy(), tmp_path).dense.profile()
    found = {one.operator: one.ms for one in profile.kernels}
    assert found["torchshear_tests.doze"] >= 4.9  # the least of many: that of the mode is taken off
    assert profile.total_ms >= 5
    assert sum(found.values()) - found["torchshear_tests.doze"] < 5


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_threads_and_modes_hold_for_the_runs_and_are_put_back(tmp_path: Path, threads: int) -> None:
    seen = set()

    def watch() -> None:
        seen.add((torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    made = candidates(Net(watch), tmp_path, threads=2)
    made.compare(made.dense, 2)
    made.dense.profile()
    assert seen == {(2, True, False)}
    assert torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()


def test_threads_are_put_back_where_a_model_fails(tmp_path: Path, threads: int) -> None:
    def watch() -> None:
        raise OverflowError("too much")

    with pytest.raises(LatencyError, match=r"dense model does not run with runtime='torch' at batch 4: Overflow.*too"):
        candidates(Net(watch), tmp_path, batch=4)
    assert torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("patience", [1.0, 0.3])
def test_rounds_go_on_until_speedups_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    asked: list[Rounds] = []

    class Watched(Rounds):
        def time(self, *args: Any) -> dict[str, LatencyResult]:
            asked.append(self)
            return super().time(*args)

    made = candidates(Net(lambda: None), tmp_path)
    monkeypatch.setattr(_candidates, "Rounds", Watched)
    monkeypatch.setattr(_candidates, "_MOST_SECONDS", 0.1)
    made.compare(made.dense, 6, patience)
    assert (asked[0].rounds, asked[0].precision, asked[0].most_seconds) == (6, 0.005, patience * 0.1)


def test_models_are_timed_in_the_same_rounds(tmp_path: Path) -> None:
    calls: list[str] = []
    made = candidates(Net(lambda: calls.append("dense")), tmp_path, batch=3)
    other = made.prepare(Net(lambda: calls.append("other")), "other")
    calls.clear()
    comparison = made.compare_all({"other": other}, rounds=6)
    counts = {name: result.runs_per_sample for name, result in comparison.results.items()}
    warm = 4  # one that may fail, and three that are timed
    assert calls[: 2 * warm] == ["dense"] * warm + ["other"] * warm
    rest = calls[2 * warm :]
    for _ in range(6):
        size = sum(counts.values())
        assert sorted(rest[:size]) == sorted(["dense"] * counts["dense"] + ["other"] * counts["other"])
        rest = rest[size:]
    assert not rest
    assert comparison.runtime == f"torch {torch.__version__}"
    assert (comparison.cpu, comparison.batch, comparison.threads) == (cpu_name(), 3, 1)
    assert comparison["other"].path is None
    assert comparison.to_dict()["results"]["other"]["path"] is None


def test_the_model_that_is_given_is_not_run(tmp_path: Path) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            self.last = super().forward(x)
            return self.last

    model = Counting().train()
    made = candidates(model, tmp_path)
    made.compare(made.dense, 2)
    assert model.count == 0
    assert not hasattr(model, "last")
    assert model.training


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="on the meta device"):
        candidates(Net().to("meta"), tmp_path)


class Telling(Net):
    """Gives twice as much where torch compiled it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2.0 if torch.compiler.is_compiling() else 1.0)


@pytest.mark.zoo
def test_candidates_are_compiled_however_many_there_are(tmp_path: Path) -> None:
    """Candidates share the code of one class, of which torch compiles only so many variants by itself."""
    model = Telling()
    with torch._dynamo.config.patch(recompile_limit=2):
        made = candidates(model, tmp_path, "torch.compile")
        for small in (*(Telling(width=width) for width in (4, 8, 12)), model):
            ready = made.dense if small is model else made.prepare(small, "candidate")
            with ready.running() as run:
                assert torch.allclose(run(), 2 * small(X), atol=1e-5)
    kernels = made.dense.profile().kernels
    assert [one.operator for one in kernels].count("aten.conv2d") == 2  # those of the module itself


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency"


@pytest.mark.parametrize("runtime", ["torch", pytest.param("torch.compile", marks=pytest.mark.zoo)])
def test_a_table_is_measured_and_kept(runtime: str, folder: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)).eval()
    x, device = torch.randn(1, 3, 16, 16), Device(runtime=runtime)

    def measure() -> LatencyTable:
        return measure_table(model, x, device=device, align=16, probes=4, progress=False)

    table = measure()
    assert {kernel.operator for kernel in table.kernels} >= {"aten.conv2d", "aten.linear", "aten.relu"}
    assert table.known_share > 0.9
    assert 0 < table.predict_ms({group.name: 16 for group in table.groups}) < table.dense_ms
    assert table.identity["runtime"] == f"{runtime} {torch.__version__}"
    assert "provider" not in table.identity
    assert measure().form.terms == table.form.terms  # read from the cache
    assert len([path for path in folder.iterdir() if path.suffix == ".json"]) == 1
    table.save(folder / "table.json")
    assert LatencyTable.load(folder / "table.json").device == device


def test_runtimes_have_identities_of_their_own() -> None:
    found = {Device(runtime=runtime).identity()["runtime"] for runtime in ("onnxruntime", "torch", "torch.compile")}
    assert len(found) == 3


def test_without_a_compiler_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", (None, "/no/such/compiler"))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(ArgumentError, match=r"needs a C\+\+ compiler, and torch finds none. Install g\+\+ or clang"):
        Device(runtime="torch.compile")
    assert Device(runtime="torch").runtime == "torch"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"runtime": "torch", "provider": "AzureExecutionProvider"}, "providers are onnxruntime's. Leave it out"),
        ({"runtime": "pytorch"}, "runtime"),
    ],
)
def test_devices_that_cannot_be_are_refused(given: dict[str, str], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        Device(**given)


def test_a_staircase_is_of_onnxruntime() -> None:
    with pytest.raises(ArgumentError, match="runtime='torch': a staircase is measured with models of onnxruntime"):
        measure_staircase(Device(runtime="torch"))
    with pytest.raises(ArgumentError, match="as align='auto'"):
        torchshear.prune(Net().eval(), X, target_latency=0.5, device=Device(runtime="torch"), align="measured")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("runtime", ["torch", "torch.compile"])
def test_a_model_on_a_gpu_is_measured_there(runtime: str, folder: Path) -> None:
    model, x = Net().eval().cuda(), X.cuda()
    result = torchshear.prune(model, x, ratio=0.5, device=Device(runtime=runtime, batch=2))
    assert result.latency is not None
    assert result.latency.cpu == torch.cuda.get_device_name(0)
    table = measure_table(model, x, device=Device(runtime=runtime), probes=4, progress=False)
    assert table.identity["inputs"] == [f"float32[3, 10, 10] on {torch.cuda.get_device_name(0)}"]
    assert table.dense_ms > 0
