"""Storages of a search: several processes, kills, resumption, and what is refused."""

import gc
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchshear
from tests.searching.servers import serve
from tests.searching.spaces import layers
from torchshear.errors import ArgumentError, SearchError
from torchshear.searching import Proposal, _study_store
from torchshear.searching import _storage as storages
from torchshear.searching._candidate import Score
from torchshear.searching._storage import claim_study, open_study
from torchshear.searching._study_store import StudyStore

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore::Warning:optuna", "ignore:The existing lock file")
FORK = multiprocessing.get_context("fork")
KINDS = ("journal", "sqlite", "postgresql", "grpc")
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def batches(n_batches: int, size: int) -> list[list[tuple[int, Proposal]]]:
    return [[(b * size + i, Proposal((b, i), label=f"{b}.{i}")) for i in range(size)] for b in range(n_batches)]


def value_of(proposal: Proposal) -> float:
    return proposal.widths[0] + proposal.widths[1] / 100


def contribute(storage: str, n_batches: int, size: int, seconds: float, answers: Any, most: int | None = None) -> None:
    """Run a sequence of batches as one process of several does, and send back the scores and how many it made.

    With `most`, it never ends a score beyond so many.
    """

    def score(proposal: Proposal, _: object) -> Score:
        time.sleep(seconds if most is None or store.n_scored < most else 600)
        return Score(value_of(proposal), seconds)

    store = StudyStore(open_study(storage), storage)
    found = [one.value for batch in batches(n_batches, size) for one in store.run(batch, score)]
    answers.put((found, store.n_scored))


def start(*arguments: Any) -> Any:
    process = FORK.Process(target=contribute, args=arguments)
    process.start()
    return process


def outcomes_by_step(storage: str) -> dict[int, list[float]]:
    store = StudyStore(open_study(storage), storage)
    return {step: [t.value for t in some if store._outcome(t)] for step, some in store._of_steps().items()}


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address of a storage for workers, and one at which the same can be looked at."""
    with serve(request.param, tmp_path) as addresses, warnings.catch_warnings():
        yield addresses
        warnings.simplefilter("ignore", ResourceWarning)  # of connections that are pooled until their study is gone
        gc.collect()


def test_processes_share_the_work_and_agree(storage: tuple[str, str]) -> None:
    (address, looked_at), answers = storage, FORK.Queue()
    open_study(looked_at)
    workers = [start(address, 3, 4, 0.02, answers) for _ in range(3)]
    told = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    expected = [value_of(proposal) for batch in batches(3, 4) for _, proposal in batch]
    assert [scores for scores, _ in told] == [expected] * 3
    assert sum(n for _, n in told) == 12
    assert outcomes_by_step(looked_at) == {step: [value] for step, value in enumerate(expected)}


def test_no_trial_is_lost_or_counted_twice_when_workers_are_killed(storage: tuple[str, str]) -> None:
    (address, looked_at), answers, chance = storage, FORK.Queue(), random.Random(0)
    study = open_study(looked_at)
    for at_work in (3, 1, 0, 0, 0, 0):  # kills while so many trials run, which do not end before, and at any time
        workers = [start(address, 4, 5, 600.0 if at_work else 0.05, answers, 1) for _ in range(3)]
        while sum(trial.state.name == "RUNNING" for trial in study.get_trials()) < at_work:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.3))
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
    before = outcomes_by_step(looked_at)
    last = start(address, 4, 5, 0.0, answers)
    scores, n_scored = answers.get(timeout=120)
    last.join()
    expected = [value_of(proposal) for batch in batches(4, 5) for _, proposal in batch]
    assert scores == expected
    assert outcomes_by_step(looked_at) == {step: [value] for step, value in enumerate(expected)}
    assert n_scored == 20 - sum(map(len, before.values())) > 0
    states = [trial.state.name for trial in open_study(looked_at).get_trials()]
    assert "FAIL" in states  # some were given up
    assert not {"RUNNING", "WAITING"} & set(states)


def test_a_journal_does_not_grow_when_it_is_opened(tmp_path: Path) -> None:
    storage = f"journal://{tmp_path}/search.log"
    open_study(storage)
    before = (tmp_path / "search.log").read_bytes()
    assert open_study(storage).study_name == open_study(storage).study_name
    assert (tmp_path / "search.log").read_bytes() == before


def test_three_workers_are_faster_than_one(tmp_path: Path) -> None:
    """Long evaluations that use no processor: 12 of 0.5 s each."""
    seconds = []
    for count in (1, 3):
        storage, answers = f"journal://{tmp_path}/{count}.log", FORK.Queue()
        open_study(storage)
        began = time.perf_counter()
        workers = [start(storage, 1, 12, 0.5, answers) for _ in range(count)]
        for worker in workers:
            answers.get(timeout=120)
            worker.join()
        seconds.append(time.perf_counter() - began)
    assert seconds[0] > 1.8 * seconds[1]


def test_a_worker_without_signs_of_life_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"journal://{tmp_path}/search.log"
    monkeypatch.setattr(_study_store, "BEAT_SECONDS", 0.05)
    far, near = StudyStore(open_study(storage), storage), StudyStore(open_study(storage), storage)
    far._worker = "elsewhere:1:00000000"
    (batch,) = batches(1, 1)
    late: list[bool] = []

    def slow(proposal: Proposal, _: object) -> Score:
        monkeypatch.setattr(_study_store, "GRACE_SECONDS", 0.3)
        near._give_up_silent(near._of_steps())
        time.sleep(0.6)  # with signs of life
        near._give_up_silent(near._of_steps())
        late.append(any(trial.state.name == "FAIL" for trial in near._trials()))
        return Score(1.0, 0.0)

    assert [one.value for one in far.run(batch, slow)] == [1.0]
    assert late == [False]
    trial = far._take({}, {7: Proposal((1,))})
    assert near._take({}, {7: Proposal((1,))}) is None  # the earlier one counts
    assert trial is not None  # and then its process says nothing any more
    near._give_up_silent(near._of_steps())
    time.sleep(0.4)
    assert [one.value for one in near.run([(7, Proposal((1,)))], lambda *_: Score(2.0, 0.0))] == [2.0]
    far._work_at(*trial, lambda *_: Score(3.0, 0.0))  # it comes back, too late
    assert outcomes_by_step(storage)[7] == [2.0]


def test_a_process_that_is_stopped_gives_its_trial_up(tmp_path: Path) -> None:
    storage = f"journal://{tmp_path}/search.log"
    store = StudyStore(open_study(storage), storage)

    def stop(proposal: Proposal, _: object) -> Score:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(store.run(*batches(1, 1), stop))
    assert [trial.state.name for trial in store._trials()] == ["FAIL"]
    assert [one.value for one in store.run(*batches(1, 1), lambda *_: Score(1.0, 0.0))] == [1.0]


def test_a_worker_of_this_machine_that_has_ended_is_gone() -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = socket.gethostname()
    assert _study_store._is_gone(f"{host}:{int(ended.stdout)}:1")
    assert not _study_store._is_gone(f"{host}:{os.getpid()}:1")
    assert not _study_store._is_gone(f"{host}:1:1")
    assert not _study_store._is_gone(f"elsewhere:{int(ended.stdout)}:1")
    assert not _study_store._is_gone(None)


def closeness(model: nn.Module) -> float:
    with torch.no_grad():
        return -float((model(X) - layers(8, 24, 16, 3)(X)).square().mean())


def search(storage: Any, model: nn.Module | None = None, **options: Any) -> torchshear.searching.SearchResult:
    asked = {"evaluate": closeness, "method": "evolution", "ratio": 0.5, "trials": 6, "progress": False}
    return torchshear.search(
        layers(8, 24, 16, 3) if model is None else model, X[:2], storage=storage, **(asked | options)
    )


def never(model: nn.Module) -> float:
    raise AssertionError("nothing is to be evaluated")


def counting(evaluate: Callable[[nn.Module], float], stop_at: int) -> tuple[Callable[[nn.Module], float], list[int]]:
    seen: list[int] = []

    def counted(model: nn.Module) -> float:
        seen.append(len(seen))
        if len(seen) == stop_at:
            raise SystemExit  # as a process that is ended
        return evaluate(model)

    return counted, seen


def test_a_search_goes_on_from_its_storage_alone(tmp_path: Path) -> None:
    storage = f"journal://{tmp_path}/search.log"
    whole = search(None)
    stopping, _ = counting(closeness, 4)
    with pytest.raises(SystemExit):
        search(storage, evaluate=stopping)
    going_on, seen = counting(closeness, 100)
    resumed = search(storage, evaluate=going_on)
    assert len(seen) == 3  # of six
    assert [(one.widths, one.score) for one in resumed.trials] == [(one.widths, one.score) for one in whole.trials]
    again = search(storage, evaluate=never)
    assert again.best.widths == whole.best.widths
    assert "made again here" in str(again)
    assert again.result.verification.max_error < 1e-12
    assert closeness(again.result.model) == again.best.score
    longer = search(storage, trials=8)
    assert [one.widths for one in longer.trials[:6]] == [one.widths for one in whole.trials]
    assert len(longer.trials) == 8


def test_a_search_that_failed_is_started_anew(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/search.db"

    def fails(model: nn.Module) -> float:
        raise RuntimeError("a bug")

    with pytest.raises(SearchError, match="RuntimeError: a bug"):
        search(storage, evaluate=fails)
    assert len(search(storage).trials) == 6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, "seed is 0, here 1"),
        ({"method": "random"}, "method is"),
        ({"ratio": 0.4}, "budget is"),
        ({"model": layers(8, 24, 20, 3)}, "model is"),
        ({"finetune": lambda model: None}, "finetune is False, here True"),
        ({"model": "other weights"}, "weights is"),
    ],
)
def test_the_storage_of_another_search_is_refused(options: Any, match: str, tmp_path: Path) -> None:
    storage = f"journal://{tmp_path}/search.log"
    search(storage, trials=1)
    if options.get("model") == "other weights":
        torch.manual_seed(3)
        options = {"model": nn.Sequential(*(type(one)(*_sizes(one)) for one in layers(8, 24, 16, 3))).eval()}
    with pytest.raises(ArgumentError, match=f"the storage holds another search: .*{match}"):
        search(storage, **({"evaluate": never} | options))


def _sizes(layer: nn.Module) -> tuple[int, ...]:
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else ()


def test_a_damaged_journal_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "search.log"
    storage = f"journal://{path}"
    study = open_study(storage)
    claim_study(study, {"seed": 0})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":2,"worker_id"')  # the machine lost its power
    assert open_study(storage).user_attrs == {"search": {"seed": 0}}
    assert path.read_bytes().startswith(whole)
    path.write_bytes(whole.replace(b"op_code", b"\xff\x00", 1))
    with pytest.raises(SearchError, match="is damaged"):
        open_study(storage)
    path.write_bytes(b'{"op_code": 2, "study_id": 5}\n' + whole)
    with pytest.raises(SearchError, match="is damaged"):
        open_study(storage)


@pytest.mark.parametrize(
    "storage",
    [
        "search.log", "journal://", "grpc://host", "nonsense://x", "sqlite:////nowhere/at/all.db", 3, ["journal://x"],
        "journal:///nowhere/at/all.log", "journal://a\0b",
    ],
)  # fmt: skip
def test_what_is_no_storage_is_refused(storage: Any) -> None:
    with pytest.raises(ArgumentError, match="storage="):
        open_study(storage)


def test_without_optuna_only_storages_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ArgumentError, match=r"Install torchshear\[search\]"):
        search("journal://x.log", evaluate=never)
    assert len(search(None, trials=1).trials) == 1


def test_a_storage_of_optuna_may_be_given() -> None:
    storage = optuna.storages.InMemoryStorage()
    search(storage, trials=2)
    assert len(search(storage, evaluate=never, trials=2).trials) == 2
    with pytest.raises(ArgumentError, match="holds no search"):
        open_study(optuna.storages.InMemoryStorage(), must_exist=True)
    assert storages.STUDY == "torchshear-search"
