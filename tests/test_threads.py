"""Calls from several threads: each gives what it gives alone, and what belongs to the process is left as it was."""

import logging
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import torchshear
from tests.networks import Residual
from torchshear.graph.model._process import run_exclusively, silence_torch

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """Results of calls that all start at once, or what they raise."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def work(number: int) -> None:
        start.wait()
        try:
            results[number] = calls[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def same_kept(one: torchshear.PruningPlan, other: torchshear.PruningPlan) -> bool:
    kept, others = one.kept, other.kept
    return kept.keys() == others.keys() and all(np.array_equal(kept[name], others[name]) for name in kept)


def process_state() -> list[Any]:
    return [
        torch.get_default_dtype(),
        torch.compiler.is_compiling(),
        torch.compiler.is_exporting(),
        sys.stderr,
        warnings.filters[:],
        logging.getLogger("torch").level,
        torch.backends.mkldnn.enabled,
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("shared", [False, True], ids=["own-models", "one-model"])
def test_threads_get_what_one_gets(shared: bool) -> None:
    torch.manual_seed(0)
    model = Residual()
    flags = [module.training for module in model.modules()]
    alone_result = torchshear.prune(model, (IMAGES,))
    models = [model if shared else Residual() for _ in range(4)]
    for other in models:
        other.load_state_dict(model.state_dict())
    before = process_state()
    results = in_threads([lambda one=one: torchshear.prune(one, (IMAGES,)) for one in models])
    assert process_state() == before
    for one, result in zip(models, results, strict=True):
        assert isinstance(result, torchshear.PruneResult), result
        assert same_kept(result.plan, alone_result.plan)
        for name, tensor in alone_result.model.state_dict().items():
            assert torch.equal(result.model.state_dict()[name], tensor), name
        assert [module.training for module in one.modules()] == flags


def test_data_is_collected_in_threads() -> None:
    torch.manual_seed(0)
    groups = torchshear.analyze(torchshear.trace(Residual().eval(), (IMAGES,)))
    before = process_state()
    results = in_threads([lambda: torchshear.collect(groups, [(IMAGES,)] * 20, batches=20, progress=False)] * 2)
    assert process_state() == before
    plans = [torchshear.plan(groups, "apoz", 0.5, statistics=found) for found in results]
    assert same_kept(*plans)


def test_errors_of_other_threads_are_heard(capsys: pytest.CaptureFixture[str]) -> None:
    with silence_torch():
        sys.stderr.write("dumped\n")
        in_threads([lambda: sys.stderr.write("of another thread\n")])
    assert capsys.readouterr().err == "of another thread\n"


def test_a_call_waits_for_another_thread() -> None:
    entered, order = threading.Event(), []

    def wait() -> None:
        with run_exclusively():
            entered.set()
            order.append("first")
            with run_exclusively():  # the same thread may enter again
                order.append("again")

    with run_exclusively():
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.1)
        order.append("before")
    thread.join()
    assert order == ["before", "first", "again"]
