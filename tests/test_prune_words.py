"""Data, losses and configs as words of `prune`: the same as stage by stage, and errors before anything is traced."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import torchshear
from tests.networks import Classifier, LooksAtValues, image, labelled
from torchshear import api, options
from torchshear.compat.nni import ConfigPruner, L1FilterPruner, TaylorFOWeightFilterPruner
from torchshear.errors import ArgumentError, DataError, PlanError

X = (image(size=6),)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Classifier().eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(s, t) for (a, s), (b, t) in pairs)


def kept(plan: torchshear.PruningPlan) -> dict[str, list[int]]:
    return {name: units.tolist() for name, units in plan.kept.items()}


@pytest.mark.parametrize("criterion", ["apoz", "taylor"])
@pytest.mark.parametrize("kind", [list, iter])
def test_data_gives_the_plan_of_the_stages(model: nn.Module, criterion: str, kind: Any) -> None:
    groups = torchshear.analyze(torchshear.trace(model, X))
    statistics = torchshear.collect(groups, labelled(), functional.cross_entropy, 3)
    expected = torchshear.plan(groups, criterion, 0.5, statistics=statistics)
    words = {"loss_fn": functional.cross_entropy} if criterion == "taylor" else {}
    result = torchshear.prune(model, X, criterion=criterion, ratio=0.5, data=kind(labelled()), batches=3, **words)
    assert kept(result.plan) == kept(expected)
    assert kept(result.plan) != kept(torchshear.prune(model, X, ratio=0.5).plan)


def test_only_what_the_criterion_looks_at_is_collected(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    collect = options.collect

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(collect(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(options, "collect", spy)
    torchshear.prune(model, X, criterion="apoz", data=labelled(), loss_fn=functional.cross_entropy, batches=3)
    assert [statistics.sums for statistics in seen] == [{"zeros"}]
    assert (seen[0].n_batches, seen[0].weights) == (3, {})


@pytest.mark.parametrize("kind", [list, iter])
def test_new_statistics_of_the_same_data(model: nn.Module, kind: Any) -> None:
    plain = torchshear.prune(model, X, criterion="apoz", data=labelled(), batches=3)
    result = torchshear.prune(model, X, criterion="apoz", data=kind(labelled()), batches=3, compensate="statistics")
    assert (plain.compensation, result.compensation) == ("none", "statistics")
    assert (result.fold, result.refit) == (None, None)
    assert not same(result.model, plain.model)
    assert same(result.model, torchshear.recalibrate(plain.model, labelled(), 3))
    by_weights = torchshear.prune(
        model, X, data=labelled(), batches=3, compensate="statistics"
    )  # l1 looks at no data itself
    assert same(by_weights.model, torchshear.recalibrate(torchshear.prune(model, X).model, labelled(), 3))


def test_new_statistics_of_data_in_another_type(model: nn.Module) -> None:
    wider = [(x.double(), target) for x, target in labelled()]
    words: dict[str, Any] = {"criterion": "apoz", "batches": 3, "compensate": "statistics"}
    assert same(
        torchshear.prune(model, X, data=wider, **words).model,
        torchshear.prune(model, X, data=labelled(), **words).model,
    )


CONFIG = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["three"], "sparsity": 0.3}]


def test_a_config_gives_the_plan_of_the_pruner_class(model: nn.Module, tmp_path: Path) -> None:
    expected = L1FilterPruner(model, CONFIG, args=X).plan
    result = torchshear.prune(model, X, config=CONFIG)
    assert kept(result.plan) == kept(expected)
    assert [len(group.kept) for group in result.plan.groups] == [4, 6, 7]
    assert result.config.ratios == {"one.weight[0]": 0.5, "two.weight[0]": 0.5, "three.weight[0]": 0.3}
    assert torchshear.prune(model, X).config is None
    (tmp_path / "config.yaml").write_text("- op_types: [Conv2d]\n  sparsity: 0.5\n- {op_names: [three], sparsity: 0.3}")
    assert kept(torchshear.prune(model, X, config=tmp_path / "config.yaml").plan) == kept(expected)


def test_a_config_with_a_criterion_of_data(model: nn.Module) -> None:
    words: dict[str, Any] = {"data": labelled(), "loss_fn": functional.cross_entropy, "batches": 3}
    expected = TaylorFOWeightFilterPruner(model, CONFIG, args=X, **words).plan
    result = torchshear.prune(model, X, criterion="taylor", config=CONFIG, align=4, **words)
    assert [len(group.kept) for group in result.plan.groups] == [4, 8, 8]
    unaligned = torchshear.prune(model, X, criterion="taylor", config=CONFIG, **words)
    assert kept(unaligned.plan) == kept(expected)


def test_a_config_that_names_its_criterion(model: nn.Module) -> None:
    config = [{"op_names": ["two"], "pattern": "1xchannel", "target_sparsity": 0.5, "pruning_scope": "local"}]
    words: dict[str, Any] = {"data": labelled(), "loss_fn": functional.cross_entropy, "batches": 3}
    result = torchshear.prune(model, X, config=config, **words)
    expected = ConfigPruner(model, config, args=X, **words).plan
    assert kept(result.plan) == kept(expected)
    assert result.plan.request["criterion"] == "snip_momentum"
    with pytest.raises(ArgumentError, match=r"a criterion of its own \(snip_momentum\).*criterion='l2'.*Leave"):
        torchshear.prune(model, X, criterion="l2", config=config, **words)
    with pytest.raises(ArgumentError, match=r"'snip_momentum' looks at gradients; give batches as data="):
        torchshear.prune(model, X, config=config)


def test_a_config_for_a_part() -> None:
    torch.manual_seed(0)
    config = [{"op_names": ["part.two"], "sparsity": 0.5}]
    result = torchshear.prune(LooksAtValues(Classifier()).eval(), X, config=config, submodules=["part"])
    assert (result.model.part.two.out_channels, result.model.part.one.out_channels) == (6, 8)


def test_a_config_that_searches_without_training(model: nn.Module) -> None:
    words: dict[str, Any] = {"data": labelled(), "loss_fn": functional.cross_entropy, "batches": 3}
    pruner = {"pruning_type": "retrain_free", "target_sparsity": 0.5, "pruning_scope": "local", "pattern": "1xchannel"}
    found = torchshear.prune(model, X, config=[pruner | {"op_names": ["two", "three"]}], **words)
    ratio = {"two.weight[0]": 0.5, "three.weight[0]": 0.5}
    expected = torchshear.prune(model, X, criterion="retrain_free", ratio=ratio, **words)
    assert kept(found.plan) == kept(expected.plan)
    assert found.config is not None
    assert "not scaled anew" in str(found.config)


def test_what_cannot_be_reached_is_told_before_data_is_run(model: nn.Module) -> None:
    class Loader:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("no batch is needed to know it")

    words: dict[str, Any] = {"data": Loader(), "loss_fn": functional.cross_entropy, "criterion": "taylor"}
    with pytest.raises(PlanError, match="the best"):
        torchshear.prune(model, X, target_macs=1e-4, **words)
    with pytest.raises(PlanError, match="at most"):
        torchshear.prune(model, X, ratio=0.999, scope="global", **words)
    with pytest.raises(ArgumentError, match="removes nothing"):
        torchshear.prune(model, X, ratio=0.01, **words)


def test_statistics_of_half_precision_are_told(model: nn.Module) -> None:
    data = [(x.bfloat16(), y) for x, y in labelled()]
    result = torchshear.prune(model.bfloat16(), (X[0].bfloat16(),), criterion="wanda", data=data, batches=3)
    note = "the model computes in torch.bfloat16; sums are float32"
    assert result.report.statistics == (note,)
    assert f"statistics  {note}" in str(result.report)
    assert result.plan.request["statistics"] == [note]


FINE = [{"op_names": ["three"], "pattern": "4x1", "target_sparsity": 0.5, "pruning_type": "magnitude"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"criterion": "apoz"}, r"criterion 'apoz' looks at activations; give batches as data=\."),
        ({"criterion": "taylor"}, r"'taylor' looks at gradients; give batches as data=, and a loss as loss_fn="),
        ({"criterion": "taylor", "data": [1]}, r"'taylor' looks at gradients; give a loss as loss_fn="),
        ({"criterion": "tailor", "data": [1]}, r"criterion='tailor'; .*Did you mean 'taylor'"),
        (
            {"data": [1]},
            r"data is given, and no criterion looks at it \(l1\), nor does compensate='none'\. Leave data= away",
        ),
        ({"loss_fn": functional.cross_entropy}, r"loss_fn= is given without data; give batches of it as data="),
        ({"batches": 4}, r"batches= is given without data"),
        (
            {"compensate": "statistics"},
            r"compensate='statistics' runs data; give batches as data=, or write 'constants'",
        ),
        ({"compensate": "refit", "batches": 4}, r"compensate='refit' runs data; give batches as data="),
        ({"compensate": "constants", "batches": 4}, r"batches= is given without data"),
        ({"criterion": "apoz", "data": 3}, r"data is int; expected something that gives batches"),
        ({"criterion": "apoz", "data": "folder"}, r"data is str; expected"),
        ({"criterion": "apoz", "data": [1], "batches": 0}, "batches must be a whole number of at least 1"),
        (
            {"compensate": "mean"},
            r"compensate='mean'; expected one of 'none', 'refit', 'statistics', 'means', 'constants'",
        ),
        ({"compensate": True}, r"compensate=True; expected one of"),
        ({"compensate": None}, r"compensate=None; expected one of"),
        ({"compensate": "means"}, r"compensate='means' runs data; give batches as data="),
        ({"compensate": "constants", "data": [1]}, r"no criterion looks at it \(l1\), nor does compensate='constants'"),
        ({"compensate": "refit", "data": [1], "batches": 0}, "batches must be a whole number of at least 1"),
        ({"compensate": "refit", "data": 3}, r"data is int; expected something that gives batches"),
        ({"config": CONFIG, "ratio": 0.5}, r"config= says which layers lose how much, and ratio=0.5 says something"),
        ({"config": CONFIG, "min_ratio": torch.zeros(2, 3)}, r"and min_ratio=.* says something else"),
        ({"config": CONFIG, "exclude": np.float32(0.5)}, r"and exclude=.* says something else"),
        ({"config": CONFIG, "scope": "global"}, r"and scope='global' says something else"),
        ({"config": CONFIG, "target_macs": 0.5}, r"and target_macs=0.5 says something else"),
        ({"config": CONFIG, "exclude": ["one"]}, r"and exclude=\['one'\] says something else"),
        ({"config": CONFIG, "criterion": lambda *_: None}, r"config= goes with the name of a criterion"),
        ({"config": CONFIG, "criterion": "apoz"}, r"criterion 'apoz' looks at activations; give batches"),
        ({"config": FINE}, r"sets single weights to zero \(pattern '4x1'\).*ConfigPruner.*choose_masks"),
        ({"config": [{"op_types": ["Conv2d"], "sparcity": 0.5}]}, r"config_list\[0\].*sparcity"),
        ({"config": "no.yaml"}, r"config file 'no.yaml' cannot be read"),
        ({"config": {"target_sparsity": 0.5, "pruning_step": 16}}, r"read_unipruning_config"),
    ],
)
def test_contradictions_and_what_is_missing_are_told_before_tracing(
    model: nn.Module, words: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "trace", None)  # a call of it would be another error
    with pytest.raises(ArgumentError, match=message):
        torchshear.prune(model, X, **words)


def test_empty_words_beside_a_config_say_nothing(model: nn.Module) -> None:
    said = torchshear.prune(model, X, config=CONFIG, exclude=(), roles=None, target_macs=None)
    assert kept(said.plan) == kept(torchshear.prune(model, X, config=CONFIG).plan)
    assert said.plan.n_cut > 0


@pytest.mark.parametrize("words", [{"criterion": "apoz"}, {"compensate": "means"}, {"compensate": "refit"}])
def test_data_does_not_reach_parts(model: nn.Module, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "trace", None)
    with pytest.raises(ArgumentError, match=r"submodules= and .*whole model, of which only part.*Prune each part by"):
        torchshear.prune(model, X, data=labelled(), batches=3, submodules=["part"], **words)


def test_what_has_no_statistics_is_told_before_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "trace", None)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ArgumentError, match="has no batch norm with running statistics"):
        torchshear.prune(plain, (torch.randn(2, 4),), data=[torch.randn(2, 4)], batches=1, compensate="statistics")


def test_data_that_does_not_fit(model: nn.Module) -> None:
    with pytest.raises(DataError, match="the loader ended after 3 of 32 batches"):
        torchshear.prune(model, X, criterion="apoz", data=labelled(), batches=32)
    with pytest.raises(TypeError, match=r"prune\(\) has no argument 'losses'; expected .* data, loss_fn"):
        torchshear.prune(model, X, losses=1)  # type: ignore[call-arg]
