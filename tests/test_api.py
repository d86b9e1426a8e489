"""The one call, from end to end, and what it says when nothing can be done."""

from typing import Any

import pytest
import torch
from torch import nn

import torchshear
from tests.networks import Between, Residual, image, randomise
from torchshear.errors import VerificationError, WeightError
from torchshear.speedup import _shrink as _apply


def test_one_call_gives_model_plan_report_and_proof() -> None:
    model = randomise(Residual(16)).eval()
    result = torchshear.prune(model, args=(image(),), kwargs=None, criterion="l2", ratio=0.5, align=4)
    assert sum(p.numel() for p in result.model.parameters()) == result.report.after.n_params
    assert sum(p.numel() for p in model.parameters()) == result.report.before.n_params
    assert result.report.requested_ratio == 0.5
    assert result.report.achieved_ratio == 0.5
    assert [len(kept) for kept in result.plan.kept.values()] == [8, 16]
    assert result.form == "native"
    text = str(result.report)
    assert "stem.weight[0]" in text
    assert "Nothing shrank" not in text
    assert "50.0% removed (50.0% requested)" in text
    assert "model input 'x', dimension 1" in text
    assert result.report.to_dict()["after"]["macs"] == result.report.after.macs


def test_one_seed_one_plan() -> None:
    plans = [torchshear.prune(randomise(Residual(), 3), (image(),)).plan for _ in range(2)]
    assert plans[0] == plans[1]
    assert hash(plans[0]) == hash(plans[1])
    assert plans[0] != torchshear.prune(randomise(Residual(), 4), (image(),)).plan
    assert plans[0] != 5


def test_a_native_form_that_fails_the_proof_gives_way_to_the_traced_one() -> None:
    """The literal follows no attribute, and its effect is below the tolerance of float32 but not of float64."""
    faint = Between(lambda h: h + 1e-6 * h.roll(2, 1), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    result = torchshear.prune(randomise(faint), (image(),))
    assert result.form == "traced"
    assert result.verification.max_error <= 1e-9
    assert "gives other results on the smaller tensors" in str(result.report)


def test_a_native_form_that_verify_refuses_gives_way_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []

    def refusing_the_first(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[1])
        if len(asked) == 1:
            raise VerificationError("not equal")
        return verify(*args, **kwargs)

    verify = _apply.verify_analyzed
    monkeypatch.setattr(_apply, "verify_analyzed", refusing_the_first)
    result = torchshear.prune(randomise(Residual()).eval(), (image(),))
    assert result.form == "traced"
    assert len(asked) == 2
    assert "not the masked model" in str(result.report)


def test_batches_other_than_the_example_run() -> None:
    result = torchshear.prune(randomise(Residual()).eval(), (image(batch=1),))
    for batch in (1, 3, 7):
        assert result.model(image(batch)).shape == (batch, 5)


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.ReLU()])
def test_nothing_to_prune_is_a_report_and_no_crash(model: nn.Module) -> None:
    x = torch.randn(2, 3)
    result = torchshear.prune(model, (x,))
    assert result.report.achieved_ratio == 0
    assert torch.equal(result.model(x), model(x))
    assert result.model is not model
    if isinstance(model, nn.Linear):
        assert result.report.refused["weight[0]"] == "model output 0"
        assert "cannot shrink (3)" in str(result.report)
        assert str(result.report).splitlines()[0] == (
            "Nothing shrank: the result keeps every channel, first of all because: model output 0."
        )
    else:
        assert str(result.report).splitlines()[0].endswith(": the model has no parameters.")


def test_nan_weights_are_refused_by_name() -> None:
    model = Residual()
    model.two.weight.data[0, 0] = float("nan")
    with pytest.raises(WeightError, match="'two.weight' holds 9 values that are NaN or infinite"):
        torchshear.prune(model, (image(),))
    with pytest.raises(WeightError, match="'two.weight' is NaN or infinite in 9 places"):
        torchshear.prune(model, (image(),), criterion="random")


def test_public_names_are_few_and_there() -> None:
    assert len(torchshear.__all__) <= 22
    assert all(getattr(torchshear, name) is not None for name in torchshear.__all__)
