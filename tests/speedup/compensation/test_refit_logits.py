"""Refit of queries and keys that lose dimensions: to the logits, which those that are left have to give alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import noise
from torchshear.pruners import plan_from_kept
from torchshear.speedup import Refit, refit
from torchshear.speedup.compensation import _logits_fit, _logits_layers
from torchshear.speedup.compensation._refit_record import RefittedLayer

Product = Callable[[Tensor, Tensor], Tensor]
attention = functional.scaled_dot_product_attention


def softmaxed(product: Product) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: product(q, k).softmax(-1) @ v


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "attention": lambda q, k, v: attention(q, k, v, scale=0.4),
    "causal": lambda q, k, v: attention(q, k, v, scale=0.4, is_causal=True),
    "matmul": softmaxed(lambda q, k: q @ k.mT * 0.4),
    "scaled before": softmaxed(lambda q, k: (q * 0.8) @ (k / 2).transpose(2, 3)),
    "einsum": softmaxed(lambda q, k: torch.einsum("bhid,bhjd->bhij", q * 0.4, k)),
    "einsum, keys first": softmaxed(lambda q, k: torch.einsum("bhjd,bhid->bhij", k, q * 0.4)),
    "bmm": lambda q, k, v: softmaxed(lambda a, b: torch.bmm(a, b.mT) * 0.4)(*(x.flatten(0, 1) for x in (q, k, v)))
    .unflatten(0, (-1, 4)),
    "grouped": lambda q, k, v: attention(q, k[:, ::2], v[:, ::2], scale=0.4, enable_gqa=True),
}  # fmt: skip


class Attention(nn.Module):
    """Attention with four heads; keys and values may have fewer."""

    def __init__(
        self,
        call: Callable[[Tensor, Tensor, Tensor], Tensor],
        n_keys: int = 4,
        is_packed: bool = False,
        bias: bool = True,
        change: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        sizes = {"q": 4, "k": n_keys, "v": n_keys}
        if is_packed:
            self.packed = nn.Linear(12, 96, bias=bias)
        else:
            for name, n in sizes.items():
                setattr(self, name, nn.Linear(12, 8 * n, bias=bias))
        self.out = nn.Linear(32, 5)
        self.call, self.sizes, self.is_packed, self.change = call, sizes, is_packed, change

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.is_packed:
            q, k, v = self.packed(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind()
        else:
            q, k, v = (getattr(self, name)(x).unflatten(-1, (n, -1)).transpose(1, 2) for name, n in self.sizes.items())
        out: Tensor = self.out(self.call(self.change(q), k, v).transpose(1, 2).flatten(2))
        return out


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))
    return attention(q, k, v, scale=0.4)


def without_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence without a head dimension is enough for a product of matrices."""
    return attention(q[:, 0], k[:, 0], v[:, 0], scale=0.4).unsqueeze(1).expand(-1, 4, -1, -1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda call=call: Attention(call) for name, call in FORMS.items() if name != "grouped"},  # type: ignore[misc]
    "packed": lambda: Attention(FORMS["attention"], is_packed=True),
    "without bias": lambda: Attention(FORMS["attention"], bias=False),
    "grouped": lambda: Attention(lambda q, k, v: attention(q, k, v, scale=0.4, enable_gqa=True), n_keys=2),
    "repeated": lambda: Attention(repeated, n_keys=2),
}


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # logits that matter
    return model


def halved(model: nn.Module, x: Tensor, data: list[Tensor]) -> tuple[Any, Any, Refit]:
    """Halve the dimensions of queries and keys alone, and refit."""
    groups = torchshear.analyze(torchshear.trace(model, x))
    chosen = [group for group in groups if group.role in ("qk_dim", "head_dim")]
    plan = plan_from_kept(groups, {group.name: list(range(group.width // 2)) for group in chosen})
    cut = torchshear.shrink(model, plan)
    return cut, *refit(model, cut, plan, data, batches=len(data), progress=False)


def batches(*shape: int) -> list[Tensor]:
    return [noise(*shape, seed=100 + number) for number in range(4)]


def logits_layer(record: Refit) -> RefittedLayer:
    (layer,) = [layer for layer in record.layers if layer.kind == "logits"]
    return layer


def logits_of(model: Any, x: Tensor) -> Tensor:
    """The products of queries and keys of all heads, from the weights alone, without a scale."""
    x = functional.linear(x, model.first.weight, model.first.bias).relu()
    if hasattr(model, "packed"):
        q, k, _ = functional.linear(x, model.packed.weight, model.packed.bias).unflatten(-1, (3, 4, -1)).unbind(2)
    else:
        q, k = (functional.linear(x, one.weight, one.bias) for one in (model.q, model.k))
        n_keys = model.v.weight.shape[0] // 8
        q, k = q.unflatten(-1, (4, -1)), k.unflatten(-1, (n_keys, -1)).repeat_interleave(4 // n_keys, 2)
    return torch.einsum("bihd,bjhd->bhij", q, k).detach()


@pytest.mark.parametrize("name", MODELS)
def test_logits_come_nearer(name: str) -> None:
    model: Any = prepared(MODELS[name])
    data = batches(48, 5, 6)
    cut, small, record = halved(model, noise(3, 5, 6), data)
    layer = logits_layer(record)
    assert layer.method == "alternating least squares"
    share = 0.7 if name in ("grouped", "repeated") else 0.5  # keys that serve two heads are harder to cut
    assert layer.error_after < share * layer.error_before
    assert not record.skipped
    assert record.is_kept
    x = torch.cat(data)
    with torch.no_grad():
        y, got = (one(x)[torch.arange(len(x)) % 4 == 3] for one in (model, small))
    ratio = float((got - y).square().sum() / (y - y.mean(0)).square().sum())
    assert record.error_after == pytest.approx(ratio, rel=1e-6)
    unseen = noise(64, 5, 6, seed=7)
    wanted = logits_of(model, unseen)
    before, after = (float((logits_of(one, unseen) - wanted).square().sum()) for one in (cut, small))
    variance = float((wanted - wanted.mean()).square().sum())
    assert after < share * before
    assert after / variance == pytest.approx(layer.error_after, rel=0.5)  # measured on other samples


def numpy_solution(x: Any, y: Any, wanted: Any, width: int) -> tuple[Any, Any]:
    """Weights of queries and keys by least squares in turn, each from a dense system; the best of some starts."""
    best: tuple[float, Any, Any] = np.inf, None, None
    for seed in range(4):
        keys = np.random.default_rng(seed).normal(size=(width, y.shape[-1]))
        for _ in range(60):
            system = np.einsum("nid,njw->nijwd", x, y @ keys.T).reshape(wanted.size, -1)
            queries = np.linalg.lstsq(system, wanted.ravel(), rcond=None)[0].reshape(width, -1)
            system = np.einsum("niw,njd->nijwd", x @ queries.T, y).reshape(wanted.size, -1)
            keys = np.linalg.lstsq(system, wanted.ravel(), rcond=None)[0].reshape(width, -1)
        error = np.square(np.einsum("niw,njw->nij", x @ queries.T, y @ keys.T) - wanted).sum()
        best = min(best, (error, queries, keys), key=lambda found: found[0])
    return best[1], best[2]


class Tiny(nn.Module):
    """The product of one head."""

    def __init__(self, rank: int = 4, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(6, 4, bias), nn.Linear(6, 4, bias)
        with torch.no_grad():
            for seed, layer in enumerate((self.q, self.k)):
                layer.weight.copy_(noise(4, rank, seed=seed) @ noise(rank, 6, seed=seed + 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).mT


def inputs(n: int, seed: int) -> Tensor:
    """Samples that differ in what they hold, so that pairs have different second moments."""
    return noise(n, 3, 6, seed=seed) * noise(n, 1, 6, seed=seed + 50).abs()


@pytest.mark.parametrize("bias", [False, True])
def test_the_error_is_that_of_least_squares_in_numpy(bias: bool) -> None:
    model = Tiny(bias=bias).double().eval()
    data = [inputs(64, 1)]
    groups = torchshear.analyze(torchshear.trace(model, data[0]))
    plan = plan_from_kept(groups, {group.name: [0, 2] for group in groups if group.width == 4})
    cut = torchshear.shrink(model, plan)
    small, record = refit(model, cut, plan, data, batches=1, progress=False)
    x = np.concatenate([data[0], np.ones((64, 3, int(bias)))], 2)
    wanted = model(data[0]).detach().numpy()
    fitted, held_out = np.arange(64) % 4 != 3, np.arange(64) % 4 == 3
    queries, keys = numpy_solution(x[fitted], x[fitted], wanted[fitted], 2)

    def error(found: Any, chosen: Any) -> float:
        return float(np.square(found[chosen] - wanted[chosen]).sum())

    def variance(chosen: Any) -> float:
        return float(np.square(wanted[chosen] - wanted[chosen].mean()).sum())

    ours = small(data[0]).detach().numpy()
    theirs = np.einsum("niw,njw->nij", x @ queries.T, x @ keys.T)
    for chosen in (fitted, held_out):
        assert error(theirs, chosen) < 0.1 * error(cut(data[0]).detach().numpy(), chosen)
    assert error(ours, fitted) < 1.5 * error(theirs, fitted)  # of those found on the way the best on others is taken
    assert error(ours, held_out) < 1.05 * error(theirs, held_out)
    assert logits_layer(record).error_after == pytest.approx(error(ours, held_out) / variance(held_out), rel=1e-9)


def test_logits_of_low_rank_are_made_up_for_exactly() -> None:
    model = Tiny(rank=2).double().eval()
    data = [noise(64, 3, 6, seed=1)]
    groups = torchshear.analyze(torchshear.trace(model, data[0]))
    plan = plan_from_kept(groups, {group.name: [0, 1] for group in groups if group.width == 4})
    cut = torchshear.shrink(model, plan)
    small, record = refit(model, cut, plan, data, batches=1, progress=False)
    x = noise(9, 3, 6, seed=2)
    assert float((cut(x) - model(x)).detach().abs().max()) > 0.1
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert logits_layer(record).error_after < 1e-9


def test_both_forms_of_multihead_attention_lose_less() -> None:
    class Own(nn.Module):
        def __init__(self, need_weights: bool) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(6, 16), nn.MultiheadAttention(16, 2, batch_first=True)
            self.need_weights = need_weights

        def forward(self, x: Tensor) -> Any:
            x = self.first(x).relu()
            return self.attention(x, x, x, need_weights=self.need_weights)[0]

    errors = []
    for need_weights in (True, False):
        model = prepared(lambda need=need_weights: Own(need))  # type: ignore[misc]
        _, _, record = halved(model, noise(3, 5, 6), batches(48, 5, 6))
        assert not record.skipped
        errors.append(logits_layer(record).error_after)
        assert errors[-1] < 0.6 * logits_layer(record).error_before
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def turned(q: Tensor) -> Tensor:
    one, two = q.chunk(2, -1)
    return torch.cat([one * 0.6 - two * 0.8, two * 0.6 + one * 0.8], -1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Attention(FORMS["attention"], change=turned), "what it multiplies is changed on the way"),
        (
            lambda: Attention(FORMS["attention"], change=lambda q: functional.normalize(q, dim=-1)),
            "what it multiplies is changed on the way",
        ),
        (
            lambda: Attention(lambda q, k, v: FORMS["attention"](q, k, v + q.square().sum(-1, keepdim=True))),
            "what it multiplies is read elsewhere as well",
        ),
        (lambda: Attention(lambda q, k, v: FORMS["attention"](q, q, v)), "what it multiplies is read elsewhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_to_logits_says_why(model: Callable[[], nn.Module], reason: str) -> None:
    _, _, record = halved(prepared(model), noise(3, 5, 6), batches(16, 5, 6))
    assert [one.reason.split(",")[0][: len(reason)] for one in record.skipped] == [reason]
    assert not [layer for layer in record.layers if layer.kind == "logits"]
    assert "q" in {layer.name for layer in record.layers}


def test_worse_logits_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(heads: Any, width: int) -> Any:
        for name, maps in fit_maps(heads, width):
            yield name, _logits_fit.Maps(maps.queries, -maps.keys)

    fit_maps = _logits_fit.fit_maps
    monkeypatch.setattr(_logits_layers, "fit_maps", spoiled)
    _, _, record = halved(prepared(MODELS["attention"]), noise(3, 5, 6), batches(16, 5, 6))
    layer = logits_layer(record)
    assert layer.method == ""
    assert layer.error_before == layer.error_after > 0.1


def test_the_closed_form_is_where_the_search_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(MODELS["grouped"])
    wanted = logits_layer(halved(model, noise(3, 5, 6), batches(48, 5, 6))[2])
    monkeypatch.setattr(_logits_fit, "N_ALTERNATIONS", 0)
    layer = logits_layer(halved(model, noise(3, 5, 6), batches(48, 5, 6))[2])
    assert layer.method == "closed form"
    assert wanted.error_after < layer.error_after < 0.7 * layer.error_before


def test_the_system_of_one_side_is_solved() -> None:
    """The same as a dense system of Kronecker products gives."""
    factors = [(noise(9, 5, 5, seed=seed), noise(9, 3, 3, seed=seed + 1)) for seed in (0, 2)]
    pairs = [(one @ one.mT, other @ other.mT) for one, other in factors]
    dense = sum(np.kron(a.numpy(), b.numpy()) for outer, inner in pairs for a, b in zip(outer, inner, strict=True))
    right, start = noise(5, 3, seed=7), noise(3, 5, seed=8)
    expected = np.linalg.solve(dense, right.numpy().ravel()).reshape(5, 3).T
    found = _logits_fit._solve(pairs, right, start)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_masked_samples_do_not_count() -> None:
    model = prepared(MODELS["matmul"])
    data = batches(48, 5, 6)
    data[0][:3] = torch.inf  # NaN behind the first layer
    _, _, record = halved(model, noise(3, 5, 6), data)
    assert logits_layer(record).error_after < 0.5 * logits_layer(record).error_before
