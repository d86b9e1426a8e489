"""Refit of unusual models: writing in place, without a batch, with other outputs, with chance, in small types."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import torchshear
from tests.networks import noise
from torchshear.calibration._samples import SampleSplit, sample_numbers
from torchshear.errors import PlanError, VerificationError
from torchshear.pruners import plan_from_kept
from torchshear.speedup.compensation import _layer_fits
from torchshear.speedup.compensation._least_squares import Moments, fit_linear, sum_apart
from torchshear.speedup.compensation._refit import refit
from torchshear.speedup.compensation._refit_record import Refit


class Chain(nn.Module):
    """Three linear layers with something between or behind them."""

    def __init__(self, between: Callable[..., Any] = lambda x: x, behind: Callable[..., Any] = lambda x: x) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 6)
        self.between, self.behind = between, behind

    def forward(self, x: Tensor) -> Any:
        return self.behind(self.head(self.between(self.two(self.one(x).relu())).relu()))


class Writing(nn.Module):
    """Writes what a layer gives to a value that both networks share: through a view, or behind one."""

    def __init__(self, through_view: bool) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(4, 6)
        self.through_view = through_view

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.two(self.one(x).relu())
        view = x[:, 2:6]
        if self.through_view:
            view += y
        else:
            x += functional.pad(y, (2, 2))
        out: Tensor = self.head(x[:, 2:6] if self.through_view else view)
        return out


class Modules(nn.Module):
    """Given layers by name, and how they are called."""

    def __init__(self, call: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any) -> Any:
        return self.call(self, *args)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(noise(*shape, seed=3) / 4)


def mixed(m: Any, x: Tensor) -> Tensor:
    """Every token is given to three experts."""
    tokens = x.flatten(0, 1)
    each = torch.bmm(torch.bmm(tokens.expand(3, -1, 8), m.up).relu(), m.down)
    out: Tensor = m.head((each * m.gate(tokens).softmax(-1).t().unsqueeze(2)).sum(0).unflatten(0, (-1, 5)))
    return out


def attention(m: Any, x: Tensor) -> Tensor:
    """Some rows of the scores hold nothing but -inf."""
    masked = x[..., 0] > 0.5
    scores = (m.q(x) @ m.k(x).mT / 4).masked_fill(masked.unsqueeze(1) | masked.unsqueeze(2), -torch.inf)
    out: Tensor = m.head(m.out(scores.softmax(-1) @ m.v(x)).relu()).nan_to_num()
    return out


def by_time(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.head(m.norm(m.one(x.transpose(0, 1)).relu()))
    return y


def of_image(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.head(m.norm(m.two(m.one(x).relu()).relu().mean((1, 2))))
    return y


VECTOR, SEQUENCE = (16, 8), (16, 5, 8)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "write through a view": (lambda: Writing(True), VECTOR),
    "write behind a view": (lambda: Writing(False), VECTOR),
    "in-place activations": (lambda: Chain(torch.relu_, lambda x: x.mul_(2)), VECTOR),
    "one matrix in a batch": (
        lambda: Modules(lambda m, x: m.head((m.one(x).relu() @ m.w).relu()), one=nn.Linear(8, 24), w=weight(1, 24, 24),
                        head=nn.Linear(24, 4)),
        SEQUENCE,
    ),
    "experts": (
        lambda: Modules(mixed, up=weight(3, 8, 24), down=weight(3, 24, 8), gate=nn.Linear(8, 3), head=nn.Linear(8, 4)),
        SEQUENCE,
    ),
    "the batch behind": (
        lambda: Modules(by_time, one=nn.Linear(8, 16), norm=nn.LayerNorm(16), head=nn.Linear(16, 4)), SEQUENCE
    ),
    "an image without a batch": (
        lambda: Modules(of_image, one=nn.Conv2d(3, 16, 3), two=nn.Conv2d(16, 16, 3), norm=nn.LayerNorm(16),
                        head=nn.Linear(16, 4)),
        (3, 8, 8),
    ),
    "a vector without a batch": (
        lambda: Modules(lambda m, x: m.head(m.norm(m.one(x).relu())), one=nn.Linear(8, 16), norm=nn.LayerNorm(16),
                        head=nn.Linear(16, 4)),
        (8,),
    ),
    "rows of NaN": (
        lambda: Modules(attention, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8), out=nn.Linear(8, 24),
                        head=nn.Linear(24, 4)),
        SEQUENCE,
    ),
    "-inf among outputs": (lambda: Chain(behind=lambda x: x.masked_fill(torch.ones(6) > torch.arange(6), -torch.inf)),
                           VECTOR),
    "integers": (lambda: Chain(behind=lambda x: {"positive": (x > 0).long(), "n": 3}), VECTOR),
    "a loss": (lambda: Chain(behind=lambda x: x.square().mean()), VECTOR),
    "complex numbers": (lambda: Chain(behind=torch.fft.fft), VECTOR),
    "as many as the data decides": (lambda: Chain(behind=lambda x: (x[x[:, 0] > 0], x)), VECTOR),
    "noise": (lambda: Chain(between=lambda x: x + 0.1 * torch.randn_like(x)), VECTOR),
    "dropout in eval mode": (lambda: Chain(between=lambda x: functional.dropout(x, 0.1, training=True)), VECTOR),
}  # fmt: skip


def fitted(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module, Refit]:
    """Return the model after the cut and after the refit, with the record."""
    example = noise(*shape).to(dtype)
    result = torchshear.prune(model, example, ratio=0.5)
    data = [noise(*shape, seed=100 + number).to(dtype) for number in range(4 if shape[0] > 8 else 128)]
    held = [batch.clone() for batch in data]
    state = torch.get_rng_state()
    small, record = refit(model, result.model, result.plan, data, batches=len(data), progress=False)
    assert all(torch.equal(batch, other) for batch, other in zip(data, held, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    return result.model, small, record


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


@pytest.mark.parametrize("name", MODELS)
def test_outputs_come_nearer(name: str) -> None:
    make, shape = MODELS[name]
    model = prepared(make)
    cut, small, record = fitted(model, shape)
    assert record.is_kept
    assert 0 < record.error_after < record.error_before
    assert all(0 <= layer.error_after <= layer.error_before for layer in record.layers)
    owners = {parameter.split(".")[0] for parameter, _ in model.named_parameters()} - {"up", "down", "w"}
    calls = {"experts": {"bmm", "bmm_1"}, "one matrix in a batch": {"matmul"}, "rows of NaN": {"matmul"}}.get(
        name, set()
    )
    assert {layer.name for layer in record.layers} == owners | calls
    assert record.layers[-1].method == "least squares"
    assert not record.skipped
    errors = [0.0, 0.0]
    for seed in range(8):
        x = noise(*shape, seed=seed)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = []
            for one in (model, cut, small):
                torch.manual_seed(0)
                leaves = pytree.tree_leaves(one(x.clone()))
                outputs.append([leaf for leaf in leaves if isinstance(leaf, Tensor)][-1:])
        for place, other in enumerate(outputs[1:]):
            difference = [(a - b).abs().double().nan_to_num() for a, b in zip(outputs[0], other, strict=True)]
            errors[place] += sum(float(d.square().sum()) for d in difference)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["write through a view", "write behind a view"])
def test_each_network_writes_to_memory_of_its_own(name: str) -> None:
    make, shape = MODELS[name]
    _, _, record = fitted(prepared(make), shape)
    assert record.layers[-1].error_after == pytest.approx(record.error_after, rel=1e-9)


def test_errors_of_small_types_are_those_of_rounded_weights() -> None:
    torch.manual_seed(0)
    make = Chain().eval()
    with torch.no_grad():
        make.one.weight[:] = make.one.weight[0] + 0.01 * make.one.weight  # nearly the same channels
    for dtype in (torch.bfloat16, torch.float16):
        _, _, record = fitted(make.to(dtype), VECTOR, dtype)
        assert record.error_after < record.error_before
    u, w = noise(1, 64, 12) * 1e-2 + noise(1, 64, 1, seed=1), noise(1, 5, 12, seed=2).bfloat16()
    moments = [Moments(1, 12, 5, u.device) for _ in range(2)]
    for one, rows in zip(moments, (slice(48), slice(48, 64)), strict=True):
        one.add(u[:, rows], torch.sin(3 * u[:, rows]) @ noise(1, 12, 5, seed=4))
    fit = fit_linear(*moments, w, w.new_zeros(1, 5), True)
    assert fit.error_after < fit.error_before
    assert torch.equal(fit.weight.bfloat16().double(), fit.weight)
    assert torch.equal(fit.bias.bfloat16().double(), fit.bias)
    assert fit.error_after == moments[1].error(fit.weight, fit.bias)


def test_a_weight_that_several_calls_read_is_fitted_to_all_of_them() -> None:
    def call(m: Any, x: Tensor) -> Any:
        return m.head(m.twice(m.one(x).relu()).relu() + m.twice(m.two(x).relu()))

    layers = {"one": nn.Linear(8, 16), "two": nn.Linear(8, 16), "twice": nn.Linear(16, 12), "head": nn.Linear(12, 4)}
    _, _, record = fitted(prepared(lambda: Modules(call, **layers)), VECTOR)
    assert not record.skipped
    (shared,) = [layer for layer in record.layers if layer.name == "twice"]
    assert shared.method == "least squares"
    assert shared.error_after < shared.error_before
    assert [layer.name for layer in record.layers].count("head") == 1
    assert record.is_kept
    assert record.error_after < 0.5 * record.error_before


def test_all_calls_together_say_what_a_shared_weight_is() -> None:
    """Each call shows the weight one half of its inputs, so that neither could tell it alone."""

    def call(m: Any, x: Tensor) -> Any:
        first, second = functional.pad(x[:, :4], (0, 4)), functional.pad(x[:, 4:], (4, 0))
        return m.twice(first), m.twice(second)

    model = prepared(lambda: Modules(call, twice=nn.Linear(8, 5)))
    plan = plan_from_kept(torchshear.analyze(torchshear.trace(model, noise(2, 8))), {})
    spoiled: Any = torchshear.shrink(model, plan)
    with torch.no_grad():
        spoiled.twice.weight += noise(5, 8, seed=3)
    small, record = refit(model, spoiled, plan, [noise(64, 8)], batches=1, progress=False)
    assert record.error_after < 1e-9
    assert torch.allclose(small.twice.weight, model.twice.weight, atol=1e-3)  # type: ignore[union-attr]


def test_rows_of_samples_held_out_are_not_fitted_to() -> None:
    u, y = noise(1, 12, 3), noise(1, 12, 2, seed=1)
    is_held_out = torch.arange(12) % 4 == 3
    fitting, held_out = sum_apart(
        [(u[:, :8], y[:, :8], is_held_out[:8]), (u[:, 8:], y[:, 8:], is_held_out[8:])], (1, 3, 2)
    )
    for moments, chosen in ((fitting, ~is_held_out), (held_out, is_held_out)):
        assert moments.n == int(chosen.sum())
        assert torch.allclose(moments.uu, u[:, chosen].mT @ u[:, chosen])
        assert torch.allclose(moments.uy, u[:, chosen].mT @ y[:, chosen])


def test_a_tied_embedding_is_left_alone() -> None:
    def call(m: Any, x: Tensor) -> Any:
        return functional.linear(m.hidden(functional.embedding(x, m.w)).relu(), m.w)

    model = prepared(lambda: Modules(call, w=weight(20, 8), hidden=nn.Linear(8, 8)))
    tokens = [torch.randint(0, 20, (16, 5), generator=torch.Generator().manual_seed(number)) for number in range(4)]
    plan = plan_from_kept(torchshear.analyze(torchshear.trace(model, tokens[0][:2])), {})
    spoiled: Any = copy.deepcopy(model)
    with torch.no_grad():
        spoiled.hidden.bias += 1
    small, record = refit(model, spoiled, plan, tokens, batches=4, progress=False)
    assert [one.reason for one in record.skipped] == ["'w' is read by 2 calls, not all of which are layers"]
    assert torch.equal(small.w, model.w)  # type: ignore[arg-type]


def test_a_weight_that_is_moved_once_and_read_twice_is_fitted_as_well() -> None:
    def call(m: Any, x: Tensor) -> Any:
        w = m.w.t()
        return m.head((((m.one(x).relu() @ w).relu()) @ w).relu())

    model = prepared(lambda: Modules(call, one=nn.Linear(8, 16), w=weight(16, 16), head=nn.Linear(16, 4)))
    cut, small, record = fitted(model, VECTOR)
    assert not record.skipped
    assert not torch.equal(cut.w, small.w)  # type: ignore[arg-type]
    assert record.is_kept


def test_everything_left_alone_is_named_once() -> None:
    def call(m: Any, x: Tensor) -> Any:
        x = m.lstm(m.twice(m.twice(m.norm(m.one(x)))))[0]
        w = (m.both * 1).split(12)[0]
        return m.head(m.bilinear(torch.einsum("btc,cd->bd", x, m.w).unsqueeze(1) + x, functional.linear(x, w)))

    layers = {
        "one": nn.Linear(8, 12), "norm": nn.LayerNorm([5, 12]), "twice": nn.Linear(12, 12),
        "lstm": nn.LSTM(12, 12, batch_first=True), "w": weight(12, 12), "both": weight(24, 12),
        "bilinear": nn.Bilinear(12, 12, 12), "head": nn.Linear(12, 4),
    }  # fmt: skip
    _, _, record = fitted(prepared(lambda: Modules(call, **layers)), SEQUENCE)
    assert [(one.name, one.reason) for one in record.skipped] == [
        ("norm", "its scale has several dimensions"),
        ("einsum", "aten.einsum is not refitted in this form"),
        ("linear_3", "its weight is computed of parameters"),
        ("bilinear", "aten.bilinear is not refitted in this form"),
    ]


def test_complex_weights_are_left_alone() -> None:
    model = prepared(
        lambda: Modules(
            lambda m, x: (m.one(x).to(m.w.dtype) @ m.w).abs(), one=nn.Linear(8, 8), w=nn.Parameter(weight(8, 4) * 1j)
        )
    )
    plan = plan_from_kept(torchshear.analyze(torchshear.trace(model, noise(2, 8))), {})
    spoiled: Any = copy.deepcopy(model)
    with torch.no_grad():
        spoiled.one.bias += 1  # what the product reads is no longer the same
    _, record = refit(model, spoiled, plan, [noise(16, 8)], batches=1, progress=False)
    assert [(one.name, one.reason) for one in record.skipped] == [("matmul", "its weight is not of real numbers")]


def test_a_channel_that_is_constant_on_the_data_keeps_its_variance() -> None:
    def call(m: Any, x: Tensor) -> Any:
        one = functional.linear(x, m.w * 1.0, m.b)  # computed, and so left alone
        return m.head(m.norm(one.relu()))

    layers = {"w": weight(16, 8), "b": nn.Parameter(noise(16)), "norm": nn.BatchNorm1d(16, affine=False)}
    model = prepared(lambda: Modules(call, **layers, head=nn.Linear(16, 4)))
    model = torchshear.recalibrate(model, [noise(256, 8)], 1, progress=False)
    old: Any = model.get_buffer("norm.running_var")
    plan = plan_from_kept(torchshear.analyze(torchshear.trace(model, noise(2, 8))), {})
    spoiled: Any = torchshear.shrink(model, plan)
    with torch.no_grad():
        spoiled.b[3] = -100
        spoiled.b[4:] += 1
    small, record = refit(model, spoiled, plan, [noise(256, 8)], batches=1, progress=False)
    (norm,) = (layer for layer in record.layers if layer.name == "norm")
    assert norm.method == "statistics"
    variance: Any = small.get_buffer("norm.running_var")
    assert variance[3] == old[3]
    assert bool((variance[4:] != old[4:]).all())


def test_a_loader_may_write_to_the_batch_that_it_gave() -> None:
    model = prepared(Chain)
    result = torchshear.prune(model, noise(2, 8), ratio=0.5)

    def batches(is_reused: bool) -> Iterator[Tensor]:
        memory = torch.empty(16, 8, dtype=torch.float64)
        for seed in range(4):
            yield memory.copy_(noise(16, 8, seed=seed)) if is_reused else noise(16, 8, seed=seed)

    found = [
        refit(model, result.model, result.plan, batches(one), batches=4, progress=False)[1] for one in (True, False)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, small: model, r"of the shrunk model is \(32,.*the plan makes \(16,"),
        (lambda model, small: small.float(), r"of torch.float32 on cpu; the plan makes \(16.*float64 on cpu"),
        (lambda model, small: nn.Linear(3, 3).double(), "Linear does not compute what the plan makes"),
        (lambda model, small: nn.Sequential(small, nn.ReLU()), "Sequential does not compute what the plan makes"),
    ],
)  # fmt: skip
def test_a_model_that_the_plan_did_not_make(change: Callable[..., nn.Module], message: str) -> None:
    model = prepared(Chain)
    result = torchshear.prune(model, noise(2, 8), ratio=0.5)
    with pytest.raises(PlanError, match=message):
        refit(model, change(model, result.model), result.plan, [noise(16, 8)], batches=1, progress=False)


def test_outputs_that_lose_channels_are_compared_where_they_are_kept() -> None:
    model = prepared(lambda: Chain(between=lambda x: x * 2, behind=lambda x: {"all": (x, 3)}))
    result = torchshear.prune(model, noise(2, 8), ratio=0.5, prunable_outputs="all.0")
    small, record = refit(model, result.model, result.plan, [noise(64, 8)], batches=1, progress=False)
    assert small.get_parameter("head.weight").shape[0] == 3
    assert 0 < record.error_after < record.error_before


def test_data_without_finite_numbers_changes_nothing() -> None:
    model = prepared(Chain)
    result = torchshear.prune(model, noise(2, 8), ratio=0.5)
    data = [torch.full((16, 8), torch.inf, dtype=torch.float64)]
    small, record = refit(model, result.model, result.plan, data, batches=1, progress=False)
    assert {one.name for one in record.skipped} == {"one", "two", "head"}
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in result.model.state_dict().items())


def test_samples_are_held_out_whole() -> None:
    assert sample_numbers(6, 3).tolist() == [0, 0, 1, 1, 2, 2]  # tokens side by side
    assert sample_numbers(4, 3).tolist() == [0, 1, 2, 3]  # as many as data picks
    assert sample_numbers(0, 3).tolist() == []
    assert SampleSplit((2, 3, 3)).is_held_out(torch.tensor([0, 0, 1, 2, 2]), 2).tolist() == [
        False,
        False,
        False,
        True,
        True,
    ]
    experts = MODELS["experts"]
    _, _, record = fitted(prepared(experts[0]), experts[1])
    assert {layer.name: layer.method for layer in record.layers}["bmm_1"] == "least squares"


def test_the_batch_is_found_behind_a_mask() -> None:
    def call(m: Any, mask: Tensor, x: Tensor) -> Any:
        return m.head(m.two(m.one(x).relu()).relu() * mask.any(0))

    model = prepared(lambda: Modules(call, one=nn.Linear(8, 32), two=nn.Linear(32, 5), head=nn.Linear(5, 4)))
    mask = torch.ones(5, 5, dtype=torch.bool)
    result = torchshear.prune(model, (mask, noise(16, 8)), ratio=0.5)
    data = [(mask, noise(16, 8, seed=seed)) for seed in range(4)]
    _, record = refit(model, result.model, result.plan, data, batches=4, progress=False)
    assert (record.n_samples, record.n_held_out) == (48, 16)
    assert record.error_after < record.error_before


def test_a_norm_behind_a_layer_without_bias_takes_its_offset() -> None:
    def call(m: Any, x: Tensor) -> Any:
        return m.head(m.norm(m.inner(m.stem(x).relu())).relu().mean((2, 3)))

    torch.manual_seed(0)
    layers = {
        "stem": nn.Conv2d(3, 16, 3), "inner": nn.Conv2d(16, 12, 1, bias=False), "norm": nn.BatchNorm2d(12),
        "head": nn.Linear(12, 4),
    }  # fmt: skip
    _, _, record = fitted(prepared(lambda: Modules(call, **layers)), (16, 3, 6, 6))
    by_name = {layer.name: layer for layer in record.layers}
    assert by_name["inner"].method == "least squares"
    # The norm reads the fitted layer with its mean where it was: it starts from the error that the layer was left with.
    assert by_name["norm"].error_before < 2 * by_name["inner"].error_after


def test_a_product_that_adds_values_is_left_alone() -> None:
    experts = {"one": nn.Linear(8, 16), "w": weight(3, 16, 12), "shift": weight(3, 1, 12), "head": nn.Linear(12, 4)}

    def call(m: Any, x: Tensor) -> Any:
        x = m.one(x).relu()
        return m.head(torch.baddbmm(m.shift, torch.stack([x, x, x]), m.w).sum(0))

    _, _, record = fitted(prepared(lambda: Modules(call, **experts)), VECTOR)
    assert [one.reason for one in record.skipped] == ["it reads more than an input, a weight and a bias"]


def test_worse_outputs_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(*given: Any) -> Any:
        fit = fit_linear(*given)
        return dataclasses.replace(fit, weight=-fit.weight)

    monkeypatch.setattr(_layer_fits, "fit_linear", spoil)
    cut, small, record = fitted(prepared(Chain), VECTOR)
    assert record.error_after > record.error_before
    assert not record.is_kept
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in cut.state_dict().items())


def test_a_model_that_does_not_read_its_new_weights_is_refused() -> None:
    def call(m: Any, x: Tensor) -> Any:
        stale = m.stale[0] if m.stale else m.two.weight
        return m.head(functional.linear(m.one(x).relu(), stale, m.two.bias).relu())

    layers = {"one": nn.Linear(8, 32), "two": nn.Linear(32, 16), "head": nn.Linear(16, 4), "stale": []}
    model = prepared(lambda: Modules(call, **layers))
    result = torchshear.prune(model, noise(2, 8), ratio=0.5)
    small: Any = result.model
    small.stale = [small.two.weight.detach().clone()]  # as a model keeps that copies its weights for speed
    with pytest.raises(VerificationError, match="state that the graph does not hold"):
        refit(model, small, result.plan, [noise(16, 8, seed=number) for number in range(4)], batches=4, progress=False)
