"""`torchshear.search` from end to end: budgets, records, failures, fine-tuning, proof."""

import math
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.searching.spaces import Blocks, layers
from tests.speedup.latency.making_tables import ALIGNMENT, joined, probes_of, table_of_probes
from torchshear.errors import ArgumentError, PlanError, SearchError
from torchshear.graph.model._copy import copy_model
from torchshear.searching import NetAdapt, RandomSearch, Sensitivity
from torchshear.searching import _candidate as candidates
from torchshear.searching import _request as searched
from torchshear.searching._carried_state import carry_state

torch.manual_seed(0)
X = torch.randn(64, 8)


def network() -> nn.Sequential:
    return layers(8, 24, 16, 3)


def closeness(model: nn.Module) -> float:
    """Closeness to the dense model on other inputs."""
    with torch.no_grad():
        return -float((model(X) - network()(X)).square().mean())


def search(model: nn.Module | None = None, x: Tensor = X[:2], **options: Any) -> torchshear.searching.SearchResult:
    asked = {"evaluate": closeness, "method": "random", "ratio": 0.5, "trials": 5, "progress": False}
    return torchshear.search(network() if model is None else model, x, **(asked | options))


def test_the_result_is_the_best_trial_proved_and_scored_the_same() -> None:
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = search(model)
    assert [one.number for one in found.trials] == list(range(5))
    assert found.best.score == max(one.score for one in found.trials) == closeness(found.result.model)
    assert found.result.verification.max_error < 1e-12
    assert {group.name: len(group.kept) for group in found.result.plan.groups} == found.best.widths
    assert all(one.is_within and one.budget["channels"] <= 0.5 for one in found.trials)
    assert found.result.plan.request["search"] == "random"
    assert found.result.report.requested_ratio == 0.5
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("target", "resource"),
    [({"target_macs": 0.5}, "macs"), ({"target_params": 300}, "params"), ({"ratio": 0.4}, "channels")],
)
def test_budgets_hold_of_what_comes_out(target, resource) -> None:
    found = search(**({"ratio": None} | target), method="evolution")
    before, after = found.result.report.before, found.result.report.after
    left = {"macs": after.macs / before.macs, "params": after.n_params / before.n_params}
    if resource in left:
        assert found.best.budget[resource] == pytest.approx(left[resource])
        assert left[resource] <= found.targets[resource]
    assert found.best.budget[resource] > found.targets[resource] * 0.85


def test_two_budgets_hold_together() -> None:
    found = search(ratio=None, target_macs=0.6, target_params=0.4)
    assert set(found.best.budget) == {"macs", "params"}
    assert all(one.budget["params"] <= 0.4 and one.budget["macs"] <= 0.6 for one in found.trials)


def test_a_budget_of_latency_by_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, groups = joined()
    table = table_of_probes(groups, probes_of(groups))
    monkeypatch.setattr(searched, "table_of", lambda *_: table)
    options: dict[str, Any] = {"align": ALIGNMENT, "evaluate": lambda model: 0.5}
    found = torchshear.search(model, args, method="uniform", target_latency=0.7, progress=False, **options)
    assert table.predict_ms(found.best.widths) / table.dense_ms == pytest.approx(found.best.budget["latency"])
    assert 0.5 < found.best.budget["latency"] <= 0.7
    assert set(found.result.report.latency) >= {"dense_ms", "pruned_ms"}


@pytest.mark.parametrize("name", ["uniform", "milp", "annealing", "evolution", "netadapt"])
def test_every_method_keeps_coupled_layers_together(name) -> None:
    """NNI prunes layers one by one: residual sums, groups and depthwise convolutions then disagree."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 6, 6)
    options: dict[str, Any] = {
        "target_macs": 0.5,
        "ratio": None,
        "method": name,
        "trials": None if name == "netadapt" else 4,
    }
    found = search(
        Blocks().eval(), x, evaluate=lambda model: float(model(x).detach().mean()), exclude=["fc"], **options
    )
    assert found.result.verification.max_error < 1e-9
    assert found.result.model(x).shape == (2, 3)
    assert found.result.report.after.macs <= 0.5 * found.result.report.before.macs


def test_nothing_vanishes_where_much_goes() -> None:
    """Large shares empty layers in NNI, and the search ends with an error."""
    found = search(ratio=0.9, method="random", min_width=2)
    assert all(min(one.widths.values()) >= 2 for one in found.trials)


def test_what_is_excluded_stays_and_is_not_searched() -> None:
    """NNI's sensitivity analyses all layers, whatever the config says."""
    found = search(exclude="0", method=Sensitivity(threshold=10.0), ratio=0.2, trials=None)
    assert {name for one in found.trials for name in one.widths} == {"2.weight[0]"}
    assert found.result.model[0].out_features == 24


def test_the_same_seed_gives_the_same_trials_and_others_do_not() -> None:
    first, again, other = search(), search(), search(seed=1)
    widths = [[one.widths for one in found.trials] for found in (first, again, other)]
    assert widths[0] == widths[1] != widths[2]
    assert [one.score for one in first.trials] == [one.score for one in again.trials]


def test_equal_widths_are_scored_once() -> None:
    scored = []

    def evaluate(model: nn.Module) -> float:
        scored.append((model[0].out_features, model[2].out_features))
        return closeness(model)

    found = search(layers(8, 3, 3, 3), evaluate=evaluate, trials=40, align=1, ratio=0.3)
    assert len(scored) == len(set(scored)) == len(found.trials)
    assert found.n_reused > 0
    assert "more were known by their widths" in str(found)
    assert "only proposed widths that it had proposed before" in found.notes[0]


def test_candidates_that_cannot_be_scored_fail_and_the_search_goes_on() -> None:
    answers = iter([0.1, math.nan, "good", 0.3, RuntimeError("no memory"), math.inf, True, 0.2])

    def evaluate(model: nn.Module) -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(
        SearchError, match=r"trials 4 to 6; the first: evaluate fails: RuntimeError: no memory"
    ) as caught:
        search(evaluate=evaluate, trials=8)
    assert "raise answer" in "".join(traceback.format_exception(caught.value))
    answers = iter([0.1, math.nan, "good", torch.tensor(0.3), RuntimeError("no memory"), math.inf, 0.2, True])
    found = search(evaluate=evaluate, trials=8)
    assert [one.state for one in found.trials].count("failed") == 5
    assert found.best.number == 3
    assert "evaluate gave nan" in str(found)
    assert "RuntimeError: no memory" in str(found)


def test_ctrl_c_returns_the_best_so_far() -> None:
    n_scored = 0

    def evaluate(model: nn.Module) -> float:
        nonlocal n_scored
        n_scored += 1
        if n_scored == 4:
            raise KeyboardInterrupt
        return float(n_scored)

    found = search(evaluate=evaluate, trials=8)
    assert found.best.number == 2
    assert found.result.verification.max_error < 1e-12
    assert "Interrupted" in str(found)
    n_scored = 3
    with pytest.raises(KeyboardInterrupt):
        search(evaluate=evaluate)


def never(model: nn.Module) -> float:
    raise AssertionError("nothing is to be evaluated")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ratio": 0.5, "min_width": 14}, PlanError, r"0\.5 of the channels were asked for, .* possible is 0\.7"),
        ({"ratio": None, "target_macs": 0.01}, PlanError, "best possible is .*max_ratio=0.98"),
        ({"ratio": None, "target_params": 10_000}, ArgumentError, "keeps within the budget already"),
        ({"ratio": None}, ArgumentError, "no budget"),
        ({"ratio": 0.0}, ArgumentError, "removes nothing"),
        ({"ratio": {"0": 0.5}}, ArgumentError, "ratio is a mapping"),
        ({"ratio": 0.5, "target_macs": 0.5}, ArgumentError, "both say how much"),
        ({"method": "anealing"}, ArgumentError, "Close to it: annealing"),
        ({"method": RandomSearch}, ArgumentError, "a method with settings"),
        ({"method": NetAdapt(step=0.001)}, ArgumentError, "Use a step above"),
        ({"evaluate": None}, ArgumentError, "evaluate is NoneType"),
        ({"finetune": 3}, ArgumentError, "finetune is int"),
        ({"trials": 0}, ArgumentError, "trials must be"),
        ({"seed": -1}, ArgumentError, "seed must be"),
        ({"exclude": "*"}, ArgumentError, "leaves nothing that can shrink"),
        ({"compensate": "refit"}, ArgumentError, "runs data"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_trial(options, error, match) -> None:
    with pytest.raises(error, match=match):
        search(**({"evaluate": never} | options))


def test_no_trial_within_the_budget_is_an_error_that_says_so() -> None:
    with pytest.raises(SearchError, match="none of 1 trials has a score and is within the budget"):
        search(method="netadapt", trials=1)


def test_candidates_are_compensated_and_so_is_the_result() -> None:
    data: dict[str, Any] = {"data": torch.randn(128, 8).split(32), "batches": 4}
    plain, fitted = search(), search(compensate="refit", criterion="l1", **data)
    assert [one.widths for one in plain.trials] == [one.widths for one in fitted.trials]
    assert sum(a.score < b.score for a, b in zip(plain.trials, fitted.trials, strict=True)) == 5
    assert fitted.result.refit is not None
    assert closeness(fitted.result.model) == fitted.best.score


def test_fine_tuning_is_handed_on_from_round_to_round() -> None:
    """Each fine-tuning adds 1 to all weights of the last layer; what a model has had, its weights tell."""

    def finetune(model: nn.Module) -> None:
        with torch.no_grad():
            model[4].weight += 1.0

    def rounds(model: nn.Module) -> float:
        kept = model[4].weight.detach()
        return float((kept.mean() - network()[4].weight.detach().mean()).round())

    found = search(evaluate=rounds, finetune=finetune, method=NetAdapt(step=0.2, decay=1.0), ratio=0.5, trials=None)
    by_round = {one.label.partition(":")[0]: one.score for one in found.trials}
    assert by_round == {"dense": 0.0, "round 1": 1.0, "round 2": 2.0, "round 3": 3.0}
    assert rounds(found.result.model) == 3.0


@pytest.mark.parametrize(
    "first", [{"stem": 16, "grouped": 16}, {"stem": 12, "grouped": 24}, {"stem": 12, "grouped": 16}]
)
def test_carried_weights_are_those_of_the_positions_that_stay(first) -> None:
    """A model cut twice, and trained between, is the dense model with the trained weights in place, cut at once."""
    torch.manual_seed(1)
    model, x = Blocks().eval(), torch.randn(2, 1, 6, 6)
    groups = torchshear.analyze(torchshear.trace(model, x))

    def plan(widths: dict[str, int]) -> torchshear.PruningPlan:
        kept = {}
        for group in groups:
            width = widths[group.name.partition(".")[0]]
            n_each = width // group.n_blocks
            size = group.width // group.n_blocks
            kept[group.name] = [
                block * size + size - 1 - unit for block in range(group.n_blocks) for unit in range(n_each)
            ]
            if group.balance is not None:
                kept[group.name] = [
                    int(u) for b in range(group.n_blocks) for u in (group.balance == b).nonzero()[0][-n_each:]
                ]
        return torchshear.pruners.plan_from_kept(groups, kept)

    before, after = plan(first), plan({"stem": 8, "grouped": 12})
    trained = torchshear.shrink(model, before, x)
    marks = copy_model(model)
    with torch.no_grad():
        for name, value in trained.named_parameters():
            value += torch.randn_like(value)
            full = marks.get_parameter(name)
            if name in before.state:
                full[before.state[name].mask()] = value.reshape(-1)
            else:
                full.copy_(value)
    small = torchshear.shrink(model, after, x)
    carry_state(before, trained, after, small)
    expected = torchshear.shrink(marks, after, x)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in small.state_dict().items())


def test_the_best_candidate_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = candidates.CandidateMaker.make
    monkeypatch.setattr(candidates.CandidateMaker, "make", lambda self, *one: made.append(one) or original(self, *one))
    search(trials=2)
    assert len(made) == 2


def test_a_dense_model_that_cannot_be_scored_says_why() -> None:
    def evaluate(model: nn.Module) -> float:
        raise RuntimeError("no data")

    with pytest.raises(SearchError, match=r"the dense model has no score.*evaluate fails: RuntimeError: no data"):
        search(evaluate=evaluate, method="netadapt", trials=None)


def test_the_record_is_plain_data_a_table_and_a_picture(tmp_path: Path) -> None:
    reports = []
    found = search(layers(8, 24, 16, 20, 3), trials=40, progress=lambda *what: reports.append(what))
    assert [done for done, _, _ in reports] == list(range(1, 41))
    data = found.to_dict()
    assert data["best"] == found.best.number
    assert len(data["trials"]) == 40
    text = str(found)
    assert f"{found.best.number} *" in text
    assert text.count("\n") < 45  # the best and the last of them
    assert (
        "Search by random for at most 50.0% of the channels" in text == found._repr_html_()
        or "<table>" in found._repr_html_()
    )
    for name in ("search.png", "search.svg"):
        found.draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(ArgumentError, match=r"\.png, \.svg, \.pdf"):
        found.draw(tmp_path / "search.txt")
    assert repr(found).startswith("<SearchResult by random: 40 trials")


def test_a_method_of_ones_own() -> None:
    class Halves:
        def propose(self, space, random):
            for name in range(len(space.names)):
                yield [torchshear.searching.Proposal(space.uniform(), label=f"try {name}")]

    found = search(method=Halves())
    assert found.method == "Halves"
    assert len(found.trials) == 1
    assert found.n_reused == 1


def test_the_best_candidate_is_trained_on_when_the_search_is_over() -> None:
    trained: list[nn.Module] = []

    def add_one(model: nn.Module) -> None:
        trained.append(model)
        with torch.no_grad():
            model[-1].bias += 1

    plain, found = search(), search(finetune_best=add_one)
    assert [one.score for one in found.trials] == [one.score for one in plain.trials]
    assert len(trained) == 1
    assert torch.equal(found.result.model[-1].bias, plain.result.model[-1].bias + 1)
    assert found.final_score == closeness(found.result.model)
    assert found.to_dict()["final_score"] == found.final_score
    assert f"trained on, it has a score of {found.final_score:.6g}" in str(found)
    assert plain.final_score is None


@pytest.mark.parametrize("error", [RuntimeError("no data"), KeyboardInterrupt()], ids=["fails", "is interrupted"])
def test_a_search_is_not_lost_where_the_last_training_fails(error: BaseException, caplog: Any) -> None:
    def fail(model: nn.Module) -> None:
        raise error

    found = search(finetune_best=fail)
    assert found.final_score is None
    assert closeness(found.result.model) == found.best.score
    assert "was not trained on (" in found.notes[-1]
    assert found.notes[-1] in caplog.text
