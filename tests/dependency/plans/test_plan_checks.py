"""Plans that were changed: in a file by hand or by a failing disk, or as a value; and files that mean harm."""

import json
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import nn

import torchshear
from tests.networks import Grouped, image, randomise
from tests.plan_files import edit_plan
from torchshear import PruningPlan
from torchshear.dependency.plans import _plan_file
from torchshear.errors import ArgumentError, PlanError
from torchshear.pruners import plan_from_kept

X = torch.linspace(-1, 1, 12).reshape(2, 6)
KEPT = {"0.weight[0]": [0, 2, 3, 7]}


def network() -> nn.Sequential:
    return randomise(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).eval()


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    return plan_from_kept(torchshear.analyze(torchshear.trace(network(), (X,))), KEPT)


@pytest.fixture
def path(plan: PruningPlan, tmp_path: Path) -> Path:
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def content(value: Any) -> Any:
    """A plan as plain data, but for what is not saved."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: content(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [content(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: content(getattr(value, one.name)) for one in fields(value) if one.name != "analysis"}
    return value


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a row of a weight": lambda d: d["state"]["0.weight"]["kept"].update({"0": "1-3,7"}),
    "units of a group": lambda d: d["groups"][0].update(kept="1-3,7"),
    "no groups": lambda d: d.update(groups=[]),
    "no state": lambda d: d.update(state={}),
    "a bias that stays": lambda d: d["whole"].update({"0.bias": d["state"].pop("0.bias")["shape"]}),
    "another request": lambda d: d["request"].update(ratio=0.9),
    "an entry more": lambda d: d.update(comment="reviewed"),
    "a shape": lambda d: d["state"]["2.weight"].update(shape=[4, 8]),
    "no digest": lambda d: d.pop("sha256"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_plan_is_refused(path: Path, name: str) -> None:
    edit_plan(path, EDITS[name], signed=False)
    with pytest.raises(PlanError, match="changed since it was written"):
        PruningPlan.load(path)


def test_a_plan_that_is_laid_out_anew_is_the_same_plan(plan: PruningPlan, path: Path) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(document.items())), separators=(",", ":")))
    assert content(PruningPlan.load(path)) == content(plan)


def test_a_plan_of_an_earlier_version_is_refused(path: Path) -> None:
    edit_plan(path, lambda d: (d.update(version=3), d.pop("sha256")), signed=False)
    with pytest.raises(PlanError, match="version 3; .*reads 4"):
        PruningPlan.load(path)


def test_no_flipped_bit_goes_unseen(plan: PruningPlan, path: Path) -> None:
    whole, expected = path.read_bytes(), content(plan)
    draw = np.random.default_rng(0)
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(draw.integers(8))
        path.write_bytes(flipped)
        try:
            found = PruningPlan.load(path)
        except PlanError:
            continue
        assert content(found) == expected, f"byte {at}: {whole[at - 20 : at + 20]!r}"


def test_no_flipped_bit_of_the_tensor_file_goes_unseen(
    plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan_file, "_LONGEST_TEXT", 3)
    plan.save(tmp_path / "plan.json")
    (tensors,) = tmp_path.glob("plan-*.safetensors")
    whole = tensors.read_bytes()
    for at in range(len(whole)):
        tensors.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(PlanError, match="was changed or cut short"):
            PruningPlan.load(tmp_path / "plan.json")


def test_a_plan_that_contradicts_itself_is_refused(path: Path) -> None:
    for name, message in (
        ("no groups", "none of its groups shrink, and some of its parameters"),
        ("no state", "some of its groups shrink, and none of its parameters"),
    ):
        before = path.read_text()
        edit_plan(path, EDITS[name])
        with pytest.raises(PlanError, match=message):
            PruningPlan.load(path)
        path.write_text(before)
    for edit, message in (
        (lambda d: d["whole"].update({"0.bias": [8]}), "'0.bias' is said to shrink and to stay whole"),
        (lambda d: d["aliases"].update({"0.bias": "2.bias"}), "'0.bias' is said to be a name of another parameter"),
        (
            lambda d: d.update(outputs=[{"name": "0", "index": 0, "shape": [None, 3], "kept": {}}]),
            "kept positions of output '0', but no output may shrink",
        ),
        (lambda d: d["groups"].append(d["groups"][0]), r"group '0.weight\[0\]' stands there twice"),
    ):
        before = path.read_text()
        edit_plan(path, edit)
        with pytest.raises(PlanError, match=message):
            PruningPlan.load(path)
        path.write_text(before)


@pytest.mark.parametrize("name", ["a row of a weight", "units of a group", "a bias that stays"])
def test_groups_and_positions_are_compared_where_the_network_is(path: Path, name: str) -> None:
    edit_plan(path, EDITS[name])
    edited = PruningPlan.load(path)
    with pytest.raises(PlanError, match="contradicts itself: .*'0"):
        torchshear.shrink(network(), edited)
    with pytest.raises(PlanError, match="contradicts itself"):
        torchshear.verify(network(), network(), edited, (X,))


def test_a_plan_that_is_changed_as_a_value_is_refused(plan: PruningPlan, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    save_file(network().state_dict(), tmp_path / "src" / "model.safetensors")
    state = {**plan.state, "0.bias": replace(plan.state["0.bias"], kept={0: np.array([1, 2, 3, 7])})}
    groups = (replace(plan.groups[0], kept=np.array([1, 2, 3, 7])),)
    for changed in (replace(plan, state=state), replace(plan, groups=groups), replace(plan, groups=())):
        with pytest.raises(PlanError, match="contradicts itself"):
            torchshear.shrink_checkpoint(changed, tmp_path / "src", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_plans_with_blocks_agree_with_themselves(tmp_path: Path) -> None:
    model = randomise(Grouped()).eval()
    kept = {"one.weight[0]": [0, 1, 5, 6, 8, 11], "two.weight[0]": [0, 4, 8]}
    plan = plan_from_kept(torchshear.analyze(torchshear.trace(model, (image(),))), kept)
    plan.save(tmp_path / "plan.json")
    assert torchshear.shrink(model, PruningPlan.load(tmp_path / "plan.json")).two.weight.shape[0] == 3


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "more indices than fit": lambda d: d["groups"][0].update(kept="0-999999999999"),
    "a group of as many units": lambda d: d["groups"][0].update(width=10**12, kept="0-999999999998"),
    "backwards": lambda d: d["groups"][0].update(kept="5-2"),
    "digits of another script": lambda d: d["groups"][0].update(kept="٣"),
    "a list in place of a text": lambda d: d["groups"][0].update(kept=[0, 1]),
    "a long text": lambda d: d["groups"][0].update(kept="0," * 5000 + "7"),
    "a number of many digits": lambda d: d["groups"][0].update(kept="1" * 4000),
    "a width of many digits": lambda d: d["groups"][0].update(width=10**30),
    "a width in words": lambda d: d["groups"][0].update(width="8"),
    "half a width": lambda d: d["groups"][0].update(width=8.5),
    "a name that is none": lambda d: d["groups"][0].update(name=["0.weight[0]"]),
    "a huge shape": lambda d: d["state"]["0.weight"].update(shape=[10**30, 6]),
    "blocks without end": lambda d: d["state"]["2.weight"].update(shape=[10**11, 8], blocks={"1": 10**11}),
    "a dimension twice": lambda d: d["state"]["0.weight"]["kept"].update({"00": "0"}),
    "an input of any size": lambda d: d["model"]["inputs"]["args"][0].update(tensor=[2**40, 2**40]),
    "an input of no type": lambda d: d["model"]["inputs"]["args"][0].update(dtype="nn"),
    "a file elsewhere": lambda d: d.update(indices={"file": "/dev/zero", "sha256": ""}),
    "a file with a NUL": lambda d: d.update(indices={"file": "a\0b", "sha256": ""}),
    "a long file name": lambda d: d.update(indices={"file": "a" * 5000, "sha256": ""}),
    "no file": lambda d: d.update(indices=[1]),
    "parts of nothing": lambda d: d["model"].update(parts={"calls": [], "pinned": {}}),
    "a ratio in words": lambda d: d["groups"][0].update(ratio="nan"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_plan_is_refused_at_once(path: Path, name: str) -> None:
    edit_plan(path, HOSTILE[name])
    started = time.process_time()
    with pytest.raises(PlanError, match="is damaged"):
        PruningPlan.load(path)
    assert time.process_time() - started < 2


TEXTS = {
    "deep lists": ("[" * 100_000, "nested too deeply"),
    "lists of a hundred levels": ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested too deeply"),
    "no number": ('{"a": NaN}', "NaN is no number that JSON has"),
    "a number too large": ('{"a": 1e400}', "the number 1e400, which is too large"),
    "digits": ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    "a key twice": ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
    "no text": (b"\xff\xfe{}", "is not text in UTF-8"),
    "nothing": ("", "is not whole JSON"),
    "NUL": ('{"a": "\0"}', "is not whole JSON"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_plain_json_is_refused(tmp_path: Path, name: str) -> None:
    text, message = TEXTS[name]
    (tmp_path / "plan.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError, match=message):
        PruningPlan.load(tmp_path / "plan.json")


def test_tensors_of_another_kind_are_no_indices(
    plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plan_file, "_LONGEST_TEXT", 3)
    plan.save(tmp_path / "plan.json")
    (file,) = tmp_path.glob("plan-*.safetensors")
    arrays = load_arrays(file)
    for made in (lambda a: a.astype(np.float32), lambda a: a.reshape(2, -1), lambda a: a.astype(np.bool_)):
        save_arrays({name: made(array) for name, array in arrays.items()}, file)
        digest = _plan_file.hashlib.sha256(file.read_bytes()).hexdigest()
        edit_plan(tmp_path / "plan.json", lambda d, digest=digest: d["indices"].update(sha256=digest))
        with pytest.raises(PlanError, match="index list '@.*' cannot be read"):
            PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("given", [None, 5, b"plan.json", "", "a\0.json", "\ud800.json"])
def test_what_is_no_path_is_refused(plan: PruningPlan, given: object) -> None:
    for call in (PruningPlan.load, plan.save):
        with pytest.raises(ArgumentError, match="the path of a plan is"):
            call(given)  # type: ignore[operator]


@pytest.mark.parametrize("given", ["a" * 5000, "/dev/zero", "/dev", "nowhere/plan.json"])
def test_what_is_no_plain_file_is_not_read(given: str) -> None:
    with pytest.raises(PlanError, match="cannot be read: |is a device, a pipe or a socket|is a folder"):
        PruningPlan.load(given)


def test_inputs_that_would_fill_memory_are_not_drawn(path: Path) -> None:
    edit_plan(path, lambda d: d["model"]["inputs"]["args"][0].update(tensor=[2**34, 6]))
    with pytest.raises(ArgumentError, match="268435456"):
        torchshear.shrink(network(), PruningPlan.load(path))


def test_numbers_without_end_among_the_inputs_are_saved(tmp_path: Path) -> None:
    class Filled(nn.Linear):
        def forward(self, x: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
            return super().forward(x).clamp(max=fill)

    plan = plan_from_kept(torchshear.analyze(torchshear.trace(Filled(6, 8), (X, float("inf")))), {})
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json").inputs == plan.inputs
    assert torchshear.shrink(Filled(6, 8), PruningPlan.load(tmp_path / "plan.json"))(X).shape == (2, 8)
