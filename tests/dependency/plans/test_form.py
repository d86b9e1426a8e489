"""What made the form of a result: written into a plan's file, read again, and its damage found."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import torchshear
from tests.networks import Residual, image, randomise
from tests.plan_files import edit_plan
from torchshear import PruningPlan
from torchshear.dependency.plans._form import Form, OutputSlice, Slot
from torchshear.errors import PlanError

FORM = Form(
    "native",
    "as it is",
    {Slot("", "n"): 3, Slot("a.b", "sizes", 1): 4, Slot("a", "config", "heads"): 5},
    {
        OutputSlice("a.q"): 0.5**0.5,
        OutputSlice("a.qkv", -1, 24, (0, 1, 2, 7)): 0.1,
        OutputSlice("a.map", -3, 8, (0, 7)): 1.5,
    },
)


@pytest.fixture
def plan() -> PruningPlan:
    made = torchshear.plan(torchshear.analyze(torchshear.trace(randomise(Residual()).eval(), (image(),))), ratio=0.5)
    return replace(made, form=FORM)


def same(form: Form | None) -> Any:
    return form.kind, form.reason, list(form.sizes.items()), list(form.factors.items()), dict(form.parts)


def test_a_form_survives_its_file_number_by_number(plan: PruningPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert same(PruningPlan.load(tmp_path / "plan.json").form) == same(FORM)


def test_a_plan_that_made_no_form_yet_records_none(plan: PruningPlan, tmp_path: Path) -> None:
    replace(plan, form=None).save(tmp_path / "plan.json")
    assert "form" not in json.loads((tmp_path / "plan.json").read_text())
    assert PruningPlan.load(tmp_path / "plan.json").form is None


def test_composed_plans_record_no_form() -> None:
    first = torchshear.prune(randomise(Residual()).eval(), (image(),))
    second = torchshear.prune(first.model, (image(),))
    assert first.plan.form is not None
    assert first.plan.then(second.plan).form is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda f: f.pop("kind"),
        lambda f: f.update(kind="other"),
        lambda f: f.update(reason=3),
        lambda f: f.update(sizes={"a": 1}),
        lambda f: f["sizes"][0].update(value=True),
        lambda f: f["sizes"][0].update(value=0),
        lambda f: f["sizes"][0].update(value="4"),
        lambda f: f["sizes"][0].update(attribute=None),
        lambda f: f["sizes"][1].update(item=1.5),
        lambda f: f["factors"][0].update(factor=float("nan")),
        lambda f: f["factors"][0].update(factor=-1.0),
        lambda f: f["factors"][0].update(factor="1.0"),
        lambda f: f["factors"][1].update(positions="0-24"),
        lambda f: f["factors"][1].update(positions="7,0"),
        lambda f: f["factors"][1].update(dim=0),
        lambda f: f["factors"][1].pop("size"),
        lambda f: f.update(parts=["a"]),
        lambda f: f.update(parts={"a": "other"}),
        lambda f: f.update(parts={"a": "native"}),
    ],
)
def test_a_damaged_form_is_a_damaged_plan(plan: PruningPlan, tmp_path: Path, edit: Callable[[Any], Any]) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    edit_plan(path, lambda document: edit(document["form"]))
    with pytest.raises(PlanError, match=r"plan.json' is damaged"):
        PruningPlan.load(path)


def test_slots_read_as_code_does() -> None:
    assert [str(slot) for slot in FORM.sizes] == ["n", "a.b.sizes[1]", "a.config.heads"]
    assert [slot.name for slot in FORM.sizes] == ["n", "sizes", "heads"]
