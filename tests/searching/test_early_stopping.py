"""Candidates that are given up by the scores that they yield on the way."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

import torchshear
from tests.searching.spaces import layers
from torchshear.errors import ArgumentError, SearchError
from torchshear.searching import Outcome, RandomSearch, SearchResult, SearchSpace
from torchshear.searching._early_stopping import HopelessError, Watch

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
N_STEPS = 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return layers(8, 32, 24, 16, 3)


def closeness(model: nn.Module) -> float:
    with torch.no_grad():
        return -float((model(X) - network()(X)).square().mean())


class Counted:
    """Yields the closeness of a model several times, nearer and nearer to it, and counts how often."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, model: nn.Module) -> Iterator[float]:
        score = closeness(model)
        self.seen.append(0)
        for step in range(N_STEPS):
            self.seen[-1] += 1
            yield score * (1 + (N_STEPS - 1 - step) / 10)


def search(evaluate: Any, **options: Any) -> SearchResult:
    asked = {"method": "random", "ratio": 0.5, "trials": 24, "progress": False}
    return torchshear.search(network(), X[:2], evaluate=evaluate, **(asked | options))


def test_scores_on_the_way_end_in_the_last_one() -> None:
    plain, yielding = search(closeness), search(Counted())
    assert [one.score for one in yielding.trials] == [one.score for one in plain.trials]
    assert {one.state for one in yielding.trials} == {"complete"}


def test_the_hopeless_are_given_up_and_the_best_is_found_all_the_same() -> None:
    """By the rule of the median, worked out here by hand from the scores of all candidates."""
    plain, counted = search(closeness), Counted()
    found = search(counted, stop_early="median")
    complete: list[float] = []
    for trial, full, n_seen in zip(found.trials, plain.trials, counted.seen, strict=True):
        assert trial.widths == full.widths
        assert full.score is not None
        is_low = len(complete) >= 5 and full.score < sorted(complete)[len(complete) // 2 - (len(complete) % 2 == 0)]
        if trial.state == "stopped":
            assert n_seen == 1
            assert trial.score == pytest.approx(full.score * 1.3)
            assert is_low
        else:
            assert n_seen == N_STEPS
            assert trial.score == full.score
            complete.append(full.score)
    n_stopped = sum(one.state == "stopped" for one in found.trials)
    assert n_stopped >= 5
    assert found.best.score == plain.best.score
    assert f"24 trials, {n_stopped} given up early" in str(found)
    assert closeness(found.result.model) == found.best.score


def test_a_candidate_is_given_up_while_it_is_fine_tuned() -> None:
    tuned: list[list[float]] = []

    def finetune(model: nn.Module) -> Iterator[float]:
        tuned.append([])
        for step in (0.1, -0.04, -0.05):
            with torch.no_grad():
                model[-1].bias += step
            tuned[-1].append(closeness(model))
            yield tuned[-1][-1]

    search(closeness, finetune=finetune, trials=8)
    lower = sorted(scores[1] for scores in tuned)[4]
    threshold = optuna.pruners.ThresholdPruner(lower=lower, n_warmup_steps=1)
    n_before, whole = len(tuned), list(tuned)
    found = search(closeness, finetune=finetune, stop_early=threshold, trials=8)
    assert sum(one.state == "stopped" for one in found.trials) >= 4
    for trial, scores, every in zip(found.trials, tuned[n_before:], whole, strict=False):
        at = next((number for number in (1, 2) if every[number] < lower), None)
        assert scores == (every if at is None else every[: at + 1])
        assert trial.state == ("complete" if at is None else "stopped")
    last = found.result.model[-1].bias
    assert torch.allclose(last, network()[-1].bias + 0.01)


def test_finetune_may_yield_scores_and_return_a_model() -> None:
    def finetune(model: nn.Module) -> Any:
        yield 1.0
        return nn.Sequential(model, nn.Identity())

    assert isinstance(search(closeness, finetune=finetune, trials=2).result.model[1], nn.Identity)


def test_what_was_given_up_stays_so_when_a_search_goes_on(tmp_path: Path) -> None:
    storage = f"journal://{tmp_path}/search.log"
    first = search(Counted(), stop_early="median", storage=storage, trials=16)
    counted = Counted()
    again = search(counted, stop_early="median", storage=storage)
    assert again.trials[:16] == first.trials
    assert len(counted.seen) == 8
    whole = search(Counted(), stop_early="median")
    assert [one.state for one in again.trials] == [one.state for one in whole.trials]
    with pytest.raises(ArgumentError, match="stop_early is 'median', here 'halving'"):
        search(Counted(), stop_early="halving", storage=storage)


@pytest.mark.parametrize("method", ["evolution", "annealing", "amc"])
def test_methods_go_on_past_candidates_that_were_given_up(method: str) -> None:
    found = search(Counted(), method=method, stop_early="halving", trials=30)
    assert found.best.state == "complete"
    assert found.best.score is not None


@pytest.mark.parametrize("scores", [[math.nan], ["high"], []], ids=["nan", "text", "none"])
def test_scores_that_are_none_fail(scores: list[Any]) -> None:
    with pytest.raises(SearchError, match="3 candidates in a row have no score"):
        search(lambda model: iter(scores))


@pytest.mark.parametrize("method", ["netadapt", "sensitivity"])
def test_methods_whose_candidates_get_narrower_give_none_up(method: str) -> None:
    with pytest.raises(ArgumentError, match=f"{method!r} cuts in rounds"):
        search(closeness, method=method, stop_early="median")


@pytest.mark.parametrize("given", ["mean", 3, optuna.pruners.MedianPruner])
def test_what_decides_nothing_is_refused(given: object) -> None:
    with pytest.raises(ArgumentError, match=r"stop_early=.*expected one of 'median', 'halving'"):
        search(closeness, stop_early=given)


def test_a_watch_closes_what_it_gives_up() -> None:
    closed = []

    def scores() -> Iterator[float]:
        try:
            yield 1.0
            yield 0.0
        finally:
            closed.append(True)

    watch = Watch(lambda number, value: number == 1)
    with pytest.raises(HopelessError) as raised:
        watch.follow(scores())
    assert raised.value.value == 0.0
    assert closed == [True]


class Recording:
    """Random search that keeps the outcomes it is sent."""

    def __init__(self) -> None:
        self.seen: list[Outcome] = []

    def propose(self, space: SearchSpace, random: np.random.Generator) -> Any:
        proposals = RandomSearch().propose(space, random)
        batch = next(proposals)
        while True:
            outcomes = yield batch
            self.seen += outcomes
            batch = proposals.send(outcomes)


def test_what_was_given_up_is_neither_the_result_nor_a_score_for_the_method() -> None:
    """Even where the score at which it was given up is higher than any other."""
    given_up = []

    def evaluate(model: nn.Module) -> Iterator[float]:
        given_up.append(len(given_up) % 2 == 1)
        yield 100.0 if given_up[-1] else 0.0
        yield closeness(model)

    method = Recording()
    found = search(evaluate, method=method, stop_early=optuna.pruners.ThresholdPruner(upper=50.0), trials=17)
    assert [one.state == "stopped" for one in found.trials] == given_up
    assert [one.score for one in found.trials if one.state == "stopped"] == [100.0] * sum(given_up)
    assert found.best.score == max(one.score for one in found.trials if one.state == "complete")
    assert len(method.seen) == 16
    for trial, outcome in zip(found.trials, method.seen, strict=False):
        assert outcome.score == (-math.inf if trial.state == "stopped" else trial.score)
