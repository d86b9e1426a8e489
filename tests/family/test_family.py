"""A family against the single calls that it stands for, on a device of a known law."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchshear
from tests.latency_target.pretending import Pretended, pretend
from tests.speedup.latency.making_tables import ALIGNMENT, joined, probes_of, table_of_probes
from torchshear import _pictures
from torchshear.errors import ArgumentError, NotFasterError, OutputError, PlanError
from torchshear.family import PrunedFamily, _prune_family
from torchshear.family._record import render_family
from torchshear.latency_target import _planner as planner
from torchshear.speedup.latency import Device

RUNTIME = f"{Device().identity()['runtime']}, cpu {Device().identity()['cpu']}"
TARGETS = (0.5, 0.7, "1ms")


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    return pretend(monkeypatch)


def prune_family(**options: Any) -> PrunedFamily:
    model, args, _ = joined()
    return torchshear.prune_family(
        model, args, **({"align": ALIGNMENT, "targets": TARGETS, "progress": False} | options)
    )


def evaluate(model: nn.Module) -> float:
    """More the more parameters there are; spoils the model that it is given."""
    count = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return float(count)


def test_members_are_what_single_calls_give() -> None:
    model, args, _ = joined()
    data = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    words: dict[str, Any] = {"align": ALIGNMENT, "data": data, "batches": 2, "compensate": "refit", "progress": False}
    family = torchshear.prune_family(model, args, targets=TARGETS, evaluate=evaluate, **words)
    assert family.names == ("0.5", "0.7", "1ms")
    assert family.targets == TARGETS
    for target, member, score in zip(TARGETS, family.members, family.scores, strict=True):
        single = torchshear.prune(model, args, target_latency=target, **words)
        assert member is family[target]
        assert dict(member.plan.request) == dict(single.plan.request)
        assert {g.name: g.kept.tolist() for g in member.plan.groups} == {
            g.name: g.kept.tolist() for g in single.plan.groups
        }
        for name, tensor in single.model.state_dict().items():
            assert torch.equal(member.model.state_dict()[name], tensor), name
        assert member.verification is not None
        assert member.refit is not None
        assert member.allocation is not None
        assert single.allocation is not None
        assert member.allocation.loss == single.allocation.loss == member.allocation.round.loss > 0
        assert score == member.report.after.n_params
    assert family.dense_score == family.members[0].report.before.n_params
    assert family["1ms"] is family.members[2]


def test_members_meet_their_targets_and_are_measured_in_the_same_rounds() -> None:
    Pretended.power = 0.9
    family = prune_family()
    assert list(family.latency.results) == ["dense", *family.names]
    for name, target, member in zip(family.names, (0.5, 0.7, 1 / 3), family.members, strict=True):
        assert member.latency is not None
        assert 0.95 * target <= 1 / family.latency.speedup(name) <= target
        assert member.latency["pruned"].times_ms == family.latency[name].times_ms
        assert member.latency["dense"].times_ms == family.latency["dense"].times_ms
        assert member.report.latency["speedup"] == family.latency.speedup(name)


def test_one_trace_one_table_one_set_of_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for module, name in ((_prune_family, "trace"), (planner, "table_of"), (planner.Planner, "of")):
        real = getattr(module, name)

        def counted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    passes = list[int]()

    class Shuffled:
        """Gives other batches each time."""

        def __iter__(self) -> Iterator[torch.Tensor]:
            passes.append(len(passes))
            return iter([torch.randn(16, 3, 8, 8) for _ in range(2)])

    said: list[tuple[int, int, str]] = []
    prune_family(
        data=Shuffled(),
        batches=2,
        compensate="refit",
        criterion="reconstruction",
        progress=lambda *step: said.append(step),
    )
    assert calls == ["trace", "table_of", "of"]
    assert passes == [0]
    steps = [step for step in said if step[2].startswith("target")]
    assert [(done, total) for done, total, _ in steps] == [(number, 12) for number in range(12)]
    assert steps[0][2] == "target 0.7: choosing widths and measuring"  # the slowest first
    assert steps[-1][2] == "target 1ms: evaluating"
    assert {what for _, _, what in said[: said.index(steps[0])]} == {"collecting"}


def test_a_member_begins_where_the_one_before_it_ended() -> None:
    Pretended.power = 0.8
    together = prune_family(targets=[0.7, 0.5])
    n_together, Pretended.measured = Pretended.measured, 0
    model, args, _ = joined()
    for target in (0.7, 0.5):
        torchshear.prune(model, args, target_latency=target, align=ALIGNMENT)
    assert n_together < Pretended.measured
    assert len(together.members) == 2


def test_what_cannot_be_reached_is_said_before_anything_is_scored() -> None:
    with pytest.raises(PlanError, match=r"target_latency=0.01 is .* the fastest possible is"):
        prune_family(targets=[0.7, 0.01], criterion=never_called, evaluate=lambda model: 0.0)
    assert Pretended.measured == 0
    with pytest.raises(ArgumentError, match="the dense model takes 3 ms here already"):
        prune_family(targets=[0.7, "4ms"], criterion=never_called)


def never_called(group: Any, weights: Any, statistics: Any) -> torch.Tensor:
    raise AssertionError("scored before the targets were checked")


def test_a_member_that_is_not_faster_is_refused_as_soon_as_it_is_made() -> None:
    Pretended.power = -0.1
    seen: list[nn.Module] = []
    with pytest.raises(NotFasterError, match=r"the member for the target 0.7 is not measurably faster: .* 0.9"):
        prune_family(evaluate=lambda model: len(seen) + (seen.append(model) or 0.0))
    assert len(seen) == 1  # the dense model alone
    family = prune_family(must_be_faster=False)
    assert "0.7: not measurably faster than the dense model." in family.notes
    assert "0.5: The target was missed" in str(family)


def test_a_member_that_another_one_beats_is_told() -> None:
    family = prune_family(targets=[0.7, 0.5], evaluate=lambda model: -evaluate(model))
    assert family.notes == ("0.7: 0.5 is faster and no worse.",)


def test_the_table_and_the_plain_data_say_what_was_measured() -> None:
    family = prune_family(evaluate=evaluate)
    text = str(family)
    for heading in ("target", "ms", "of dense", "speed-up", "95% interval", "MACs", "params", "loss", "score"):
        assert heading in text
    assert all(len(line) <= 80 for line in render_family(family, 80).splitlines())
    assert "interval" not in render_family(family, 80)
    document = json.loads(family.to_json())
    assert document == json.loads(json.dumps(family.to_dict()))
    assert [one["target"] for one in document["members"]] == list(TARGETS)
    assert [one["latency_ms"] for one in document["members"]] == [family.latency[n].median_ms for n in family.names]
    assert document["dense"]["score"] == family.dense_score
    assert document["device"]["threads"] == 1
    assert repr(family) == "<PrunedFamily of Joined: 0.5, 0.7, 1ms>"
    assert "<table>" in family._repr_html_()


def test_files_are_there_as_a_whole_and_give_the_members_back(tmp_path: Path) -> None:
    family = prune_family(targets=[0.7, "1 ms"])
    family.save(tmp_path / "out")
    names = [f"{kind}-{name}.{end}" for name in ("0.7", "1ms") for kind, end in FILES.items()]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        [*names, "family.json", "family.png", "family.txt"]
    )
    assert (tmp_path / "out" / "family.txt").read_text().rstrip() == str(family)
    plan = torchshear.PruningPlan.load(tmp_path / "out" / "plan-1ms.json")
    assert plan.request["target_latency"] == "1 ms"
    assert plan.request["device"] == dict(Device().identity())
    assert repr(plan).endswith(f"for latency 1 ms on threads 1, batch 1, runtime {RUNTIME}>")
    assert [p.shape for p in torchshear.shrink(joined()[0], plan).parameters()] == [
        p.shape for p in family["1 ms"].model.parameters()
    ]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="it holds 'family.json'. Expected a new or empty folder"):
        family.save(tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="it is a file"):
        family.save(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot write into"):
        family.save(tmp_path / "no" / "out")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "file"])


FILES = {"plan": "json", "model": "safetensors", "pruned": "onnx"}


def test_nothing_is_left_where_a_member_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = prune_family(targets=[0.7])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchshear.family._files.save_model", full)
    with pytest.raises(OutputError, match="No space left on device"):
        family.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = prune_family(evaluate=evaluate)
    for name in ("one.png", "one.svg"):
        family.draw(tmp_path / name)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    scores, losses = family._figure().axes
    assert {text.get_text() for text in losses.texts} == {"dense", *family.names}
    assert scores.get_title() == "score, higher is better"
    (line,) = losses.get_lines()[:1]
    ms = sorted(one.median_ms for one in family.latency.results.values())
    assert list(line.get_xdata()) == ms
    assert len(prune_family()._figure().axes) == 1
    with pytest.raises(ArgumentError, match="expected a name that ends in .png"):
        family.draw(tmp_path / "one.bmp")
    monkeypatch.setattr(_pictures.importlib, "import_module", missing)
    with pytest.raises(ArgumentError, match=r"Install torchshear\[demo\]"):
        family.draw(tmp_path / "two.png")


def missing(name: str) -> None:
    raise ImportError(name)


def test_a_table_stands_for_its_device() -> None:
    _, _, groups = joined()
    identity = dict(Device().identity()) | {"inputs": ["float32[3, 8, 8]"]}
    table = table_of_probes(groups, probes_of(groups), identity)
    assert prune_family(targets=[0.6], device=table).table is table
    assert prune_family(targets=[0.6], device=prune_family(targets=[0.6], device=table).table).names == ("0.6",)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"targets": []}, r"targets=\[\]; expected several targets of latency, as \[0.7, 0.5, '3.5ms'\]"),
        ({"targets": 0.5}, "targets=0.5; expected several"),
        ({"targets": "0.5"}, "targets='0.5'; expected several"),
        ({"targets": [0.5, -1]}, "target_latency=-1; expected a share"),
        ({"targets": [0.5, 2.0]}, "milliseconds with their unit"),
        ({"targets": [0.7, "0.70"]}, "'0.70' stands twice"),
        ({"targets": ["3ms", 0.5, "3.0 MS"]}, "'3.0 MS' stands twice"),
        ({"evaluate": 0.5}, "evaluate is float; expected a function"),
        ({"ratio": 0.5}, "ratio is float; expected a mapping"),
        ({"must_be_faster": None}, "must_be_faster=None; expected True or False"),
        ({"device": "cpu"}, "device='cpu'; expected"),
        ({"evaluate": lambda model: "high"}, "evaluate gave 'high' of type str for the dense model"),
        ({"scope": "global"}, "scope"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        prune_family(criterion=never_called, **options)
    assert Pretended.measured == 0


def test_no_member_has_an_unknown_target() -> None:
    family = prune_family(targets=[0.7])
    for unknown in (0.5, "0.5", None, [0.7]):
        with pytest.raises(ArgumentError, match="no member for the target .*; there are 0.7"):
            family[unknown]  # type: ignore[index]
