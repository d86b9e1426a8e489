"""Masks on disk: read back as they were; anything else in the file is an error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import torchshear
from tests.networks import Tied, randomise
from torchshear.errors import ArgumentError, MaskError, OutputError, WeightError
from torchshear.pruners import masks as m
from torchshear.pruners.masks import _masks


def some() -> m.Masks:
    return m.choose_masks(randomise(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))), "4x1", 0.5)


def test_round_trip(tmp_path: Path) -> None:
    masks = some()
    masks.save(tmp_path / "masks.safetensors")
    back = m.Masks.load(tmp_path / "masks.safetensors")
    assert back.pattern == "4x1"
    assert back.layers == masks.layers
    assert back.tensors.keys() == masks.tensors.keys()
    assert all(torch.equal(back.tensors[name], mask) for name, mask in masks.tensors.items())
    assert back.sparsity == masks.sparsity == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]


def test_masks_of_tied_parameters_are_written_under_each_name(tmp_path: Path) -> None:
    plan = torchshear.prune(randomise(Tied()).eval(), (torch.zeros(2, 3, dtype=torch.long),)).plan
    masks = m.Masks.of(plan.masks())
    assert len({mask.data_ptr() for mask in masks.tensors.values()}) < len(masks.tensors)
    masks.save(tmp_path / "masks.safetensors")
    back = m.Masks.load(tmp_path / "masks.safetensors")
    assert back.tensors.keys() == masks.tensors.keys()
    assert all(torch.equal(back.tensors[name], mask) for name, mask in masks.tensors.items())


def test_names_are_checked_when_they_are_laid_on(tmp_path: Path) -> None:
    some().save(tmp_path / "masks.safetensors")
    other = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    with pytest.raises(MaskError, match="'1.weight'"):
        m.apply(other, m.Masks.load(tmp_path / "masks.safetensors"))


@pytest.mark.parametrize("given", [{}, 3, {"0.weight": torch.ones(6, 8, dtype=torch.bool)}])
def test_what_are_no_masks_is_refused(given: object) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    groups = torchshear.analyze(torchshear.trace(model, (torch.zeros(2, 8),)))
    for refused in (lambda: m.apply(model, given), lambda: m.plan_from_masks(groups, given)):  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="masks is .*; expected Masks"):
            refused()
    for take in (m.make_permanent, m.remove, m.applied_masks):
        with pytest.raises(ArgumentError, match="; expected a torch.nn.Module"):
            take(given)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="the path of masks is"):
        m.Masks.load(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "made", [lambda w: w.to("meta"), lambda w: w.to_sparse(), lambda w: w + 1j], ids=["meta", "sparse", "complex"]
)
def test_scores_that_are_no_plain_numbers_are_refused(made) -> None:
    with pytest.raises(WeightError, match="layer '0' .*real numbers"):
        m.choose_masks(nn.Sequential(nn.Linear(8, 6)), score=lambda name, weight: made(weight))


def test_nothing_is_written_where_it_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        some().save(tmp_path / "missing" / "masks.safetensors")


DOCUMENT = json.dumps({"pattern": "1x1", "layers": []})
HEADER = {"format": "torchshear.masks", "version": "2"}


@pytest.mark.parametrize(
    ("header", "mask", "message"),
    [
        ({"format": "pt"}, True, "its format is 'pt', not 'torchshear.masks'"),
        (HEADER | {"version": "1"}, True, "its version is '1', and 2 is known"),
        (HEADER | {"document": DOCUMENT}, True, "not what its digest was made of, so it was changed"),
        (HEADER | {"document": DOCUMENT, "sha256": "0" * 64}, True, "not what its digest was made of"),
        (HEADER, True, "not what its digest was made of"),
        (HEADER | {"document": DOCUMENT}, False, "the mask of 'a' is of type F32, not of BOOL"),
    ],
)
def test_damage(tmp_path: Path, header: dict[str, str], mask: bool, message: str) -> None:
    save_file({"a": torch.ones(2, dtype=torch.bool if mask else torch.float32)}, tmp_path / "a.safetensors", header)
    with pytest.raises(MaskError, match=f"cannot read masks from .*a.safetensors': .*{message}"):
        m.Masks.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "document", ["{", "[1]", "5", '{"layers": [{}]}', "[" * 100_000, '{"layers": [], "pattern": 1e400}']
)
def test_a_damaged_report(tmp_path: Path, document: str) -> None:
    tensors = {"a": torch.ones(2, dtype=torch.bool)}
    header = HEADER | {"document": document, "sha256": _masks._digest(document, tensors)}
    save_file(tensors, tmp_path / "a.safetensors", header)
    with pytest.raises(MaskError, match="its report is damaged"):
        m.Masks.load(tmp_path / "a.safetensors")


def test_no_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    masks = some()
    masks.save(tmp_path / "masks.safetensors")
    whole = (tmp_path / "masks.safetensors").read_bytes()
    for at in range(0, len(whole), 3):
        flipped = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        (tmp_path / "masks.safetensors").write_bytes(flipped)
        try:
            back = m.Masks.load(tmp_path / "masks.safetensors")
        except MaskError:
            continue
        assert (back.layers, back.pattern) == (masks.layers, masks.pattern)
        assert back.tensors.keys() == masks.tensors.keys()
        assert all(torch.equal(back.tensors[name], mask) for name, mask in masks.tensors.items())


@pytest.mark.parametrize("name", ["/dev/zero", "/dev", "a" * 5000, "missing.safetensors", __file__])
def test_what_is_no_file_of_tensors_is_not_read(name: str) -> None:
    with pytest.raises(MaskError, match="cannot read masks from"):
        m.Masks.load(name)


def test_masks_are_bool_tensors() -> None:
    with pytest.raises(MaskError, match="the mask of 'a' is a list; expected a tensor of torch.bool"):
        m.Masks.of({"a": [True]})
