"""Criteria compared: every score is that of the model which the single call gives, and controls are what they say."""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Classifier, LooksAtValues, image, labelled
from torchshear import _pictures
from torchshear.comparison import Comparison, _compare, _picture, compare
from torchshear.comparison._record import render_comparison
from torchshear.comparison._row import Row
from torchshear.errors import ArgumentError, DataError, OutputError, PlanError
from torchshear.pruners import random_criterion
from torchshear.pruners.criteria._criterion import needs_of

MACS = "at most 50% of the MACs"


X = (image(size=6),)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Classifier(torch.sigmoid).eval()


def evaluate(model: nn.Module) -> float:
    with torch.no_grad():
        return float(-functional.cross_entropy(model(labelled(1)[0][0]), labelled(1)[0][1]))


DATA: dict[str, Any] = {"data": labelled(), "loss_fn": functional.cross_entropy, "batches": 3}


def test_scores_are_those_of_single_calls(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    words: dict[str, Any] = {"scope": "global", "compensate": "statistics", "seeds": (3, 4), **DATA}
    found = compare(model, evaluate, X, criteria=["l1", "taylor"], target_macs=(0.5, 0.3), **words)
    assert found.budgets == (MACS, "at most 30% of the MACs")
    assert {row.criterion for row in found.rows} == {"uniform", "random", "l1", "taylor"}
    assert (len(found.rows), found.n_batches, found.before) == (8, 3, evaluate(model))
    for share, budget in zip((0.5, 0.3), found.budgets, strict=True):
        for name in ("l1", "taylor"):
            row = found.row(name, budget)
            data = DATA if name == "taylor" else {}
            single = torchshear.prune(model, X, criterion=name, scope="global", target_macs=share, **data)
            assert row.scores == (evaluate(single.model),)
            assert row.compensated == (evaluate(torchshear.recalibrate(single.model, labelled(), 3)),)
            assert row.macs_share == single.report.after.macs / single.report.before.macs <= share
            assert row.params_share == single.report.after.n_params / single.report.before.n_params
        random = found.row("random", budget)
        singles = [
            torchshear.prune(model, X, criterion=random_criterion(seed), scope="global", target_macs=share)
            for seed in (3, 4)
        ]
        assert random.scores == tuple(evaluate(single.model) for single in singles)
        assert random.score == fmean(random.compensated)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("words", [{}, {"scope": "global", "normalize": "none"}, {"group_reduction": "normalized"}])
def test_the_uniform_control_keeps_first_channels_of_all_groups_alike(model: nn.Module, words: dict[str, Any]) -> None:
    seen: list[Any] = []

    def keep(model: nn.Module) -> float:
        seen.append(model)
        return float(len(seen))

    compare(model, keep, X, criteria=["l1"], ratio=0.5, seeds=(0,), **words)
    uniform = seen[1]  # behind the dense model
    for name, (rows, columns) in {"one": (4, 3), "two": (6, 4), "three": (5, 6), "out": (4, 5)}.items():
        small, dense = uniform.get_submodule(name).weight, model.get_submodule(name).weight
        assert torch.equal(small, dense[:rows, :columns]), name
    assert torch.equal(uniform.norm.weight, model.norm.weight[:4])


def test_the_network_is_traced_and_seen_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("trace", "collect"):
        real = getattr(_compare, name)

        def counted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(_compare, name, counted)
    said: list[tuple[int, int, str]] = []
    found = compare(model, evaluate, X, target_macs=0.4, seeds=(0,), progress=lambda *step: said.append(step), **DATA)
    assert calls == ["trace", "collect"]
    assert set(torchshear.pruners.registered_criteria()) | {"uniform"} == {row.criterion for row in found.rows}
    n_rows = len(torchshear.pruners.registered_criteria()) + 1
    assert [done for done, _, _ in said] == [0, 0, 0, *range(n_rows)]
    assert {total for _, total, _ in said} == {n_rows}
    assert "taylor, at most 40% of the MACs" in {what for _, _, what in said}
    assert not found.left_out


def test_without_a_loss_or_data_the_rest_is_left_out_with_its_reason(model: nn.Module) -> None:
    found = compare(model, evaluate, X, seeds=(0,))
    without_data = {name for name in torchshear.pruners.registered_criteria() if not needs_of(name)}
    assert {"l1", "bn_scale"} < without_data
    assert {row.criterion for row in found.rows} == without_data | {"uniform"}
    assert found.left_out["apoz"].startswith("looks at activations; give batches as data=")
    assert "Not compared: gradient, group_fisher" in str(found)
    assert all(row.macs_share is not None and row.macs_share <= 0.5 for row in found.rows)


def test_a_criterion_that_cannot_score_is_a_row_with_its_reason(model: nn.Module) -> None:
    model.norm = nn.Identity()  # type: ignore[assignment]
    found = compare(model, evaluate, X, criteria=["bn_scale", "taylor", "l1", "random"], seeds=(0,))
    assert [row.criterion for row in found.rows] == ["uniform", "random", "bn_scale", "taylor", "l1"]
    assert "no norm with a scale" in found.row("bn_scale", MACS).reason
    assert found.row("taylor", MACS).reason.startswith("looks at gradients; give batches")
    assert found.row("l1", MACS).reason == ""
    assert [row.criterion for row in found.ranked(MACS)][-2:] == ["bn_scale", "taylor"]


def test_groups_that_a_criterion_does_not_score_are_told(model: nn.Module) -> None:
    found = compare(model, evaluate, X, criteria=["bn_scale", "l1"], exclude=["out"], ratio=0.5, seeds=(0,))
    row = found.row("bn_scale", "ratio 0.5")
    assert row.note == "1 of 3 groups stay whole: no norm with a scale among its layers"  # that of `three` is excluded
    assert found.row("l1", "ratio 0.5").note == ""
    assert "not of the same size as the uniform network, and so not comparable with it: bn_scale" in str(found)


def test_scores_are_given_in_eval_mode_from_one_random_state_on_copies(model: nn.Module) -> None:
    seen: list[bool] = []

    def spoil(model: nn.Module) -> float:
        seen.append(model.training)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1e3)
        return float(torch.rand(()))

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    state = torch.get_rng_state()
    found = compare(
        model, spoil, X, criteria=["l1", "l2"], seeds=(0, 1), compensate="statistics", data=labelled(), batches=3
    )
    assert seen == [False] * 11  # dense, and (2 seeds + 3) before and after
    assert {score for row in found.rows for score in (*row.scores, *row.compensated)} == {found.before}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_all_see_the_same_batches(model: nn.Module) -> None:
    passes: list[int] = []

    class Loader:
        """Gives other batches in each pass, as one that shuffles."""

        def __iter__(self) -> Any:
            passes.append(1)
            return iter([(x + len(passes) - 1, y) for x, y in labelled()])

    words: dict[str, Any] = {"criteria": ["l1", "apoz"], "seeds": (0,), "compensate": "statistics", "batches": 3}
    found = compare(model, evaluate, X, data=Loader(), **words)
    assert len(passes) == 1
    listed = compare(model, evaluate, X, data=labelled(), **words)
    for row, again in zip(found.rows, listed.rows, strict=True):  # two runs differ by rounding, as memory is aligned
        assert row.compensated == pytest.approx(again.compensated, rel=1e-5)


def test_parts_of_a_model_are_compared() -> None:
    torch.manual_seed(0)
    model = LooksAtValues(Classifier(torch.sigmoid)).eval()
    found = compare(model, evaluate, X, criteria=["l1"], ratio=0.5, submodules=["part"], seeds=(0,))
    single = torchshear.prune(model, X, ratio=0.5, submodules=["part"])
    assert found.row("l1", "ratio 0.5").scores == (evaluate(single.model),)


def test_a_function_may_be_compared(model: nn.Module) -> None:
    def last_units(group: Any, weights: Any, statistics: Any) -> Tensor:
        return torch.arange(group.width, dtype=torch.float64)

    found = compare(model, evaluate, X, criteria=[last_units], seeds=(0,))
    single = torchshear.prune(model, X, criterion=last_units, target_macs=0.5)
    assert found.row("last_units", MACS).scores == (evaluate(single.model),)


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64), 1])
def test_numbers_of_any_kind_are_scores(model: nn.Module, value: Any) -> None:
    found = compare(model, lambda _: value, X, criteria=["l1"], seeds=(0,))
    assert found.before == float(value)
    assert type(found.before) is float


def failing(model: nn.Module) -> float:
    raise KeyError("test set")


def of_cut_models(value: Any) -> Any:
    return lambda model: 1.0 if model.one.out_channels == 8 else value


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (failing, r"evaluate fails on the dense model: KeyError: 'test set'\. Expected a function of a model"),
        (lambda _: "0.9", r"evaluate gave '0.9' of type str for the dense model; expected a number"),
        (lambda _: True, r"evaluate gave True of type bool"),
        (lambda _: None, r"evaluate gave None of type NoneType"),
        (lambda _: torch.ones(2), r"evaluate gave .* of type Tensor"),
        (lambda _: float("nan"), r"evaluate gave nan for the dense model; expected a finite number"),
        (of_cut_models("x"), r"evaluate gave 'x' of type str for the model pruned by uniform, at most 50% of the MACs"),
    ],
)
def test_evaluations_that_fail_are_errors(model: nn.Module, function: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compare(model, function, X, criteria=["l1"], seeds=(0,))


def test_a_score_that_is_not_finite_after_the_cut_is_a_row(model: nn.Module) -> None:
    found = compare(model, of_cut_models(float("-inf")), X, criteria=["l1"], seeds=(0,))
    assert {row.reason for row in found.rows} == {"evaluate gave -inf after the cut"}
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["before"] == 1.0
    assert "evaluate gave -inf" in str(found)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"criteria": ["tailor"]}, ArgumentError, r"criterion='tailor'; .*Did you mean 'taylor'"),
        ({"criteria": "l1"}, ArgumentError, r"criteria='l1'; expected several, as in \['l1'\]"),
        ({"criteria": [lambda: 1, lambda: 2]}, ArgumentError, r"two have the name '<lambda>'"),
        ({"criteria": ["l1"], "data": [1]}, ArgumentError, r"data is given, and no criterion looks at it \(l1\)"),
        ({"loss_fn": functional.cross_entropy}, ArgumentError, r"loss_fn= is given without data"),
        ({"target_macs": 0.5, "ratio": 0.5}, ArgumentError, r"target_macs=0.5 and ratio=0.5: expected one kind"),
        ({"target_macs": [0.5, 0.5]}, ArgumentError, r"expected a number, or several different ones"),
        ({"target_macs": [0.5, 0.5000001]}, ArgumentError, r"expected a number, or several different ones"),
        ({"seeds": 3}, ArgumentError, r"seeds=3; expected one or more integers"),
        ({"target_macs": "0.5"}, ArgumentError, r"target_macs='0.5'; expected a number"),
        ({"target_macs": []}, ArgumentError, r"target_macs=\[\]; expected a number"),
        ({"target_macs": -1}, ArgumentError, r"target_macs=-1; expected what may be left"),
        ({"ratio": 1.5}, ArgumentError, r"ratio=1.5; expected a number in \[0, 1\)"),
        ({"scope": "globl"}, ArgumentError, r"scope='globl'; expected .*Close to it: global"),
        ({"seeds": ()}, ArgumentError, r"seeds=\(\); expected one or more integers"),
        ({"seeds": (1, 1)}, ArgumentError, r"seeds=\(1, 1\); expected one or more integers, each once"),
        ({"seeds": (0.5,)}, ArgumentError, r"seeds=\(0.5,\); expected one or more integers"),
        ({"target_macs": 0.0001}, PlanError, r"the best possible is"),
        ({"exclude": ["four"]}, ArgumentError, r"exclude: 'four' fits no parameter"),
        ({"batches": 9, "data": labelled()}, DataError, r"ended after 3 of 9 batches"),
    ],
)
def test_bad_words(model: nn.Module, words: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare(model, evaluate, X, **words)


def test_unknown_words(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"compare\(\) has no argument 'config'; expected model, evaluate"):
        compare(model, evaluate, X, config=[])  # type: ignore[call-arg]


def made(*rows: Row, before: float = 0.9) -> Comparison:
    return Comparison("Net", before, ("b",), rows, (0, 1), compensation="statistics")


ROWS = (
    Row("uniform", "b", True, 0.9, (0.5,), (0.7,), 0.5, 0.5, 0.1),
    Row("random", "b", True, 0.9, (0.2, 0.4), (0.6, 0.72), 0.5, 0.5, 0.1),
    Row("l1", "b", False, 0.9, (0.6,), (0.8,), 0.5, 0.5, 0.1),
    Row("activation_variance", "b", False, 0.9, (0.6,), (0.65,), 0.5, 0.5, 0.1),
    Row("apoz", "b", False, 0.9, reason="no activation"),
)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_ranks_by_the_last_score(width: int) -> None:
    lines = render_comparison(made(*ROWS), width).splitlines()
    assert max(map(len, lines)) <= width
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [row[0] for row in cells] == [
        "(before)", "l1", "control: uniform", "control: random", "activation_variance", "apoz",
    ]  # fmt: skip
    spread = f"0.300 ±{stdev((0.2, 0.4)):.3f}"
    assert cells[3] == ["control: random", "50.0%", "50.0%", spread, f"0.660 ±{stdev((0.6, 0.72)):.3f}", "0.10"]
    assert cells[-1] == ["apoz", "-", "-", "-", "-", "-"]
    text = " ".join(" ".join(lines).split())
    assert "random: mean and standard deviation over seeds 0, 1; scores after statistics from 0.600 to 0.720" in text
    assert "no better than random channels: activation_variance" in text
    assert "apoz: no activation" in text


def test_long_numbers_fit_narrow_terminals() -> None:
    rows = (
        Row("uniform", "b", True, -0.69, (-0.69163,), (-0.69164,), 0.5, 0.5, 0.1),
        Row("random", "b", True, -0.69, (-0.69111, -0.69222), (-0.69001, -0.69002), 0.5, 0.5, 0.1),
        Row("activation_variance", "b", False, -0.69, (-0.69163,), (-0.69165,), 0.5, 0.5, 0.1),
        Row(
            "a_function_with_a_name_that_is_longer_than_others", "b", False, -0.69, (-0.69163,), (-0.7,), 0.5, 0.5, 0.1
        ),
    )
    for width in (80, 120):
        text = render_comparison(made(*rows, before=-0.69), width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        assert "±0.0008" in text


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ((0.9, 0.9), "0.900"),
        ((0.0, 0.0), "0"),
        ((-2000.0, -50.0), "-50"),
        ((-0.0001, 0.002), "0.00200"),
        ((5, 97), "97.0"),
    ],
)
def test_three_digits_of_what_scores_differ_by_are_shown(scores: tuple[float, float], shown: str) -> None:
    text = str(made(Row("uniform", "b", True, scores[0], (scores[1],), (), 0.5, 0.5, 0.1), before=scores[0]))
    assert f" {shown} │" in text


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    made(*ROWS).draw(tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    panels = {"b": ROWS, "c": ROWS}
    figure = _picture._figure("title", 0.9, panels, "refit")
    assert len(figure.axes) == 2
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["uniform (control)", "random (control)", "l1", "activation_variance", "apoz"]
    cut, last = (
        points.get_offsets().tolist() for points in figure.axes[1].collections if len(points.get_offsets()) == 4
    )
    assert [x for x, _ in cut] == pytest.approx([0.5, 0.3, 0.6, 0.6])
    assert last == [pytest.approx(pair) for pair in ([0.7, 0], [0.66, 1], [0.8, 2], [0.65, 3])]
    assert [text.get_text() for text in figure.axes[1].texts] == ["not scored"]


def test_pictures_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"cannot draw into .*one.bmp'; expected a name that ends in .png"):
        made(*ROWS).draw(tmp_path / "one.bmp")

    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    with pytest.raises(OutputError, match="cannot write"):
        made(*ROWS).draw(tmp_path / "no" / "one.png")
    monkeypatch.setattr(_pictures.importlib, "import_module", missing)
    with pytest.raises(ArgumentError, match=r"drawing needs matplotlib, .* Install torchshear\[demo\]"):
        made(*ROWS).draw(tmp_path / "one.png")
    assert not list(tmp_path.iterdir())
