"""Constants of removed channels in the biases of their readers: against modules with those constants, and by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Attention, LooksAtValues, randomise
from tests.oracle import assert_equals_masked, assert_same_function, fingerprint
from tests.speedup.compensation.faults import spoil_folds
from torchshear.errors import VerificationError, WeightError
from torchshear.pruners import plan_from_kept
from torchshear.speedup import Shrunk, TracedModule, fold_constants, shrink_to_form

FORMS = ("native", "traced")


def planned(model: nn.Module, *args: Tensor, ratio: float = 0.5) -> torchshear.PruningPlan:
    return torchshear.plan(torchshear.analyze(torchshear.trace(model, args)), ratio=ratio)


def with_constants(model: nn.Module, plan: torchshear.PruningPlan) -> nn.Module:
    """The original, in which rows of layers and scales of norms are zero on removed channels, and nothing else is."""
    twin = copy.deepcopy(model).double().eval()
    masks = plan.masks()
    for name, module in twin.named_modules():
        mask = masks.get(f"{name}.weight")
        if mask is None:
            continue
        with torch.no_grad():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.weight[~mask] = 0
            else:
                module.weight[~mask.flatten(1).any(1)] = 0
    return twin


class Plain(nn.Module):
    """Layers that all permit it: 1x1 and unpadded kernels, strides, a grouped and a depthwise one, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 3, bias=False)
        self.wide_norm = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 12, 3, groups=3)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down = nn.Conv2d(12, 8, 1, stride=2)
        self.short = nn.Conv2d(8, 8, 5, stride=2, bias=False)
        self.short_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = functional.gelu(self.wide_norm(self.wide(x)))
        y = functional.silu(self.depthwise(torch.relu(self.grouped(y))))
        y = self.down(y) + self.short_norm(self.short(x))
        return self.head(functional.max_pool2d(y, 2).mean((2, 3)))


class Padded(nn.Module):
    """One reader whose padding cuts constants off, and one that permits them."""

    def __init__(self, mode: str = "zeros") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1, padding_mode=mode)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.inner(x)).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation, whose gate shrinks along, and one gate for all channels, which looks at data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.next = nn.Conv2d(8, 6, 1)
        self.gate = nn.Conv2d(6, 1, 1)
        self.last = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x * self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = self.next(x)
        return self.last(x * self.gate(x).sigmoid())


def picture(size: int = 13) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def shrink_folded(model: nn.Module, plan: torchshear.PruningPlan, form: str | None = None) -> Shrunk:
    return fold_constants(model, shrink_to_form(model, plan, form=form), plan)  # type: ignore[arg-type]


def reasons(shrunk: Shrunk) -> dict[str, str]:
    return {one.layer: one.reason for one in shrunk.fold.skipped}


@pytest.mark.parametrize("form", FORMS)
def test_two_layers_by_hand(form: str) -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([0.5, -1.0, 2.0, 0.25, -0.5, 1.5]))
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(2, 4, dtype=torch.float64),)))
    plan = plan_from_kept(groups, {"0.weight[0]": [0, 3, 5]})
    shrunk = shrink_folded(model, plan, form)
    small = dict(shrunk.model.named_parameters())
    # Of the removed -1.0, 2.0 and -0.5, ReLU leaves the second alone.
    torch.testing.assert_close(small["2.bias"], model[2].bias + 2.0 * model[2].weight[:, 2])
    assert torch.equal(small["0.bias"], model[0].bias[[0, 3, 5]])
    assert [(one.layer, one.into, one.n_channels) for one in shrunk.fold.folded] == [("2", "2.bias", 1)]
    assert shrunk.fold.skipped == ()


@pytest.mark.parametrize("form", FORMS)
def test_everything_folds_where_padding_permits(form: str) -> None:
    model, x = randomise(Plain()), picture()
    plan, before = planned(model, x), fingerprint(model)
    shrunk = shrink_folded(model, plan, form)
    assert fingerprint(model) == before
    assert isinstance(shrunk.model, TracedModule) == (form == "traced")
    assert {one.layer for one in shrunk.fold.folded} == {"wide", "grouped", "down", "short", "head"}
    assert shrunk.fold.skipped == ()
    assert shrunk.fold.max_error <= 1e-9
    assert {one.layer: one.into for one in shrunk.fold.folded}["short"] == "short_norm.running_mean"
    wide, y = copy.deepcopy(model).double(), x.double()  # whose values are not rounded to float32
    again = planned(wide, y)
    exact = shrink_folded(wide, again, form).model
    assert_same_function(with_constants(wide, again), exact, (y,))
    plain = shrink_to_form(wide, again, form=form).model
    assert not torch.allclose(exact.eval()(y), plain.eval()(y), rtol=1e-3)


def test_values_are_rounded_once() -> None:
    model, x = randomise(Plain()), picture()
    plan, twin = planned(model, x), copy.deepcopy(model).double()
    narrow = shrink_folded(model, plan).model
    wide = shrink_folded(twin, planned(twin, x.double())).model
    for name, value in wide.state_dict().items():
        assert torch.equal(narrow.state_dict()[name], value.to(narrow.state_dict()[name].dtype)), name


def test_zeros_of_a_padding_do_not_permit_it() -> None:
    model, x = randomise(Padded()).double(), picture().double()
    plan = planned(model, x)
    shrunk = shrink_folded(model, plan)
    assert "padding" in reasons(shrunk)["inner"]
    assert [one.layer for one in shrunk.fold.folded] == ["head"]
    masked = with_constants(model, plan)
    kept = plan.masks()["norm.weight"].double()
    masked.inner.register_forward_pre_hook(lambda _, args: (args[0] * kept[None, :, None, None],))
    assert_same_function(masked, shrunk.model, (x,))


def test_constants_of_zero_need_no_fold_and_pass_a_padding() -> None:
    model, x = randomise(Padded()), picture()
    with torch.no_grad():
        model.norm.bias.copy_(-model.norm.bias.abs())
        model.inner.bias.copy_(-model.inner.bias.abs())
    plan = planned(model, x)
    shrunk = shrink_folded(model, plan)
    assert shrunk.fold.folded == shrunk.fold.skipped == ()
    assert_equals_masked(model, shrunk.model, plan, (x,))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_permit_it(mode: str) -> None:
    model, x = randomise(Padded(mode)).double(), picture().double()
    plan = planned(model, x)
    shrunk = shrink_folded(model, plan)
    assert {one.layer for one in shrunk.fold.folded} == {"inner", "head"}
    assert_same_function(with_constants(model, plan), shrunk.model, (x,))


def test_a_gate_that_looks_at_data_makes_no_constants() -> None:
    model, x = randomise(Gated()).double(), picture().double()
    with torch.no_grad():
        model.squeeze.bias.abs_()  # what is removed of it leaves a constant behind the ReLU
    plan = planned(model, x)
    shrunk = shrink_folded(model, plan)
    assert "not constant" in reasons(shrunk)["last"]
    assert {one.layer for one in shrunk.fold.folded} == {"squeeze", "excite", "next", "gate"}
    masked = with_constants(model, plan)
    kept = plan.masks()["next.bias"].double()
    masked.last.register_forward_pre_hook(lambda _, args: (args[0] * kept[None, :, None, None],))
    assert_same_function(masked, shrunk.model, (x,))


def test_heads_give_the_bias_of_their_values() -> None:
    model, x = randomise(Attention(24, 3)).double(), torch.randn(2, 5, 24, dtype=torch.float64)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    shrunk = shrink_folded(model, plan_from_kept(groups, {"qkv.weight[0]": [0, 2]}))
    gone = slice(8, 16)  # the second head
    expected = model.proj.bias + model.proj.weight[:, gone] @ model.qkv.bias[48:][gone]
    torch.testing.assert_close(dict(shrunk.model.named_parameters())["proj.bias"], expected)


def test_constants_stop_where_positions_are_mixed() -> None:
    model, x = randomise(Attention(24, 3)), torch.randn(2, 5, 24)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    plan = plan_from_kept(groups, {"qkv.weight[0]#2": [0, 3, 4, 7]})
    shrunk = shrink_folded(model, plan)
    assert shrunk.fold.folded == shrunk.fold.skipped == ()
    assert torchshear.verify(model, shrunk.model, plan, (x,)).max_error <= 1e-9


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.last = nn.LayerNorm(12)
        self.head = nn.Linear(12, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return self.head(self.last(x))


def test_shifts_of_layer_norms_fold_also_on_equal_tokens() -> None:
    model, ids = randomise(Tokens()).double(), torch.ones(2, 4, dtype=torch.long)
    plan = planned(model, ids)
    shrunk = shrink_folded(model, plan)
    assert {one.layer for one in shrunk.fold.folded} == {"up", "down", "head"}
    gone = ~plan.masks()["last.weight"]
    expected = model.head.bias + model.head.weight[:, gone] @ model.last.bias[gone]
    torch.testing.assert_close(dict(shrunk.model.named_parameters())["head.bias"], expected)


class GatedTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(11, 6), nn.Linear(6, 8)
        self.gate, self.head = nn.Linear(6, 1), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(torch.relu(self.up(x)) * self.gate(x).sigmoid())


def test_equal_tokens_make_nothing_constant() -> None:
    model, ids = randomise(GatedTokens()).double(), torch.ones(2, 4, dtype=torch.long)
    groups = torchshear.analyze(torchshear.trace(model, (ids,)))
    plan = plan_from_kept(groups, {"up.weight[0]": [0, 1, 2]})
    shrunk = shrink_folded(model, plan)
    assert shrunk.fold.folded == ()
    assert "not constant" in reasons(shrunk)["head"]


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 3)
        self.two.bias = self.one.bias
        self.bare = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.one(x) + self.two(x) + self.bare(x)


def test_a_bias_with_two_readers_and_a_layer_without_one_are_skipped() -> None:
    model, x = randomise(SharedBias()), torch.randn(2, 4)
    plan = planned(model, x)
    shrunk = shrink_folded(model, plan)
    assert shrunk.fold.folded == ()
    assert "read elsewhere" in reasons(shrunk)["one"]
    assert "no bias to fold into" in reasons(shrunk)["bare"]
    assert_equals_masked(model, shrunk.model, plan, (x,))
    assert shrunk.model.state_dict().keys() == model.state_dict().keys()


def test_a_recurrent_layer_sees_zeros() -> None:
    model = randomise(nn.ModuleDict({"x": nn.Linear(3, 6), "lstm": nn.LSTM(6, 8), "head": nn.Linear(8, 2)}))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["head"](self.parts["lstm"](self.parts["x"](x))[0])

    whole, x = Recurrent(), torch.randn(5, 2, 3)
    shrunk = shrink_folded(whole, planned(whole, x))
    assert "parts.lstm" in reasons(shrunk)
    assert shrunk.fold.max_error <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_flags_and_names_are_kept(dtype: torch.dtype) -> None:
    model, x = randomise(Plain()).to(dtype), picture().to(dtype)
    model.head.bias.requires_grad_(False)
    plan = planned(model, x)
    plain, folded = torchshear.shrink(model, plan), shrink_folded(model, plan).model
    for (name, one), (other, two) in zip(plain.state_dict().items(), folded.state_dict().items(), strict=True):
        assert (name, one.shape, one.dtype) == (other, two.shape, two.dtype)
    assert folded.head.bias.requires_grad is False
    assert folded.down.bias.requires_grad is True
    fresh = torchshear.shrink(model, plan)
    fresh.load_state_dict(folded.state_dict())
    assert torch.equal(fresh.eval()(x), folded.eval()(x))


def test_prune_proves_both_steps() -> None:
    model, x = randomise(Plain()), picture()
    result = torchshear.prune(model, (x,), compensate="constants")
    assert result.verification.max_error <= 1e-9
    assert result.fold is not None
    assert result.fold.max_error <= 1e-9
    assert len(result.fold.folded) == 5
    assert torchshear.prune(model, (x,)).fold is None


def test_parts_fold_inside_a_model_that_cannot_be_captured() -> None:
    model, x = randomise(LooksAtValues(Plain())).double(), picture().double()
    result = torchshear.prune(model, (x,), submodules=["part"], compensate="constants")
    assert len(result.fold.folded) == 5
    assert_same_function(with_constants(model, result.plan), result.model, (x,))


def test_a_wrong_fold_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomise(Plain()), picture()
    plan = planned(model, x)
    shrunk = shrink_to_form(model, plan)
    before = {name: value.clone() for name, value in shrunk.model.state_dict().items()}
    spoil_folds(monkeypatch, "head.bias")
    with pytest.raises(VerificationError, match=r"folded into .*head\.bias.*differs by"):
        fold_constants(model, shrunk, plan)
    assert all(torch.equal(value, before[name]) for name, value in shrunk.model.state_dict().items())


def test_without_values_there_are_no_constants() -> None:
    with torch.device("meta"):
        model, x = Padded(), torch.randn(2, 3, 8, 8)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    with pytest.raises(WeightError, match="meta device"):
        shrink_folded(model, plan_from_kept(groups, {}))
