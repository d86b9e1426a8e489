"""Verification finds what is wrong, and names where."""

import copy
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Between, Residual, image, randomise
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules import _registry
from torchshear.errors import ArgumentError, DataError, VerificationError
from torchshear.graph import ExampleInputs
from torchshear.pruners import plan_from_kept
from torchshear.speedup.comparing._relative_error import relative_error
from torchshear.speedup.verification._masked_network import MaskedNetwork
from torchshear.speedup.verification._runs import compare_gradients, run_module
from torchshear.speedup.verification._state_cut import StateCut


def between(call: Callable[[Tensor], Tensor]) -> nn.Module:
    """A call between two convolutions."""
    return Between(call, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))


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
    with pytest.raises(VerificationError, match="'flip', aten.flip.default .*_base.py:"):
        torchshear.prune(randomise(between(lambda h: torch.relu(h).flip(1))), (image(),))


def test_a_rule_that_forgets_a_size_is_caught_at_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchshear.dependency.rules._call.Call.edit_size", lambda self, name, axis, index=None: None)

    model = randomise(between(lambda h: h.view(h.shape[0], 8, 64).view(h.shape[0], 8, 8, 8)))
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (image(),))))
    with pytest.raises(VerificationError, match="'view', aten.view.default"):
        torchshear.verify(model, nn.Sequential(nn.Conv2d(3, 2, 1)), plan, args=(image(),))


def test_other_weights_are_told_from_a_wrong_graph() -> None:
    model = randomise(Residual())
    result = torchshear.prune(model, (image(),))
    with torch.no_grad():
        result.model.one.weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(VerificationError, match="though its graph does not"):
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
def test_axes_that_hold_the_batch_are_verified_at_few_samples(batch: int) -> None:
    result = torchshear.prune(randomise(BatchedHeads()), (torch.randn(batch, 5, 12),))
    assert result.verification.reference == "kept positions"
    assert result.verification.max_error <= 1e-9
    assert {len(kept) for kept in result.plan.kept.values()} == {3, 4}


# -- a reference that shares nothing with the rules --------------------------------------------------------------------


class Running(nn.Module):
    """A running sum over features that can be cut, and a norm behind it if asked."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 12), nn.Linear(12, 3)
        self.norm = nn.LayerNorm(12) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Three values a sample."""
        return self.two(self.norm(self.one(x).cumsum(-1)))


@pytest.mark.parametrize("normed", [False, True])
def test_a_mirrored_rule_of_a_mixing_operator_is_caught(normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomise(Running(normed=normed)), torch.randn(4, 5)
    assert torchshear.prune(model, (x,)).verification.max_error < 1e-12
    rule = _registry._RULES["aten.cumsum"]

    def mirrored(call):  # type: ignore[no-untyped-def]
        *others, last = rule(call)  # type: ignore[misc]
        return (*others, call.algebra.take(last, slice(None, None, -1)))

    monkeypatch.setitem(_registry._RULES, "aten.cumsum", mirrored)
    with pytest.raises(VerificationError, match="'cumsum', aten.cumsum.default"):
        torchshear.prune(model, (x,))


def test_an_operator_for_which_zeros_are_exact_is_not_excused() -> None:
    verification = torchshear.prune(randomise(Running(normed=False)), (torch.randn(4, 5),)).verification
    assert (verification.reference, verification.operators) == ("masked", ())


def test_what_is_excused_is_named() -> None:
    verification = torchshear.prune(randomise(Running(normed=True)), (torch.randn(4, 5),)).verification
    assert verification.reference == "kept positions"
    assert len(verification.operators) == 1
    assert verification.operators[0].startswith("layer_norm (aten.layer_norm.default in module 'norm'")


class Centred(nn.Module):
    """A norm over channels written by hand: what is cut takes on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)
        self.scale = nn.Parameter(torch.rand(12, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """A map of four channels."""
        x = self.one(x)
        x = x - x.mean(1, keepdim=True)
        return self.two(self.scale * x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt())


@pytest.mark.parametrize("ratio", [0.5, 0.09])  # six channels go, and one
def test_a_norm_by_hand_is_proved(ratio: float) -> None:
    result = torchshear.prune(randomise(Centred()), (torch.randn(2, 3, 4, 4),), ratio=ratio)
    assert result.verification.reference == "kept positions"
    assert result.verification.max_error < 1e-12


def test_cut_positions_that_are_alive_are_found() -> None:
    """Whatever the rules say of a value: what is called cut may not follow the inputs."""
    model = randomise(Normed()).double()
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(3, 4, dtype=torch.float64),)))
    cut = Cut(groups, {groups[0].name: np.array([0, 1, 2, 4, 7, 8])})
    state_cut = StateCut(groups, cut)
    masked = state_cut.mask(state_cut.state_of(model))
    facts = groups.facts.copy()
    inputs = [[torch.randn(3, 4, dtype=torch.float64)] for _ in range(2)]
    assert list(MaskedNetwork(groups.graph.fx_graph, facts, cut, masked).values(inputs))
    *others, last = facts.axes["linear"]  # type: ignore[misc]
    facts.axes["linear"] = (*others, groups.algebra.take(last, np.arange(12)[::-1]))
    with pytest.raises(VerificationError, match="position 0 of dimension 1 of 'linear'"):
        list(MaskedNetwork(groups.graph.fx_graph, facts, cut, masked).values(inputs))


# -- inputs that exercise the model ------------------------------------------------------------------------------------


class Language(nn.Module):
    """A small language model without rotary embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.tokens = 4, nn.Embedding(60, 32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.out = nn.Linear(32, 60)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each token."""
        x = self.tokens(tokens)
        q, k, v = (f(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x + self.o(y.transpose(1, 2).flatten(2)))


def masked_copy(model: nn.Module, plan: torchshear.PruningPlan) -> nn.Module:
    twin = copy.deepcopy(model)
    tensors = dict(twin.named_parameters())
    with torch.no_grad():
        for name, mask in plan.masks().items():
            tensors[name].mul_(mask)
    return twin


def test_equal_tokens_prove_nothing() -> None:
    torch.manual_seed(0)
    model, tokens, zeros = Language().eval(), torch.randint(0, 60, (2, 8)), torch.zeros(2, 8, dtype=torch.long)
    with torch.no_grad():
        model.q.weight.mul_(8)
    result = torchshear.prune(model, (zeros,), roles="heads")
    assert (result.form, result.model.heads) == ("native", 2)
    torch.testing.assert_close(result.model(tokens), masked_copy(model, result.plan)(tokens), rtol=1e-5, atol=1e-5)
    result.model.heads = 4
    with pytest.raises(VerificationError):
        torchshear.verify(model, result.model, result.plan, (zeros,))


def test_a_branch_that_a_zero_switches_off_is_compared() -> None:
    class Gated(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)
            if kind == "buffer":
                self.register_buffer("gate", torch.zeros(()))
            else:
                self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x).relu()
            return self.two(h) + self.gate * h.reshape(len(h), 2, -1).shape[2] * x[:, :2]

    for kind in ("buffer", "parameter"):
        model, x = Gated(kind).eval(), torch.randn(3, 4)
        result = torchshear.prune(model, (x,))
        switched_on = masked_copy(model, result.plan)
        for one in (switched_on, result.model):
            dict([*one.named_parameters(), *one.named_buffers()])["gate"].data.fill_(1)
        torch.testing.assert_close(result.model(x), switched_on(x))


@pytest.mark.parametrize("normed", [False, True])
def test_a_branch_that_an_attribute_switches_off_is_compared(normed: bool) -> None:
    class Blended(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, width), nn.Linear(width, 3)
            self.norm = nn.LayerNorm(width) if normed else nn.ReLU()
            self.blend = 0.0

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.one(x))
            return self.two(h) + self.blend * h.shape[1] * x[:, :1]

    torch.manual_seed(0)
    model, x = Blended(8).eval(), torch.randn(3, 4)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    plan = plan_from_kept(groups, {"one.weight[0]": [0, 2, 3, 5]})
    small = Blended(4).eval()
    small.load_state_dict(torchshear.shrink(model, plan, verify=False).state_dict())
    with pytest.raises(VerificationError):
        torchshear.verify(model, small, plan, (x,))
    assert (model.blend, small.blend) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("x", "said"),
    [(torch.randn(0, 4), "no values"), (torch.empty(2, 4, device="meta"), "on the meta device")],
    ids=["empty", "meta"],
)
def test_inputs_that_prove_nothing_are_refused(x: Tensor, said: str) -> None:
    model = randomise(Normed())
    plan = torchshear.prune(model, (torch.randn(2, 4),)).plan
    with pytest.raises(ArgumentError, match=said):
        torchshear.verify(model, model, plan, (x,))


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_a_huge_filler_hides_nothing() -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
            h = self.one(x).relu()
            return self.two(h / h.shape[-1]).masked_fill(~allowed, -1e9)

    torch.manual_seed(0)
    model, x, allowed = Policy().eval(), torch.randn(4, 6), torch.ones(4, 4, dtype=torch.bool)
    allowed[:, 3] = False
    result = torchshear.prune(model, (x, allowed))
    torch.testing.assert_close(result.model(x, allowed), masked_copy(model, result.plan)(x, allowed))
    expected = model(x, allowed).detach()
    assert relative_error([expected], [torch.where(allowed, 2 * expected, expected)]) > 0.1
    assert relative_error([expected], [expected.clone()]) == 0


def test_complex_outputs_are_compared() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(self.two(self.one(x).relu()))

    result = torchshear.prune(randomise(Spectrum()), (torch.randn(2, 6),))
    assert result.verification.max_error < 1e-12
    with torch.no_grad():
        result.model.two.bias[0] += 1e-3
    with pytest.raises(VerificationError):
        torchshear.verify(randomise(Spectrum()), result.model, result.plan, (torch.randn(2, 6),))


def test_train_mode_is_compared() -> None:
    class Divided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x).relu()
            return self.two(h / h.shape[1] if self.training else h)

    model, x = randomise(Divided()).train(), torch.randn(4, 6)
    result = torchshear.prune(model, (x,))
    assert result.verification.modes == ("eval", "train")
    torch.testing.assert_close(result.model.train()(x), masked_copy(model, result.plan).train()(x))
    wrong = torchshear.speedup.shrink_to_form(model, result.plan).model
    wrong.forward = lambda x: Divided.forward(wrong, x)  # type: ignore[method-assign]
    native = Divided()
    native.one, native.two = nn.Linear(6, 6), nn.Linear(6, 4)
    native.load_state_dict(result.model.state_dict())
    with pytest.raises(VerificationError, match="in train mode"):
        torchshear.verify(model, native, result.plan, (x,))


def test_gradients_are_compared() -> None:
    class Detached(nn.Module):
        def __init__(self, is_detached: bool) -> None:
            super().__init__()
            self.one, self.two, self.is_detached = nn.Linear(6, 12), nn.Linear(12, 4), is_detached
            self.is_silent = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x).relu()
            y = self.two(h.detach() if self.is_detached else h)
            return y.detach() if self.is_silent else y

    model, x = randomise(Detached(False)), torch.randn(4, 6)
    result = torchshear.prune(model, (x,))
    assert result.verification.max_gradient_error is not None
    assert result.verification.max_gradient_error < 1e-10
    result.model.is_detached = True
    with pytest.raises(VerificationError, match="gradient of 'one"):
        torchshear.verify(model, result.model, result.plan, (x,))
    result.model.is_detached = False
    result.model.is_silent = True
    with pytest.raises(VerificationError, match="no gradients"):
        torchshear.verify(model, result.model, result.plan, (x,))


def test_random_numbers_are_made_equal() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.ReLU(), nn.Linear(12, 4)).train()
    verification = torchshear.prune(model, (torch.randn(4, 6),)).verification
    assert verification.modes == ("eval", "train")
    assert verification.max_error < 1e-12


class Counting(nn.Module):
    """Multiplies by the number of its runs, counted in an attribute or elsewhere."""

    counted: ClassVar[list[int]] = []

    def __init__(self, *, elsewhere: bool, normed: bool = True) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(6, 12), nn.Linear(12, 4), nn.LayerNorm(12) if normed else nn.ReLU()
        self.elsewhere, self.seen = elsewhere, 0

    def forward(self, x: Tensor) -> Tensor:
        """Four values."""
        self.seen += 1
        self.counted.append(1)
        return self.two(self.norm(self.one(x))) * (len(self.counted) if self.elsewhere else self.seen)


@pytest.mark.parametrize("normed", [False, True])
def test_a_model_whose_runs_cannot_be_repeated_is_called_stateful(normed: bool) -> None:
    with pytest.raises(VerificationError, match="stateful"):
        torchshear.prune(Counting(elsewhere=True, normed=normed), (torch.randn(4, 6),))


def test_a_model_that_counts_its_runs_is_proved() -> None:
    result = torchshear.prune(Counting(elsewhere=False), (torch.randn(4, 6),))
    assert (result.verification.reference, result.model.seen) == ("kept positions", 0)


# -- data of the user's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Normed, Residual])
def test_batches_of_a_loader_are_compared_too(kind: type[nn.Module]) -> None:
    model = randomise(kind())
    x = torch.randn(5, 4) if kind is Normed else image()
    result = torchshear.prune(model, (x,))
    loader = [(torch.randn(n, *x.shape[1:]), torch.zeros(n)) for n in (3, 3, 2)]
    verification = torchshear.verify(model, result.model, result.plan, (x,), data=loader, batches=3)
    assert verification.n_inputs == 6
    assert verification.max_error < 1e-9
    with pytest.raises(DataError, match="3 of 4 batches"):
        torchshear.verify(model, result.model, result.plan, (x,), data=loader, batches=4)


def test_a_fault_that_only_data_shows_is_found() -> None:
    class Rare(nn.Module):
        """Divides by the number of its features where an input is large, which random inputs are not."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x).relu()
            return self.two(h) + (x[:, :1] > 50) * h.shape[1]

    torch.manual_seed(0)
    model = Rare(8).eval()
    plan = plan_from_kept(
        torchshear.analyze(torchshear.trace(model, (torch.randn(3, 4),))), {"one.weight[0]": [0, 2, 3, 5]}
    )
    small = Rare(4).eval()
    small.load_state_dict(torchshear.shrink(model, plan, verify=False).state_dict())
    assert torchshear.verify(model, small, plan, (torch.randn(3, 4),)).max_error < 1e-12
    with pytest.raises(VerificationError):
        torchshear.verify(model, small, plan, (torch.randn(3, 4),), data=[torch.full((2, 4), 100.0)], batches=1)


class Picking(nn.Module):
    """Picks channels of its input by a list, which shrinks with the layer that reads them."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        if kept:
            self.register_buffer("picked", torch.tensor([0, 3, 2]))

    def forward(self, x: Tensor) -> Tensor:
        """A map of four channels."""
        return self.two(self.one(x[:, self.picked if hasattr(self, "picked") else [0, 3, 2]]).softmax(1))


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_shorter_list_picks_is_cut(kept: bool) -> None:
    result = torchshear.prune(randomise(Picking(kept)), (torch.randn(2, 4, 3, 3),), ratio=0.5)
    assert result.verification.reference == "kept positions"
    assert result.model.get_parameter("one.weight").shape[:2] == (3, 2)


def test_gradients_that_are_zero_but_for_rounding_are_equal() -> None:
    """Behind a norm over each map, a mean of each map tells nothing of what came before: all but the last are noise."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    groups = torchshear.analyze(torchshear.trace(model, (torch.randn(2, 4, dtype=torch.float64),)))
    state_cut = StateCut(groups, Cut(groups, {}))
    noise = [{name: 1e-12 * torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(2)]
    one, two = (gradients | {"2.bias": torch.full((4,), 0.07).double()} for gradients in noise)
    assert compare_gradients(state_cut, one, two, "eval", is_float64=True) < 1e-7
    two["1.weight"][0] = 1e-7
    with pytest.raises(VerificationError, match=r"eval mode .*'1\.weight'"):
        compare_gradients(state_cut, one, two, "eval", is_float64=True)


def test_gradients_of_one_sample_are_those_of_its_layout() -> None:
    """Channels are innermost, and the stride of the batch, which is one, that of a token: kernels misread it."""
    model = nn.BatchNorm2d(8).double().eval()
    seen = torch.empty(0)

    def odd(gradient: Tensor) -> Tensor:
        nonlocal seen  # a list would be put back after the run
        seen = gradient.permute(0, 2, 3, 1).contiguous().as_strided((1, 8, 4, 4), (8, 1, 32, 8))
        return seen

    def watch(_: nn.Module, __: object, output: Tensor) -> None:
        output.register_hook(odd)

    model.register_forward_hook(watch)
    run = run_module(
        model, ExampleInputs.of((torch.randn(1, 8, 4, 4).double(),)), torch.float64, select_gradient=lambda _, g: g
    )
    torch.testing.assert_close(run.gradients["bias"], seen.sum((0, 2, 3)))  # type: ignore[index]
