"""Compensation as a word of `prune` and `compare`: the same as stage by stage, on data that serves criteria as well."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
import torchshear.comparison
from tests.networks import Classifier, LooksAtValues, image, labelled
from torchshear import _making
from torchshear.comparison import _compare
from torchshear.errors import ArgumentError, DataError, VerificationError
from torchshear.pruners import plan_from_kept
from torchshear.report import PruningReport, make_report
from torchshear.speedup import Refit, TracedModule, refit
from torchshear.speedup.compensation import _frontier, _refit_pass
from torchshear.speedup.compensation._refit_record import RefittedLayer, SkippedLayer

X = (image(size=6),)
METHODS = ("refit", "statistics", "means", "constants")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Classifier().eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Three batches of 16 pictures with targets."""
    source = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 6, 6, generator=source), torch.randint(0, 4, (16,), generator=source)) for _ in "abc"]


def images() -> list[Tensor]:
    return [x for x, _ in batches()]


def words_of(method: str) -> dict[str, Any]:
    return {"compensate": method} | ({} if method == "constants" else {"data": batches(), "batches": 3})


def assert_equal(one: nn.Module, other: nn.Module, slack: float = 0.0) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=slack, atol=slack)


@pytest.mark.parametrize("form", ["auto", "traced"])
@pytest.mark.parametrize("method", METHODS)
def test_one_call_gives_what_the_stages_give(model: nn.Module, method: Any, form: Any) -> None:
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = torchshear.prune(model, X, form=form)
    result = torchshear.prune(model, X, criterion="l1", form=form, **words_of(method))
    loader = () if method == "constants" else (images(),)
    expected = torchshear.compensate(model, plain.model, plain.plan, *loader, method=method, batches=3, progress=False)
    assert_equal(result.model, expected, slack=1e-5)
    assert any(
        not torch.equal(result.model.state_dict()[key], value) for key, value in plain.model.state_dict().items()
    )
    assert result.form == ("traced" if form == "traced" else "native")
    assert isinstance(result.model, TracedModule) == (form == "traced")
    assert result.compensation == method
    assert (result.refit is None, result.fold is None) == (method != "refit", method in ("refit", "statistics"))
    assert result.report.refit is result.refit
    assert result.verification is not None
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())


def test_a_refit_brings_the_outputs_nearer(model: nn.Module) -> None:
    plain, fitted = torchshear.prune(model, X), torchshear.prune(model, X, **words_of("refit"))
    fresh = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(7))
    before, after = ((one.model(fresh) - model(fresh)).square().sum() for one in (plain, fitted))
    assert after < before / 4
    assert fitted.refit is not None
    assert fitted.refit.is_kept
    assert fitted.refit.error_after < fitted.refit.error_before
    assert (fitted.refit.n_samples, fitted.refit.n_held_out) == (36, 12)


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize("method", ["refit", "statistics", "means"])
def test_one_iterator_serves_a_criterion_of_gradients_and_the_compensation(
    model: nn.Module, method: Any, kind: Any
) -> None:
    gradient: dict[str, Any] = {"criterion": "taylor", "loss_fn": functional.cross_entropy, "batches": 3}
    result = torchshear.prune(model, X, data=kind(batches()), compensate=method, **gradient)
    plain = torchshear.prune(model, X, data=batches(), **gradient)
    expected = torchshear.compensate(model, plain.model, plain.plan, images(), method, batches=3, progress=False)
    assert_equal(result.model, expected, slack=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_loses_nothing_stays_what_it_is(model: nn.Module, method: Any) -> None:
    result = torchshear.prune(model, X, ratio=0.0, **words_of(method))
    if method == "statistics":  # those of other data
        assert_equal(result.model, torchshear.recalibrate(model, images(), 3, progress=False))
    else:
        torch.testing.assert_close(result.model(X[0]), model(X[0]), rtol=1e-6, atol=1e-6)


def test_new_statistics_of_a_model_whose_part_is_pruned() -> None:
    torch.manual_seed(0)
    model = LooksAtValues(Classifier()).eval()
    result = torchshear.prune(model, X, submodules=["part"], **words_of("statistics"))
    plain = torchshear.prune(model, X, submodules=["part"])
    assert_equal(result.model, torchshear.recalibrate(plain.model, images(), 3, progress=False))
    assert any(
        not torch.equal(result.model.state_dict()[key], value) for key, value in plain.model.state_dict().items()
    )


def test_a_refit_goes_with_its_own_criterion_unless_another_is_named(model: nn.Module) -> None:
    def criterion_of(**words: Any) -> Any:
        return torchshear.prune(model, X, **words).plan.request["criterion"]

    assert criterion_of() == criterion_of(**words_of("statistics")) == "l1"
    assert criterion_of(**words_of("refit")) == "reconstruction"
    assert criterion_of(criterion="l2", **words_of("refit")) == "l2"
    assert criterion_of(prunable_outputs="0", **words_of("refit")) == "l1"  # no layer reads an output


def test_bad_data_and_a_wrong_result_are_errors_after_the_proof(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved: list[Any] = []
    shrink = _making.shrink_to_form

    def spy(*args: Any, **kwargs: Any) -> Any:
        proved.append(shrink(*args, **kwargs).verification)
        return shrink(*args, **kwargs)

    monkeypatch.setattr(_making, "shrink_to_form", spy)
    broken = [(torch.full((8, 3, 6, 6), torch.nan), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(DataError, match="NaN"):
        torchshear.prune(model, X, criterion="l1", compensate="refit", data=broken, batches=1)
    assert proved[0] is not None
    with pytest.raises(DataError, match="ended after 3 of 9"):
        torchshear.prune(model, X, criterion="l1", compensate="refit", data=batches(), batches=9)
    with pytest.raises(DataError):
        torchshear.prune(model, X, criterion="l1", compensate="refit", data=[torch.randn(4, 5)], batches=1)

    def wrong(*_: Any, **__: Any) -> Any:
        raise VerificationError("it does not compute what was fitted")

    monkeypatch.setattr("torchshear.compensation.refit", wrong)
    with pytest.raises(VerificationError, match="what was fitted"):
        torchshear.prune(model, X, criterion="l1", compensate="refit", data=batches(), batches=3)


def test_a_loader_is_not_run_before_the_proof(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    shrink = _making.shrink_to_form

    def shrunk(*args: Any, **kwargs: Any) -> Any:
        order.append("proof")
        return shrink(*args, **kwargs)

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            order.append("data")
            return iter(batches())

    monkeypatch.setattr(_making, "shrink_to_form", shrunk)
    torchshear.prune(model, X, criterion="l1", compensate="refit", data=Loader(), batches=3)
    assert order == ["proof", "data"]


# -- report -----------------------------------------------------------------------------------------------------------


def test_the_report_shows_each_layer_the_outputs_and_the_samples(model: nn.Module) -> None:
    report = torchshear.prune(model, X, **words_of("refit")).report
    assert report.refit is not None
    text = str(report)
    table = text.partition("Refit: error of layers on samples held out")[2]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == [layer.name for layer in report.refit.layers]
    assert rows[-1][0] == "out"
    assert rows[-1][2:4] == [
        f"{e:.3g}" for e in (report.refit.layers[-1].error_before, report.refit.layers[-1].error_after)
    ]
    assert rows[-1][1::3] == ["linear", "least squares"]
    errors = f"{report.refit.error_before:.3g} -> {report.refit.error_after:.3g}"
    assert f"outputs     relative squared error {errors} on 12 samples held out; fitted to 36 others" in text
    assert "not kept" not in text
    assert "left alone" not in text
    document = json.loads(json.dumps(report.to_dict()))["refit"]
    assert document["error_after"] == report.refit.error_after
    assert document["layers"][-1]["name"] == "out"
    page = report._repr_html_()
    assert "<b>Refit: error of layers on samples held out</b>" in page
    assert page.count("<table>") == 2
    plain = torchshear.prune(model, X).report
    assert (plain.refit, plain.to_dict()["refit"]) == (None, None)
    assert "Refit" not in str(plain) + plain._repr_html_()


def reported(model: nn.Module, **words: Any) -> PruningReport:
    layers = (RefittedLayer("one", "linear", 0.5, 1e-15, ""), RefittedLayer("", "norm", torch.inf, 0.25, "affine"))
    skipped = (*(SkippedLayer(f"cell.{i}", "a recurrent layer") for i in range(6)), SkippedLayer("", "no values"))
    record = Refit(layers, skipped, 3000, 1000, 0.5, 0.75, **words)
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, X)))
    return make_report(plan, refit=record)


def test_layers_left_alone_are_counted_by_reason(model: nn.Module) -> None:
    text = str(reported(model))
    assert "left alone (7):\n  6 x a recurrent layer\n      cell.0, cell.1, cell.2, cell.3 and 2 more\n" in text
    assert "  1 x no values\n      (the model)" in text
    assert "1,000 samples held out; fitted to 3,000 others" in text
    for line in (
        "│ one         │ linear │          0.5 │           0 │ stays as it was │",
        "│ (the model) │ norm   │          inf │",
    ):
        assert line in text


def test_a_refit_that_is_not_kept_says_so(model: nn.Module) -> None:
    report = reported(model, is_kept=False)
    line = "not kept    the outputs got worse on the samples held out: the model is as it was after the cut"
    for shown in (str(report), report._repr_html_()):
        assert line in shown
        assert "Refit, not kept: error of layers on samples held out" in shown


def test_a_refit_that_is_not_kept_returns_the_cut_model(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([1.0, 2.0])
    monkeypatch.setattr("torchshear.speedup.compensation._refit.output_error", lambda *_: next(errors))
    result = torchshear.prune(model, X, criterion="l1", **words_of("refit"))
    assert result.refit is not None
    assert not result.refit.is_kept
    assert_equal(result.model, torchshear.prune(model, X).model)
    assert "not kept" in str(result.report)


# -- compare ----------------------------------------------------------------------------------------------------------


def evaluate(model: nn.Module) -> float:
    with torch.no_grad():
        return float(-functional.cross_entropy(model(labelled(1)[0][0]), labelled(1)[0][1]))


@pytest.mark.parametrize("method", METHODS)
def test_criteria_are_compared_after_each_compensation(model: nn.Module, method: Any) -> None:
    words = words_of(method)
    if "data" in words:
        words["data"] = iter(words["data"])
    found = torchshear.comparison.compare(model, evaluate, X, criteria=["l1", "l2"], ratio=0.5, seeds=(0,), **words)
    assert found.compensation == method
    for name in ("l1", "l2"):
        row = found.row(name, "ratio 0.5")
        assert row.scores == (evaluate(torchshear.prune(model, X, criterion=name).model),)
        single = torchshear.prune(model, X, criterion=name, **words_of(method))
        assert row.compensated == pytest.approx((evaluate(single.model),), rel=1e-4)
        assert row.final == row.compensated != row.scores
        assert f"after {method}" in str(found)


def test_a_compensation_that_fails_is_a_row_with_its_reason(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise VerificationError("it does not compute what was fitted")
        return refit(*args, **kwargs)

    monkeypatch.setattr("torchshear.compensation.refit", sometimes)
    found = torchshear.comparison.compare(model, evaluate, X, criteria=["l1"], seeds=(0,), **words_of("refit"))
    assert [row.reason for row in found.rows] == ["", "it does not compute what was fitted", ""]


def test_bad_words_of_compare_are_told_before_tracing(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compare, "trace", None)

    def compared(model: nn.Module = model, **words: Any) -> None:
        torchshear.comparison.compare(model, evaluate, X, criteria=["l1"], **words)

    with pytest.raises(ArgumentError, match="compensate='refits'; expected one of 'none', 'refit'"):
        compared(compensate="refits")
    with pytest.raises(ArgumentError, match="compensate='refit' runs data; give batches as data="):
        compared(compensate="refit")
    with pytest.raises(ArgumentError, match="nor does compensate='constants'"):
        compared(compensate="constants", data=batches())
    with pytest.raises(ArgumentError, match="submodules= and compensate='refit': batches are for the whole model"):
        compared(compensate="refit", data=batches(), submodules=["part"])
    with pytest.raises(ArgumentError, match="has no batch norm with running statistics"):
        compared(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), compensate="statistics", data=batches())


def test_data_that_does_not_fit_ends_a_comparison(model: nn.Module) -> None:
    said: list[str] = []
    with pytest.raises(DataError):
        torchshear.comparison.compare(
            model, evaluate, X, compensate="refit", data=[torch.randn(4, 5)], batches=1, criteria=["l1", "l2"],
            progress=lambda done, total, what: said.append(what),
        )  # fmt: skip
    assert not any("l1" in line for line in said)


@pytest.mark.parametrize("given", [None, 1, 12_345])
def test_memory_is_what_a_refit_may_take(model: nn.Module, given: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    class Watched(_frontier.Frontier):
        def __init__(self, limit: int, *rest: Any) -> None:
            limits.append(limit)
            super().__init__(limit, *rest)

    monkeypatch.setattr(_refit_pass, "Frontier", Watched)
    result = torchshear.prune(model, X, memory=given, **words_of("refit"))
    expected = torchshear.prune(model, X, **words_of("refit"))
    assert_equal(result.model, expected.model, slack=1e-5)
    torchshear.comparison.compare(
        model, lambda one: 1.0, X, criteria=["l1"], seeds=(0,), memory=given, progress=False, **words_of("refit")
    )
    wanted = 2 * 10**9 if given is None else given
    assert limits == [wanted, 2 * 10**9, *[wanted] * (len(limits) - 2)]
    assert len(limits) > 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"memory": 10**6}, "memory= is what a refit may take; give it with compensate='refit'"),
        ({"memory": 10**6, **words_of("constants")}, "memory= is what a refit may take"),
        ({"memory": 0, **words_of("refit")}, "memory must be a whole number"),
        ({"memory": "2GB", **words_of("refit")}, "memory must be a whole number"),
        ({"memory": 2**63, **words_of("refit")}, "memory"),
    ],
)
def test_memory_that_says_nothing(model: nn.Module, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        torchshear.prune(model, X, **words)


def test_frozen_norms_that_get_new_statistics_are_named() -> None:
    """Layers in front of them give a constant more than before, which statistics alone can make up for."""
    torch.manual_seed(0)
    given: tuple[dict[str, Any], ...] = ({"momentum": 0.0}, {}, {"momentum": None})
    norms = [nn.BatchNorm2d(3, affine=False, **words) for words in given]
    shifts = [nn.Parameter(torch.zeros(1, 3, 1, 1)) for _ in norms]

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms, self.shifts = nn.ModuleList(norms), nn.ParameterList(shifts)

        def forward(self, x: Tensor) -> Tensor:
            for norm, shift in zip(self.norms, self.shifts, strict=True):
                x = norm(x + shift)
            return x

    model = torchshear.recalibrate(Shifted().eval(), images(), 3, frozen=True, progress=False)
    plan = plan_from_kept(torchshear.analyze(torchshear.trace(model, X)), {})
    spoiled: Any = torchshear.shrink(model, plan)
    with torch.no_grad():
        for shift in spoiled.shifts:
            shift += 1
    record = refit(model, spoiled, plan, images(), batches=3, progress=False)[1]
    methods = {layer.name: layer.method for layer in record.layers if layer.kind == "norm"}
    assert methods == {"norms.0": "statistics, though frozen", "norms.1": "statistics", "norms.2": "statistics"}


def test_prune_says_how_far_its_data_has_been_run(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[tuple[int, int, str]] = []
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = [torch.randn(16, 4) for _ in range(2)]
    asked: dict[str, Any] = {"data": data, "batches": 2, "compensate": "refit"}
    torchshear.prune(model, data[0], progress=lambda *step: said.append(step), **asked)
    whats = list(dict.fromkeys(what for _, _, what in said))
    assert whats[0] == "collecting"
    assert len(whats) == 2
    assert all(done <= total for done, total, _ in said)
    torchshear.prune(model, data[0], progress=False, **asked)
    assert capsys.readouterr() == ("", "")
