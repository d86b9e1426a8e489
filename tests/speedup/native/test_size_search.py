"""Sizes that modules keep in attributes are found, whatever they are called; nothing else of a model is changed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Net
from torchshear.speedup import shrink_to_form
from torchshear.speedup.native import _size_search
from torchshear.speedup.native._divergence import find_divergence


@dataclass
class Settings:
    """What a family of models keeps in one object that all modules share."""

    width: int = 24
    n_heads: int = 4
    n_layers: int = 4  # the same number by coincidence


class Attention(nn.Module):
    """Names of sizes are such as no list of names has."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.banana = count
        self.cherry = width // count
        self.factor = self.cherry**-0.5
        self.number = 4  # the same number as that of heads, by coincidence; read, and no size
        self.all = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.all(x).view(batch, length, 3, self.banana, self.cherry).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * self.factor).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, self.banana * self.cherry)
        return self.out(mixed) * (self.number / 4)


class Configured(nn.Module):
    """Reads sizes from the shared object."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.qkv = nn.Linear(settings.width, 3 * settings.width)
        self.out = nn.Linear(settings.width, settings.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.settings.n_heads
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.view(batch, length, heads, -1).transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, scale=0.4)
        return self.out(y.transpose(1, 2).flatten(2))


def sliced() -> Net:
    """A tuple of sizes, and one that the parent hands to the child."""

    def run(m: Net, x: Tensor) -> Tensor:
        a, b = m.up(x).split(m.sizes, -1)
        return m.down(torch.cat([m.left(a).relu(), b], -1))

    return Net(run, sizes=(10, 6), up=nn.Linear(24, 16), down=nn.Linear(16, 24), left=nn.Linear(10, 10))


class Sequence(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(7, 24)
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def pruned(model: nn.Module, x: Tensor) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return torchshear.prune(model.eval(), (x,), ratio=0.5)


X = torch.randn(2, 5, 7)


def test_sizes_are_found_whatever_their_names() -> None:
    result = pruned(Sequence(Attention(24, 4), Attention(24, 4)), X)
    assert result.form == "native"
    for block in result.model.blocks:
        assert (block.banana, block.cherry) == (2, 3)
        assert block.number == 4
        assert block.factor == 6**-0.5
    assert "banana (2)" in result.report.form
    assert result.verification.max_error < 1e-12
    assert result.model(torch.randn(3, 9, 7)).shape == (3, 9, 3)


def faint() -> Net:
    """Attention that is all but even: heads of a wrong size change little of what it gives."""

    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (t.view(*x.shape[:2], -1, m.cherry).transpose(1, 2) for t in m.all(x).chunk(3, -1))
        return m.out(functional.scaled_dot_product_attention(q, k, v, scale=1e-8).transpose(1, 2).flatten(2))

    return Net(run, cherry=6, all=nn.Linear(24, 72), out=nn.Linear(24, 24))


def test_sizes_are_found_where_wrong_ones_change_little() -> None:
    result = pruned(Sequence(faint(), faint()), X)
    assert result.form == "native"
    assert [block.cherry for block in result.model.blocks] == [3, 3]


class Dead(Attention):
    """Ends in a layer that is all zeros, as some are before training: whatever is wrong before it does not show."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(width, count)
        self.gain = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, -1, self.cherry).transpose(1, 2) for t in self.all(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) * self.factor).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)) * self.gain


def test_what_the_weights_hide_is_found_with_other_weights() -> None:
    model = Sequence(Dead(24, 4)).eval()
    model.blocks[0].all.weight.data.zero_()  # so that no module inside gives anything that tells sizes apart
    model.blocks[0].all.bias.data.zero_()
    small = torchshear.shrink(model, torchshear.plan(torchshear.analyze(torchshear.trace(model, (X,))), ratio=0.5))
    assert small.blocks[0].cherry == 3
    assert small.blocks[0].gain.eq(0).all()
    assert small.blocks[0].all.weight.eq(0).all()


class Remembering(Attention):
    """Computes something from its weights once, and keeps it."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(width, count)
        self.gain = nn.Parameter(torch.ones(width))
        self.known: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x) * self.gain.exp()
        if "gain" not in self.known:
            self.known["gain"] = self.gain.exp()
        return super().forward(x) * self.known["gain"]


def test_what_a_model_keeps_of_its_weights_is_made_again_for_other_weights() -> None:
    result = pruned(Sequence(Remembering(24, 4)), X)
    assert result.form == "native", result.report.form
    assert not result.model.blocks[0].known


class Narrow(Attention):
    """Code of the model's own that does not run in float64, though the graph does."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("expected float32")
        return super().forward(x)


def test_sizes_are_found_in_a_model_that_refuses_float64_after_the_first_of_them() -> None:
    result = pruned(Sequence(sliced(), Narrow(24, 4)), X)
    assert result.form == "native"
    assert result.model.blocks[0].sizes == (5, 3)
    assert (result.model.blocks[1].banana, result.model.blocks[1].cherry) == (2, 3)
    assert result.verification.dtype == torch.float32


def test_what_one_module_needs_is_tried_at_once_for_all_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def count(*args: Any) -> Any:
        runs[-1] += 1
        return find_divergence(*args)

    monkeypatch.setattr(_size_search, "find_divergence", count)
    for depth in (2, 8):
        runs.append(0)
        assert pruned(Sequence(*(Attention(24, 4) for _ in range(depth))), X).form == "native"
    assert runs[0] == runs[1]


def test_what_was_right_before_is_not_looked_at_in_every_try(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = tried(monkeypatch, Sequence(*(nn.Linear(24, 24) for _ in range(4)), Attention(24, 4)))
    assert sum(trusted > 8 for trusted, _ in tries) > 2  # tries at the last module, behind four that are right


def tried(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[tuple[int, str | None]]:
    """For each run of a search, the number of values that were trusted, and the module that was called alone."""
    tries: list[tuple[int, str | None]] = []

    def note(model: nn.Module, trial: Any, skipped: Any, trusted: int, inside: Any) -> Any:
        tries.append((trusted, None if inside is None else inside.module))
        return find_divergence(model, trial, skipped, trusted, inside)

    monkeypatch.setattr(_size_search, "find_divergence", note)
    assert pruned(model, X).form == "native"
    return tries


def test_sizes_are_tried_in_calls_of_the_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = tried(monkeypatch, Sequence(*(nn.Linear(24, 24) for _ in range(4)), *(Attention(24, 4) for _ in range(3))))
    assert {module for trusted, module in tries if trusted} == {"blocks.4"}
    assert sum(module is None for _, module in tries) <= 5  # once at first, with what helped, and once each other trial


class Late(Attention):
    """One class in two stages: what counts the heads in the later one is something else in the earlier one."""

    def __init__(self, is_late: bool) -> None:
        super().__init__(24, 4)
        self.is_late = is_late

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads, scale = (self.number, 1.0) if self.is_late else (self.banana, self.number / 4)
        q, k, v = self.all(x).view(batch, length, 3, heads, self.cherry).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-1, -2) * self.factor).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(mixed) * scale


def test_what_one_stage_needs_does_not_undo_what_another_has(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [[Late(stage == 1) for stage in (0, 1) for _ in range(depth)] for depth in (2, 5)]
    tries = [tried(monkeypatch, Sequence(*blocks)) for blocks in stages]
    whole = [sum(module is None for _, module in some) for some in tries]
    assert whole[0] == whole[1]


class Writing(Attention):
    """What it is given is no longer there for a second call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


def test_sizes_are_tried_in_the_whole_model_where_a_call_cannot_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = tried(monkeypatch, Sequence(nn.Linear(24, 24), Writing(24, 4)))
    assert {module for trusted, module in tries if trusted} == {None}


def test_a_shared_object_of_settings_is_copied_before_it_is_changed() -> None:
    settings = Settings()
    model = Sequence(Configured(settings), Configured(settings))
    before = copy.deepcopy(settings)
    result = pruned(model, X)
    assert result.form == "native"
    assert settings == before
    assert [block.settings.n_heads for block in result.model.blocks] == [2, 2]
    assert [block.settings.n_layers for block in result.model.blocks] == [4, 4]
    assert result.model.blocks[0].settings is not result.model.blocks[1].settings


def folded() -> Net:
    """The number of heads stands nowhere but beside the batch."""

    def run(m: Net, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = m.all(x.mT).reshape(batch * m.heads, 3 * m.width, length).split(m.width, 1)
        y = (q.mT @ k * 0.4).softmax(-1) @ v.mT
        return m.out(y.mT.reshape(batch, -1, length)).mT

    return Net(run, heads=4, width=6, all=nn.Conv1d(24, 72, 1), out=nn.Conv1d(24, 24, 1))


def test_a_size_that_stands_nowhere_but_beside_the_batch_is_found() -> None:
    result = pruned(Sequence(folded()), X)
    assert result.form == "native"
    assert (result.model.blocks[0].heads, result.model.blocks[0].width) == (2, 3)


def borrowing(attention: nn.Module, position: nn.Module) -> Net:
    """Calls modules that the model holds under a name of its own."""
    return Net(lambda m, x: m.attention(x) + m.position(x.mT).mT, attention=attention, position=position)


def test_modules_with_several_names_are_mended_under_any_of_them() -> None:
    lent = {"attention": Attention(24, 4), "position": nn.Conv1d(24, 24, 3, padding=1, groups=24)}
    result = pruned(Net(lambda m, x: m.body(x), **lent, body=Sequence(*(borrowing(**lent) for _ in range(2)))), X)
    assert result.form == "native"
    assert (result.model.attention.banana, result.model.position.groups) == (2, 12)
    assert result.model.attention is result.model.body.blocks[1].attention


class Computed(Attention):
    """Its scale follows the size that it finds: no attribute can make it right."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, 4, -1).transpose(1, 2) for t in self.all(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_where_no_attribute_helps_the_reason_names_module_and_line() -> None:
    result = pruned(Sequence(Computed(24, 4)), X)
    assert result.form == "traced"
    assert "module 'blocks.0'" in result.report.form
    assert "test_size_search.py:" in result.report.form
    assert result.verification.max_error < 1e-12


def branching() -> Net:
    """Has one way for running and another for being exported, and keeps a size for each."""

    def run(m: Net, x: Tensor) -> Tensor:
        size = m.exported if torch.compiler.is_exporting() else m.running
        a, b = m.up(x).split(size, -1)
        return m.down(torch.cat([a, b], -1))

    return Net(run, running=12, exported=12, up=nn.Linear(24, 24), down=nn.Linear(24, 24))


def test_the_branch_that_export_takes_is_right_as_well(tmp_path: Any) -> None:
    result = pruned(Sequence(branching()), X)
    assert result.form == "native"
    assert (result.model.blocks[0].running, result.model.blocks[0].exported) == (6, 6)
    assert torchshear.export_onnx(result.model, tmp_path / "small.onnx", (X,)).dynamic_batch


def test_attributes_and_classes_of_the_original_are_as_before() -> None:
    model = Sequence(Attention(24, 4), Configured(Settings()))
    before = {name: (type(m), copy.copy(vars(m)).keys()) for name, m in model.named_modules()}
    pruned(model, X)
    assert {name: (type(m), vars(m).keys()) for name, m in model.named_modules()} == before
    assert (model.blocks[0].banana, model.blocks[1].settings.n_heads) == (4, 4)


class Registered:
    """Notes the classes that are made of it, as plug-in systems do."""

    classes: ClassVar[list[type]] = []

    def __init_subclass__(cls) -> None:
        Registered.classes.append(cls)


class Kind(Enum):
    """What a module may hold beside its sizes."""

    PLAIN = 1


def test_watching_makes_no_classes_and_changes_none() -> None:
    class Shared(Registered):
        def __init__(self) -> None:
            self.width, self.n_heads = 24, 4

    model = Sequence(Configured(Shared()), Configured(Shared()))  # type: ignore[arg-type]
    for block in model.blocks:
        block.kind, block.numbers = Kind.PLAIN, torch.arange(4)
    assert pruned(model, X).form == "native"
    assert Registered.classes == [Shared]
    assert not any("__getattribute__" in vars(cls) for cls in (Shared, Configured, nn.Linear, Sequence))


@pytest.mark.parametrize(
    "cast", [lambda x: x.to(torch.float32).to(x.dtype), lambda x: x / torch.sqrt(torch.tensor(3, dtype=torch.float32))]
)
def test_casts_and_numbers_made_inside_do_not_blunt_the_proof(cast: Callable[[Tensor], Tensor]) -> None:
    class Casting(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(cast(x))

    result = pruned(Sequence(Casting(24, 4)), X)
    assert result.form == "native", result.report.form
    assert result.verification.dtype == torch.float64
    assert result.verification.max_error < 1e-12


def refusing() -> Net:
    """Refuses float64, and keeps a size."""

    def run(m: Net, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("expected Float, got Double")
        one, two = m.up(x).split(m.size, -1)
        return m.down(one * two)

    return Net(run, size=24, up=nn.Linear(24, 48), down=nn.Linear(24, 24))


def test_a_module_that_refuses_float64_is_mended_though_it_comes_after_one_that_is_wrong() -> None:
    result = pruned(Sequence(Attention(24, 4), refusing()), X)
    assert result.form == "native", result.report.form
    assert (result.model.blocks[0].cherry, result.model.blocks[1].size) == (3, 12)


def test_the_traced_form_has_a_free_batch_in_onnx_whatever_that_of_the_example(tmp_path: Any) -> None:
    model = Sequence(Attention(24, 4)).eval()
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (X,))), ratio=0.5)
    small = shrink_to_form(model, plan, form="traced").model
    assert len(X) > 1
    assert torchshear.export_onnx(small, tmp_path / "small.onnx", (X,)).dynamic_batch


@pytest.mark.parametrize("form", ["native", "traced"])
def test_both_forms_agree_on_other_lengths_or_refuse_them(form: Any) -> None:
    model = Sequence(Attention(24, 4)).eval()
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (X,))), ratio=0.5)
    small = shrink_to_form(model, plan, form=form).model
    if form == "native":
        assert small(torch.randn(1, 3, 7)).shape == (1, 3, 3)
    else:
        with pytest.raises(torchshear.errors.ArgumentError, match="captured for"):
            small(torch.randn(1, 3, 7))
