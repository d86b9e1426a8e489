"""Verification finds what is wrong, and names where."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Between, Net, Residual, analyzed, image, randomise
from tests.oracle import masked_copy
from torchshear.dependency.plans._cut import Cut
from torchshear.dependency.rules import _registry
from torchshear.errors import ArgumentError, DataError, VerificationError
from torchshear.graph import ExampleInputs
from torchshear.pruners import plan_from_kept
from torchshear.speedup._relative_error import relative_error
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
        return self.two(self.norm(self.one(x)))


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
    result.model.one.weight.data[0, 0, 0, 0] += 1e-6
    with pytest.raises(VerificationError, match="though its graph does not"):
        torchshear.verify(model, result.model, result.plan, args=(image(),))


def batched_heads() -> Net:
    """Attention with heads merged into the batch, and a layer norm behind it."""

    def run(m: Net, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = m.qkv(x).view(batch, tokens, 3, 6, 8).permute(2, 0, 3, 1, 4).reshape(3, batch * 6, tokens, 8)
        q, k, v = qkv.unbind(0)
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return m.out(m.norm(y.view(batch, 6, tokens, 8).permute(0, 2, 1, 3).reshape(batch, tokens, 48)))

    return Net(run, qkv=nn.Linear(12, 144), norm=nn.LayerNorm(48), out=nn.Linear(48, 4))


@pytest.mark.parametrize("batch", [2, 64])
def test_axes_that_hold_the_batch_are_verified_at_few_samples(batch: int) -> None:
    result = torchshear.prune(randomise(batched_heads()), (torch.randn(batch, 5, 12),))
    assert result.verification.reference == "kept positions"
    assert result.verification.max_error <= 1e-9
    assert {len(kept) for kept in result.plan.kept.values()} == {3, 4}


@pytest.mark.parametrize(
    ("norm", "reference", "excused"),
    [
        (nn.Identity(), "masked", []),  # an operator for which zeros are exact
        (nn.LayerNorm(12), "kept positions", ["layer_norm (aten.layer_norm.default in module 'norm'"]),
    ],
)
def test_a_mirrored_rule_of_a_mixing_operator_is_caught(
    norm: nn.Module, reference: str, excused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"one": nn.Linear(5, 12), "norm": norm, "two": nn.Linear(12, 3)}
    model, x = randomise(Net(lambda m, x: m.two(m.norm(m.one(x).cumsum(-1))), **parts)), torch.randn(4, 5)
    verification = torchshear.prune(model, (x,)).verification
    assert verification.max_error < 1e-12
    assert verification.reference == reference
    assert [name.partition(" (test_")[0].startswith(tuple(excused)) for name in verification.operators] == [True] * len(
        excused
    )
    rule = _registry._RULES["aten.cumsum"]

    def mirrored(call):  # type: ignore[no-untyped-def]
        *others, last = rule(call)  # type: ignore[misc]
        return (*others, call.algebra.take(last, slice(None, None, -1)))

    monkeypatch.setitem(_registry._RULES, "aten.cumsum", mirrored)
    with pytest.raises(VerificationError, match="'cumsum', aten.cumsum.default"):
        torchshear.prune(model, (x,))


def centred() -> Net:
    """A norm over channels written by hand: what is cut takes on the mean."""

    def run(m: Net, x: Tensor) -> Tensor:
        x = m.one(x)
        x = x - x.mean(1, keepdim=True)
        return m.two(m.scale * x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt())

    return Net(run, one=nn.Conv2d(3, 12, 1), two=nn.Conv2d(12, 4, 1), scale=nn.Parameter(torch.rand(12, 1, 1) + 0.5))


@pytest.mark.parametrize("ratio", [0.5, 0.09])  # six channels go, and one
def test_a_norm_by_hand_is_proved(ratio: float) -> None:
    result = torchshear.prune(randomise(centred()), (torch.randn(2, 3, 4, 4),), ratio=ratio)
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


def language() -> Net:
    """A small language model without rotary embeddings."""

    def run(m: Net, tokens: Tensor) -> Tensor:
        x = m.tokens(tokens)
        q, k, v = (f(x).view(*x.shape[:2], m.heads, -1).transpose(1, 2) for f in (m.q, m.k, m.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.out(x + m.o(y.transpose(1, 2).flatten(2)))

    return Net(
        run, heads=4, tokens=nn.Embedding(60, 32), **{name: nn.Linear(32, 32) for name in "qkvo"}, out=nn.Linear(32, 60)
    )


def test_equal_tokens_prove_nothing() -> None:
    torch.manual_seed(0)
    model, tokens, zeros = language().eval(), torch.randint(0, 60, (2, 8)), torch.zeros(2, 8, dtype=torch.long)
    model.q.weight.data.mul_(8)
    result = torchshear.prune(model, (zeros,), roles="heads")
    assert (result.form, result.model.heads) == ("native", 2)
    torch.testing.assert_close(
        result.model(tokens), masked_copy(model, result.plan.masks()).float()(tokens), rtol=1e-5, atol=1e-5
    )
    result.model.heads = 4
    with pytest.raises(VerificationError):
        torchshear.verify(model, result.model, result.plan, (zeros,))


def test_a_branch_that_a_zero_switches_off_is_compared() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = m.one(x).relu()
        return m.two(h) + m.gate * h.reshape(len(h), 2, -1).shape[2] * x[:, :2]

    for gate in (torch.zeros(()), nn.Parameter(torch.zeros(()))):
        model, x = Net(run, one=nn.Linear(4, 8), two=nn.Linear(8, 2), gate=gate).eval(), torch.randn(3, 4)
        result = torchshear.prune(model, (x,))
        switched_on = masked_copy(model, result.plan.masks()).float()
        for one in (switched_on, result.model):
            dict([*one.named_parameters(), *one.named_buffers()])["gate"].data.fill_(1)
        torch.testing.assert_close(result.model(x), switched_on(x))


def narrowed(make: Callable[[int], nn.Module]) -> tuple[nn.Module, nn.Module, torchshear.PruningPlan]:
    """A model of eight units, one of four with the weights of these, and the plan that keeps them."""
    torch.manual_seed(0)
    model, small = make(8).eval(), make(4).eval()
    plan = plan_from_kept(analyzed(model, torch.randn(3, 4)), {"one.weight[0]": [0, 2, 3, 5]})
    small.load_state_dict(torchshear.shrink(model, plan, verify=False).state_dict())
    return model, small, plan


@pytest.mark.parametrize("normed", [False, True])
def test_a_branch_that_an_attribute_switches_off_is_compared(normed: bool) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = m.norm(m.one(x))
        return m.two(h) + m.blend * h.shape[1] * x[:, :1]

    def blended(width: int) -> nn.Module:
        norm = nn.LayerNorm(width) if normed else nn.ReLU()
        return Net(run, one=nn.Linear(4, width), two=nn.Linear(width, 3), norm=norm, blend=0.0)

    model, small, plan = narrowed(blended)
    with pytest.raises(VerificationError):
        torchshear.verify(model, small, plan, (torch.randn(3, 4),))
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


def test_a_huge_filler_hides_nothing() -> None:
    def run(m: Net, x: Tensor, allowed: Tensor) -> Tensor:
        h = m.one(x).relu()
        return m.two(h / h.shape[-1]).masked_fill(~allowed, -1e9)

    torch.manual_seed(0)
    model = Net(run, one=nn.Linear(6, 32), two=nn.Linear(32, 4)).eval()
    x, allowed = torch.randn(4, 6), torch.ones(4, 4, dtype=torch.bool)
    allowed[:, 3] = False
    result = torchshear.prune(model, (x, allowed))
    torch.testing.assert_close(result.model(x, allowed), masked_copy(model, result.plan.masks()).float()(x, allowed))
    expected = model(x, allowed).detach()
    assert relative_error([expected], [torch.where(allowed, 2 * expected, expected)]) > 0.1
    assert relative_error([expected], [expected.clone()]) == 0


def test_complex_outputs_are_compared() -> None:
    def spectrum() -> Net:
        return Net(lambda m, x: torch.fft.rfft(m.two(m.one(x).relu())), one=nn.Linear(6, 16), two=nn.Linear(16, 8))

    result = torchshear.prune(randomise(spectrum()), (torch.randn(2, 6),))
    assert result.verification.max_error < 1e-12
    result.model.two.bias.data[0] += 1e-3
    with pytest.raises(VerificationError):
        torchshear.verify(randomise(spectrum()), result.model, result.plan, (torch.randn(2, 6),))


def test_train_mode_is_compared() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = m.one(x).relu()
        return m.two(h / h.shape[1] if m.training else h)

    model, native = (Net(run, one=nn.Linear(6, width), two=nn.Linear(width, 4)) for width in (12, 6))
    model, x = randomise(model).train(), torch.randn(4, 6)
    result = torchshear.prune(model, (x,))
    assert result.verification.modes == ("eval", "train")
    torch.testing.assert_close(result.model.train()(x), masked_copy(model, result.plan.masks()).float().train()(x))
    native.load_state_dict(result.model.state_dict())
    with pytest.raises(VerificationError, match="in train mode"):
        torchshear.verify(model, native, result.plan, (x,))


def test_gradients_are_compared() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        h = m.one(x).relu()
        y = m.two(h.detach() if m.is_detached else h)
        return y.detach() if m.is_silent else y

    def detached(is_detached: bool) -> Net:
        return Net(run, one=nn.Linear(6, 12), two=nn.Linear(12, 4), is_detached=is_detached, is_silent=False)

    model, x = randomise(detached(False)), torch.randn(4, 6)
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
    def run(m: Net, x: Tensor) -> Tensor:
        """Divides by the number of its features where an input is large, which random inputs are not."""
        h = m.one(x).relu()
        return m.two(h) + (x[:, :1] > 50) * h.shape[1]

    model, small, plan = narrowed(lambda width: Net(run, one=nn.Linear(4, width), two=nn.Linear(width, 3)))
    assert torchshear.verify(model, small, plan, (torch.randn(3, 4),)).max_error < 1e-12
    with pytest.raises(VerificationError):
        torchshear.verify(model, small, plan, (torch.randn(3, 4),), data=[torch.full((2, 4), 100.0)], batches=1)


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_shorter_list_picks_is_cut(kept: bool) -> None:
    """Channels of an input are picked by a list, which shrinks with the layer that reads them."""
    picked = torch.tensor([0, 3, 2]) if kept else [0, 3, 2]
    model = Net(
        lambda m, x: m.two(m.one(x[:, m.picked]).softmax(1)),
        picked=picked,
        one=nn.Conv2d(3, 6, 1),
        two=nn.Conv2d(6, 4, 1),
    )
    result = torchshear.prune(randomise(model), (torch.randn(2, 4, 3, 3),), ratio=0.5)
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
