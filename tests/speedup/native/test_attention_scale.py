"""Attention that derives its scale from a size that shrinks comes back native, with the scale that it had."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

import torchshear
from tests.networks import LooksAtValues, Net
from torchshear.graph._location import module_outputs
from torchshear.pruners import plan_from_kept
from torchshear.speedup import OutputFactor, TracedModule, shrink_to_form
from torchshear.speedup.native._attention_scale import OutputSlice, multiply_outputs
from torchshear.speedup.native._builder import NativeBuilder

WIDTH, HEADS = 24, 3


class Attention(nn.Module):
    """Projections of their own for queries, keys and values; what is called without a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.inner = HEADS, WIDTH // HEADS
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*x.shape[:2], self.heads, self.inner)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(*self.parts(x)).transpose(1, 2).flatten(2))


class ByAttribute(Attention):
    """One attribute is both a shape and a scale."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) / math.sqrt(self.inner)).softmax(-1) @ v


class ByTensor(Attention):
    """The scale follows the tensor that comes."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.einsum("bhid,bhjd->bhij", q * q.size(-1) ** -0.5, k)).softmax(-1) @ v


class Positioned(Attention):
    """Queries are used beside the product as well, by a table that is zero at first: only keys may be multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(5, WIDTH // HEADS))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=q @ self.table.T)


class PositionedByTensor(Positioned):
    """The same with a scale that the code derives."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + q @ self.table.T).softmax(-1) @ v


class Core(nn.Module):
    """The product in a module of its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)


class Handed(Attention):
    """Queries are handed to another module, which must not take the factor on them for a fault."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core()

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.core(q, k, v)


class Biased(Attention):
    """Queries get a bias, zero at first, that no output of a module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH // HEADS))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q + self.bias, k, v)


class Fused(Attention):
    """One projection, the rows of which are parts of heads."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.inner).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class HeadsFirst(Fused):
    """One projection, the rows of which are heads of parts."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], self.heads, 3, self.inner).transpose(1, 2).unbind(3)
        return q, k, v


class Rotated(Fused):
    """Queries and keys are turned by a table that a module hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Embedding(5, WIDTH // HEADS // 2)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        angle = self.angles(torch.arange(x.shape[1])).repeat(1, 2)
        q, k = (t * angle.cos() + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * angle.sin() for t in (q, k))
        return q, k, v


class Normed(Fused):
    """A norm between the projection and the product, with which a factor before it would be lost."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().parts(x)
        return self.q_norm(q), self.k_norm(k), v


def _residual_blocks(m: Net, x: Tensor) -> Tensor:
    x = m.first(x)
    for block in m.blocks:
        x = x + block(x)
    return m.last(x)


def made(kind: Callable[[], nn.Module], depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.ModuleList(kind() for _ in range(depth))
    return Net(_residual_blocks, first=nn.Linear(7, WIDTH), blocks=blocks, last=nn.Linear(WIDTH, 3)).eval()


X = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))


@cache
def pruned(kind: type[nn.Module], ratio: float = 0.5) -> Any:
    """Of a network with blocks of a kind; not to be changed."""
    return torchshear.prune(made(kind), (X,), ratio=ratio)


def factor_hooks(model: nn.Module) -> dict[str, OutputFactor]:
    return {
        name: hook
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, OutputFactor)
    }


@pytest.mark.parametrize(
    ("kind", "child"),
    [
        (Attention, "q"),
        (ByAttribute, "q"),
        (ByTensor, "q"),
        (Positioned, "k"),
        (PositionedByTensor, "k"),
        (Biased, "k"),
        (Fused, "qkv"),
        (HeadsFirst, "qkv"),
        (Rotated, "qkv"),
        (Normed, "q_norm"),
    ],
)
def test_the_scale_is_kept_by_a_factor_on_what_queries_or_keys_come_from(kind: type[nn.Module], child: str) -> None:
    model, result = made(kind), pruned(kind)
    assert result.form == "native", result.report.form
    assert f"scale of attention kept by a factor on the output of blocks.{child} (2)" in result.report.form
    assert result.verification.max_error < 1e-12
    assert set(factor_hooks(result.model)) == {f"blocks.{i}.{child}" for i in range(2)}
    assert [hook.factor for hook in factor_hooks(result.model).values()] == pytest.approx([0.5**0.5] * 2)
    assert result.model.state_dict().keys() == model.state_dict().keys()
    traced = shrink_to_form(model, result.plan, form="traced").model
    torch.testing.assert_close(result.model(X), traced(X))
    assert not factor_hooks(model)


@pytest.mark.parametrize(("kind", "expected"), [(Fused, [1] * 8 + [0] * 16), (HeadsFirst, [1, 1, 1, 1] + [0] * 8)])
def test_of_a_fused_projection_only_queries_are_multiplied(kind: type[nn.Module], expected: list[float]) -> None:
    qkv = pruned(kind).model.blocks[0].qkv
    assert qkv.output_factor.tolist() == (expected * 2)[: len(qkv.output_factor)]


class Shared(Attention):
    """Queries and keys come from one projection: a factor would count twice."""

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, _, v = super().parts(x)
        return q, q, v


class Inline(nn.Module):
    """Projections that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = WIDTH // HEADS
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 5)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.view(*x.shape[:2], -1, self.inner).transpose(1, 2) for t in functional.linear(x, self.weight).chunk(3, -1)
        )
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [Shared, Inline])
def test_where_no_output_may_be_multiplied_the_traced_form_comes(kind: type[nn.Module]) -> None:
    result = pruned(kind)
    assert result.form == "traced"
    assert "'scale' is not given" in result.report.form
    assert result.verification.max_error < 1e-12


def test_values_with_the_factor_are_known_in_all_layers() -> None:
    assert torchshear.prune(made(Handed, depth=6), (X,), ratio=0.5).form == "native"


def test_heads_alone_need_no_factor() -> None:
    model = made(Fused)
    groups = torchshear.analyze(torchshear.trace(model, (X,)))
    heads = {group.name: [0, 2] for group in groups if group.width == HEADS}
    assert heads
    small = shrink_to_form(model, plan_from_kept(groups, heads), form="native").model
    assert not factor_hooks(small)


@pytest.mark.parametrize("kind", [Attention, Fused, HeadsFirst, ByAttribute])
def test_a_model_that_was_shrunk_can_be_shrunk_again(kind: type[nn.Module]) -> None:
    first = pruned(kind, 0.25)
    second = torchshear.prune(first.model, (X,), ratio=0.5)
    assert (first.form, second.form) == ("native", "native")
    assert second.verification.max_error < 1e-12
    hooks, before = factor_hooks(second.model), factor_hooks(first.model)
    assert len(hooks) == 2
    inner = second.model.blocks[0].inner
    assert [hook.factor for hook in hooks.values()] == pytest.approx([(inner / 8) ** 0.5] * 2)
    assert [hook.factor for hook in before.values()] == pytest.approx([(first.model.blocks[0].inner / 8) ** 0.5] * 2)


@pytest.mark.parametrize("kind", [Attention, Fused])
def test_copies_files_and_compilers_keep_the_factor(kind: type[nn.Module], tmp_path: Path) -> None:
    result = pruned(kind)
    expected = result.model(X)
    file = io.BytesIO()
    torch.save(result.model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(result.model),
        pickle.loads(pickle.dumps(result.model)),
        torch.load(file, weights_only=False),
    ):
        assert len(factor_hooks(twin)) == 2
        assert torch.equal(twin(X), expected)
    torch.testing.assert_close(torch.compile(result.model, backend="eager")(X), expected)
    exported = torch.export.export(result.model, (X,)).module()
    torch.testing.assert_close(exported(X), expected)
    assert torchshear.export_onnx(result.model, tmp_path / "small.onnx", (X,)).dynamic_batch


def test_a_hook_from_a_file_is_not_overwritten_by_hooks_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    small = pruned(Fused).model
    file = pickle.dumps(small)
    (key,) = small.blocks[0].qkv._forward_hooks
    monkeypatch.setattr(RemovableHandle, "next_id", key)
    model = pickle.loads(file)
    model.blocks[0].qkv.register_forward_hook(lambda *_: None)
    assert len(factor_hooks(model)) == 2


@pytest.mark.parametrize("kind", [Attention, Fused])
def test_the_dtype_that_the_model_gets_later_is_followed(kind: type[nn.Module]) -> None:
    small = copy.deepcopy(pruned(kind).model)
    with torch.autocast("cpu", torch.bfloat16):
        for name in factor_hooks(small):
            assert small.get_submodule(name)(torch.ones(1, small.first.out_features)).dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float64):
        assert small.to(dtype)(X.to(dtype)).dtype == dtype


def test_a_model_in_bfloat16_is_proved_in_float64() -> None:
    """Also where it does not run at first, and says so with numbers that differ from batch to batch."""
    model = made(Fused).to(torch.bfloat16)
    result = torchshear.prune(model, (X.to(torch.bfloat16),), ratio=0.5)
    assert (result.form, result.verification.dtype) == ("native", torch.float64)
    assert result.verification.max_error < 1e-12


def test_the_factor_trains_along() -> None:
    small = copy.deepcopy(pruned(HeadsFirst).model).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = (small(X) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in small.parameters())


def test_a_fresh_model_gets_the_same_factors_from_the_plan() -> None:
    result = pruned(Fused)
    fresh = torchshear.shrink(made(Fused), result.plan)
    assert not isinstance(fresh, TracedModule)
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(fresh(X), result.model(X))


def test_as_many_runs_for_many_layers_as_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    plain = NativeBuilder.run_rewritten

    def count(*args: Any) -> Any:
        runs[-1] += 1
        return plain(*args)

    monkeypatch.setattr(NativeBuilder, "run_rewritten", count)
    for depth in (1, 6):
        runs.append(0)
        assert torchshear.prune(made(ByAttribute, depth), (X,), ratio=0.5).form == "native"
    assert runs[0] == runs[1] > 0


def test_factors_for_a_while_leave_nothing_behind() -> None:
    model = made(Fused)
    part = OutputSlice("blocks.0.qkv", -1, 72, (0, 1))
    with multiply_outputs(model, {part: 0.5}), multiply_outputs(model, {part: 0.5}):
        assert [hook.factor for hook in factor_hooks(model).values()] == [0.25]
        assert "OutputFactor(0.25" in repr(factor_hooks(model)["blocks.0.qkv"])
    assert not factor_hooks(model)
    assert not hasattr(model.blocks[0].qkv, "output_factor")


def test_outputs_of_modules_are_found_call_by_call() -> None:
    two = Net(lambda m, x: (x + 1, x + 2))
    twice = Net(lambda m, x: sum(m.two(m.inner(m.inner(x)))), inner=nn.Sequential(nn.Linear(4, 4)), two=two)
    outputs = module_outputs(torchshear.trace(twice, (torch.randn(2, 4),)))
    assert list(outputs.values()) == ["inner", "inner"]


def test_different_positions_of_one_output_get_a_hook_each() -> None:
    model = made(Fused)
    before = model.blocks[0].qkv(torch.ones(WIDTH))
    one, two = OutputSlice("blocks.0.qkv", -1, 72, (0, 1)), OutputSlice("blocks.0.qkv", -1, 72, (1, 2))
    assert one.meets(two)
    with multiply_outputs(model, {one: 0.5, two: 0.25}):
        after = model.blocks[0].qkv(torch.ones(WIDTH))
    torch.testing.assert_close(after / before, torch.tensor([0.5, 0.125, 0.25] + [1.0] * 69))


def test_parts_of_a_model_keep_their_scale_too() -> None:
    result = torchshear.prune(LooksAtValues(made(Fused)).eval(), (X,), ratio=0.5, submodules=["part"])
    assert result.form == "native", result.report.form
    assert set(factor_hooks(result.model)) == {"part.blocks.0.qkv", "part.blocks.1.qkv"}
