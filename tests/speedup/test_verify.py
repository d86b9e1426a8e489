"""Verification finds what is wrong, and names where."""

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.models import Residual, image, randomise
from torchshear.dependency import _registry
from torchshear.errors import VerificationError
from torchshear.speedup import _verify


class Flipped(nn.Module):
    """Channels in reverse order between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A map of 2 channels."""
        return self.two(torch.relu(self.one(x)).flip(1))


class Normed(nn.Module):
    """A layer norm over features that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Three values a sample."""
        return self.two(self.norm(self.one(x)))


def test_the_masked_module_is_the_reference_where_nothing_mixes() -> None:
    model = randomise(Residual())
    result = torchshear.prune(model, (image(),))
    assert result.verification.reference == "masked"
    assert result.verification.dtype == torch.float64
    assert result.verification.max_error < 1e-12


def test_a_norm_over_cut_features_is_checked_on_kept_positions() -> None:
    model = randomise(Normed())
    result = torchshear.prune(model, (torch.randn(5, 4),))
    assert result.verification.reference == "kept positions"
    kept = result.plan.kept["one.weight[0]"]
    x = torch.randn(5, 4)
    hidden = x @ model.one.weight[kept].T + model.one.bias[kept]
    normed = nn.functional.layer_norm(hidden, (6,), model.norm.weight[kept], model.norm.bias[kept])
    expected = normed @ model.two.weight[:, kept].T + model.two.bias
    torch.testing.assert_close(result.model(x), expected)


def test_a_rule_that_forgets_the_order_is_caught_at_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry._RULES, "aten.flip", lambda call: call.axes("self"))
    with pytest.raises(
        VerificationError, match=r"first value that differs is 'flip', aten.flip.default .*test_verify.py"
    ):
        torchshear.prune(randomise(Flipped()), (image(),))


def test_a_rule_that_forgets_a_size_is_caught_at_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchshear.dependency._call.Call.edit_size", lambda self, name, axis, index=None: None)

    class Viewed(Flipped):
        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).view(x.shape[0], 8, 64).view(x.shape[0], 8, 8, 8))

    model = randomise(Viewed())
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (image(),))))
    with pytest.raises(VerificationError, match="the rewritten graph fails at 'view', aten.view.default"):
        torchshear.verify(model, nn.Sequential(nn.Conv2d(3, 2, 1)), plan, args=(image(),))


def test_other_weights_are_told_from_a_wrong_graph() -> None:
    model = randomise(Residual())
    result = torchshear.prune(model, (image(),))
    with torch.no_grad():
        result.model.one.weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(VerificationError, match="though its graph does not: the model given is not what the plan"):
        torchshear.verify(model, result.model, result.plan, args=(image(),))


def test_the_check_runs_in_a_loaded_plan(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = randomise(Normed())
    x = torch.randn(5, 4)
    result = torchshear.prune(model, (x,))
    result.plan.save(tmp_path / "plan.json")
    loaded = torchshear.PruningPlan.load(tmp_path / "plan.json")
    assert torchshear.verify(model, result.model, loaded, args=(x,)).max_error < 1e-12


class BatchedHeads(nn.Module):
    """Attention with heads merged into the batch, and a layer norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(12, 144), nn.LayerNorm(48), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, tokens, 12) to (batch, tokens, 4)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, 6, 8).permute(2, 0, 3, 1, 4).reshape(3, batch * 6, tokens, 8)
        q, k, v = qkv.unbind(0)
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        out: Tensor = self.out(self.norm(y.view(batch, 6, tokens, 8).permute(0, 2, 1, 3).reshape(batch, tokens, 48)))
        return out


@pytest.mark.parametrize("batch", [2, 64])
def test_axes_that_hold_the_batch_are_verified_at_the_batch_of_the_example(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("run at the batch of the capture")

    monkeypatch.setattr(_verify, "_at_capture", refuse)
    result = torchshear.prune(randomise(BatchedHeads()), (torch.randn(batch, 5, 12),))
    assert result.verification.reference == "kept positions"
    assert result.verification.max_error <= 1e-9
    assert {len(kept) for kept in result.plan.kept.values()} == {3, 4}
