"""Pruning in rounds: what each round asks for, the best of them, files, and agreement with one cut by hand."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import torchshear
from tests.training.loops import images, perceptron, residual, sgd, vectors
from torchshear.errors import ArgumentError, CheckpointError, DataError, MaskError
from torchshear.pruners.schedules import AGP, Linear, Lottery
from torchshear.training import Round, by_criterion, prune_in_rounds

X = vectors(0)[0]


def tune(model: nn.Module) -> None:
    """Train some steps, with an optimizer of its own."""
    model.train()
    optimizer = sgd(model)
    for step in range(3):
        x, target = vectors(step) if isinstance(model, nn.Sequential) else images(step)
        functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("resets", [False, True])
def test_masks_and_smaller_models_give_the_same(resets: bool) -> None:
    model = residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: dict[bool, list[int]] = {False: [], True: []}
    found = {}
    for shrinks in (False, True):

        def fine_tune(one: nn.Module, shrinks: bool = shrinks) -> None:
            seen[shrinks].append(sum(parameter.numel() for parameter in one.parameters()))
            tune(one)

        found[shrinks] = prune_in_rounds(
            model, images(0)[0], tasks=AGP(end=3, by="event"), ratio=0.5, fine_tune=fine_tune, shrink=shrinks,
            reset_weights=resets,
        )  # fmt: skip
    masked, small = found[False].result, found[True].result
    assert found[True].rounds == found[False].rounds
    assert [round(one.asked, 4) for one in found[True].rounds] == [0, 0.3519, 0.4815, 0.5]
    assert [one.reached for one in found[True].rounds] == pytest.approx([0, 0.3, 0.4, 0.5])
    assert small.plan == masked.plan
    assert len(set(seen[False])) == 1
    assert seen[True] == sorted(set(seen[True]), reverse=True)
    for name, value in small.model.state_dict().items():
        torch.testing.assert_close(value, masked.model.state_dict()[name], rtol=1e-9, atol=1e-12)
    assert small.verification.max_error < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_with_reset_the_last_round_trains_the_first_weights() -> None:
    """By hand: train, choose by the trained weights, take their first values, train again."""
    result = prune_in_rounds(perceptron(), X, tasks=[0.0, 0.5], fine_tune=tune, reset_weights=True).result
    trained = perceptron()
    tune(trained)
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(trained, X)), "l1", 0.5)
    by_hand = torchshear.shrink(perceptron(), plan)
    tune(by_hand)
    torch.testing.assert_close(result.model(X), by_hand(X), rtol=1e-10, atol=1e-12)


def test_the_best_of_equal_sizes_is_taken() -> None:
    scores = iter([0.9, 0.5, 0.7, 0.6])
    seen: list[nn.Module] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(copy.deepcopy(model))
        return next(scores)

    found = prune_in_rounds(perceptron(), X, tasks=[0.0, 0.5, 0.5, 0.5], fine_tune=tune, evaluate=evaluate)
    assert found.best == 2
    assert [one.score for one in found.rounds] == [0.9, 0.5, 0.7, 0.6]
    torch.testing.assert_close(found.result.model(X), seen[2](X))
    assert "(best)" in str(found).splitlines()[2]


def test_tasks_may_look_at_the_rounds_so_far() -> None:
    """More and more goes until the score falls below a bound."""

    def tasks(rounds: tuple[Round, ...]) -> float | None:
        if rounds and rounds[-1].score is not None and rounds[-1].score < 0.5:
            return None
        return 0.25 * len(rounds)

    found = prune_in_rounds(perceptron(), X, tasks=tasks, evaluate=lambda model: 10 / model[0].out_features - 0.3)
    assert [one.asked for one in found.rounds] == [0.0]
    scores = iter([0.9, 0.8, 0.4])
    found = prune_in_rounds(perceptron(), X, tasks=tasks, evaluate=lambda _: next(scores))
    assert [one.asked for one in found.rounds] == [0.0, 0.25, 0.5]


def half_of_the_first(groups: Any, share: float, gone: Mapping[str, np.ndarray]) -> torchshear.PruningPlan:
    """A pruner of one's own: the first units go."""
    kept = {group.name: np.arange(int(group.width * share), group.width) for group in groups.prunable}
    return torchshear.pruners.plan_from_kept(groups, kept)


def test_any_pruner_will_do() -> None:
    found = prune_in_rounds(perceptron(), X, tasks=[0.25, 0.5], pruner=half_of_the_first)
    assert [list(units) for units in found.result.plan.kept.values()][:2] == [list(range(8, 16)), list(range(6, 12))]
    data = [vectors(0)]
    taylor = by_criterion(
        "taylor", unit="macs", scope="global",
        statistics=lambda g: torchshear.collect(g, data, functional.cross_entropy, batches=1, progress=False),
    )  # fmt: skip
    found = prune_in_rounds(perceptron(), X, tasks=Lottery(end=2), ratio=0.6, pruner=taylor, fine_tune=tune)
    dense = found.rounds[0].macs
    assert found.rounds[0].reached == 0
    assert found.rounds[1].macs <= dense * 0.4**0.5
    assert found.rounds[2].macs <= 0.4 * dense

    def reviving(groups: Any, share: float, gone: Mapping[str, np.ndarray]) -> torchshear.PruningPlan:
        return torchshear.plan(groups, torchshear.pruners.random_criterion(int(share * 100)), share)

    with pytest.raises(ArgumentError, match="keeps units of group .* that went in an earlier round"):
        prune_in_rounds(perceptron(), X, tasks=[0.25, 0.5], pruner=reviving)


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("shrinks", [False, True])
@pytest.mark.parametrize("resets", [False, True])
def test_killed_in_a_round_it_goes_on_with_the_same_numbers(shrinks: bool, resets: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": Linear(end=3, by="event"), "ratio": 0.5, "shrink": shrinks}
    options |= {"reset_weights": resets, "evaluate": lambda model: float(model(images(9)[0]).detach().abs().mean())}
    whole = prune_in_rounds(residual(), images(0)[0], fine_tune=tune, **options)
    calls = []

    def killed(model: nn.Module) -> None:
        calls.append(model)
        if len(calls) == 3:
            raise KilledError
        tune(model)

    with pytest.raises(KilledError):
        prune_in_rounds(residual(), images(0)[0], fine_tune=killed, folder=tmp_path, **options)
    again = prune_in_rounds(residual(), images(0)[0], fine_tune=killed, folder=tmp_path, **options)
    assert len(calls) == 5
    assert again.rounds == whole.rounds
    assert all(torch.equal(v, whole.result.model.state_dict()[n]) for n, v in again.result.model.state_dict().items())
    third = prune_in_rounds(residual(), images(0)[0], fine_tune=killed, folder=tmp_path, **options)
    assert len(calls) == 5
    torch.testing.assert_close(third.result.model(images(0)[0]), whole.result.model(images(0)[0]))
    plan = torchshear.PruningPlan.load(tmp_path / "round-3-plan.json")
    assert plan == whole.result.plan


def test_a_folder_of_other_rounds_is_refused(tmp_path: Path) -> None:
    prune_in_rounds(perceptron(), X, tasks=[0.5], folder=tmp_path)
    with pytest.raises(ArgumentError, match="is of other rounds \\(weights differs\\)"):
        prune_in_rounds(perceptron(1), X, tasks=[0.5], folder=tmp_path)
    with pytest.raises(ArgumentError, match="tasks, shrink differs"):
        prune_in_rounds(perceptron(), X, tasks=[0.25], shrink=False, folder=tmp_path)
    (tmp_path / "round-0.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="Delete rounds.json"):
        prune_in_rounds(perceptron(), X, tasks=[0.5], folder=tmp_path)
    (tmp_path / "rounds.json").write_text(json.dumps({"format": "torchshear.rounds"}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        prune_in_rounds(perceptron(), X, tasks=[0.5], folder=tmp_path)
    with pytest.raises(ArgumentError, match="is no folder"):
        prune_in_rounds(perceptron(), X, tasks=[0.5], folder=tmp_path / "none")


def test_what_is_refused() -> None:
    for options, said in (
        ({"tasks": []}, "expected a schedule by='event'"),
        ({"tasks": [1.0]}, "a share of tasks=1.0"),
        ({"tasks": AGP(end=3)}, "expected a schedule with by='event'"),
        ({"tasks": [0.5], "ratio": 0.5}, "ratio= goes with a schedule"),
        ({"tasks": lambda rounds: None}, "asks for no round"),
        ({"tasks": [0.5], "pruner": 3}, "pruner is 3"),
        ({"tasks": [0.5], "pruner": lambda *_: 3}, "what pruner gives is int"),
        ({"tasks": [0.5], "evaluate": lambda _: "good"}, "evaluate gave 'good'"),
        ({"tasks": [0.5], "fine_tune": 3}, "fine_tune is int"),
    ):
        with pytest.raises(ArgumentError, match=said):
            prune_in_rounds(perceptron(), X, **options)
    with pytest.raises(DataError, match="evaluate gave nan"):
        prune_in_rounds(perceptron(), X, tasks=[0.5], evaluate=lambda _: float("nan"))
    with pytest.raises(ArgumentError, match="no option 'align'"):
        by_criterion("l1", align=8)
    masked = perceptron()
    torchshear.pruners.masks.apply(masked, torchshear.pruners.masks.choose_masks(masked, "1x1", 0.5))
    with pytest.raises(MaskError, match="masks lie on the model already"):
        prune_in_rounds(masked, X, tasks=[0.5])
