"""A plan replays: what it records of the form is made again, checked and proved, and nothing else is looked for."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.networks import Chunked, Net, Residual, analyzed, image, randomise
from tests.plan_files import edit_plan
from torchshear import PruneResult, PruningPlan
from torchshear.errors import PlanError, VerificationError
from torchshear.graph import parameters_on_meta
from torchshear.speedup import OutputFactor, TracedModule, shrink_to_form
from torchshear.speedup import _shrink as _apply
from torchshear.speedup.native._builder import NativeBuilder
from torchshear.speedup.shrinking import _prepared_cut as _job


class Settings:
    """Sizes in one object that all layers share."""

    def __init__(self) -> None:
        self.inner, self.layers = 24, 2


class Layer(nn.Module):
    """Sizes in an integer, a tuple and an object of settings; attention that derives its scale from a size."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings, self.n, self.shape = settings, 3, (3, 8)
        self.qkv, self.out = nn.Linear(12, 72), nn.Linear(24, 12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n, self.shape[1])).transpose(1, 3).unbind(2)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu().reshape(-1, self.settings.inner).reshape(*x.shape[:2], -1))


class Tokens(nn.Module):
    """A small language model."""

    def __init__(self) -> None:
        super().__init__()
        settings = Settings()
        self.embed = nn.Embedding(40, 12)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.layers))
        self.head = nn.Linear(12, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tokens() -> tuple[Tensor]:
    return (torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def pruned() -> PruneResult:
    return torchshear.prune(randomise(Tokens()).eval(), tokens(), ratio=0.5)


def from_file(plan: PruningPlan, folder: Path, edit: Callable[[Any], Any] = lambda _: None) -> PruningPlan:
    plan.save(folder / "plan.json")
    edit_plan(folder / "plan.json", edit)
    return PruningPlan.load(folder / "plan.json")


def attributes(model: nn.Module) -> dict[str, Any]:
    """All numbers that modules keep, also in tuples and settings, and the hooks of each."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name} hooks"] = [repr(hook) for hook in module._forward_hooks.values()]
        for key, value in vars(module).items():
            if isinstance(value, int | tuple | Settings):
                found[f"{name}.{key}"] = vars(value) if isinstance(value, Settings) else value
    return found


def no_search(*_: Any) -> Any:
    pytest.fail("the form was looked for")


def test_a_fresh_model_becomes_what_prune_gave(
    pruned: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {slot.attribute for slot in pruned.plan.form.sizes} >= {"settings", "shape"}
    assert len(pruned.plan.form.factors) == 2
    plan = from_file(pruned.plan, tmp_path)
    monkeypatch.setattr(_job, "native_form", no_search)
    again = shrink_to_form(randomise(Tokens(), 9).train(), plan)
    assert (again.form, again.reason) == (pruned.form, pruned.plan.form.reason)
    assert again.model.training
    assert again.verification.max_error <= 1e-9
    again.model.eval().load_state_dict(pruned.model.state_dict())
    assert attributes(again.model) == attributes(pruned.model)
    assert torch.equal(again.model.layers[0].qkv.output_factor, pruned.model.layers[0].qkv.output_factor)
    assert torch.equal(again.model(*tokens()), pruned.model(*tokens()))


def test_zeros_in_place_of_weights_change_nothing(pruned: PruneResult, tmp_path: Path) -> None:
    fresh = Tokens().eval()
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    small = torchshear.shrink(fresh, from_file(pruned.plan, tmp_path))
    small.load_state_dict(pruned.model.state_dict())
    assert torch.equal(small(*tokens()), pruned.model(*tokens()))


def test_the_same_model_is_not_searched_again(pruned: PruneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_job, "native_form", no_search)
    assert attributes(torchshear.shrink(randomise(Tokens()).eval(), pruned.plan)) == attributes(pruned.model)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f["sizes"].pop(), "does not run on the smaller tensors|gives other results"),
        (lambda f: f["factors"].pop(), "gives other results on the smaller tensors"),
        (lambda f: f["factors"][0].update(factor=0.5), "gives other results on the smaller tensors"),
        (lambda f: f["sizes"][0].update(module="layers.7"), "changes module 'layers.7', which the model has not"),
        (lambda f: f["factors"][0].update(module="gone"), "changes module 'gone', which the model has not"),
        (lambda f: f["sizes"][0].update(attribute="forward"), "'layers.0.forward.*', which holds no integer"),
        (lambda f: f["sizes"][0].update(attribute="training"), "'layers.0.training.*', which holds no integer"),
    ],
)
def test_a_record_that_does_not_fit_is_an_error_and_no_other_form(
    pruned: PruneResult, tmp_path: Path, edit: Callable[[Any], Any], message: str
) -> None:
    plan = from_file(pruned.plan, tmp_path, lambda document: edit(document["form"]))
    with pytest.raises(PlanError, match=message):
        torchshear.shrink(randomise(Tokens(), 9), plan)


def test_another_form_than_the_recorded_one_can_be_asked_for(pruned: PruneResult, tmp_path: Path) -> None:
    plan = from_file(pruned.plan, tmp_path)
    traced = shrink_to_form(randomise(Tokens(), 9), plan, form="traced")
    assert isinstance(traced.model, TracedModule)
    native = shrink_to_form(randomise(Tokens(), 9), plan, form="native")
    assert attributes(native.model.eval()) == attributes(pruned.model)


def test_a_traced_form_is_made_again_without_a_look_at_the_native_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomise(Chunked()).eval()
    result = torchshear.prune(model, (image(),))
    assert result.form == "traced"
    monkeypatch.setattr(_job, "native_form", no_search)
    monkeypatch.setattr(NativeBuilder, "build", no_search)
    again = shrink_to_form(Chunked().eval(), from_file(result.plan, tmp_path))
    assert (again.form, f"traced: {again.reason}") == ("traced", result.report.form)
    again.model.load_state_dict(result.model.state_dict())
    assert torch.equal(again.model(image()), result.model(image()))


def test_on_the_meta_device_the_recorded_form_is_made_without_comparison(pruned: PruneResult, tmp_path: Path) -> None:
    with parameters_on_meta():
        empty = Tokens().eval()
    shrunk = shrink_to_form(empty, from_file(pruned.plan, tmp_path))
    assert shrunk.form == "native"
    assert "not compared again on the meta device" in shrunk.reason
    assert shrunk.verification is None
    shrunk.model.load_state_dict(pruned.model.state_dict(), assign=True)
    assert attributes(shrunk.model) == attributes(pruned.model)
    assert torch.equal(shrunk.model(*tokens()), pruned.model(*tokens()))


def pair() -> Net:
    """One part with sizes in attributes and factors, and one that cannot be native."""

    def run(m: Net, x: Tensor, y: Tensor) -> Tensor:
        left, right = m.layer(x).mean((1, 2)), m.chunked(y).sum((1, 2, 3))
        return left + right if right.sum() > 0 else left - right

    return Net(run, layer=Layer(Settings()), chunked=Chunked())


@pytest.mark.parametrize("names", [["layer"], ["layer", "chunked"]])
def test_parts_replay_each_in_its_form(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = (torch.randn(2, 5, 12), image())
    result = torchshear.prune(randomise(pair()).eval(), inputs, submodules=names)
    monkeypatch.setattr(_job, "native_form", no_search)
    again = shrink_to_form(randomise(pair(), 9).eval(), from_file(result.plan, tmp_path))
    kinds = {"layer": "native", "chunked": "traced"}
    assert dict(again.parts) == {name: kinds[name] for name in names}
    assert f"{again.form}: {again.reason}" == result.report.form
    assert any(isinstance(hook, OutputFactor) for hook in again.model.layer.qkv._forward_hooks.values())
    again.model.load_state_dict(result.model.state_dict())
    assert attributes(again.model.layer) == attributes(result.model.layer)
    assert torch.equal(again.model(*inputs), result.model(*inputs))


def test_shrink_proves_what_it_gives_unless_told_not_to(pruned: PruneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Residual()).eval()
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (image(),))), ratio=0.5)
    assert shrink_to_form(model, plan, verify=False).verification is None

    def refuse(*_: Any, **__: Any) -> Any:
        raise VerificationError("not equal")

    monkeypatch.setattr(_apply, "verify_analyzed", refuse)
    with pytest.raises(VerificationError, match="not equal"):
        torchshear.shrink(model, plan)
    with pytest.raises(VerificationError, match="not equal"):  # nor does a recorded form give way to another
        torchshear.shrink(randomise(Tokens(), 9), pruned.plan)
    assert sum(p.numel() for p in torchshear.shrink(model, plan, verify=False).parameters()) < sum(
        p.numel() for p in model.parameters()
    )


def test_what_is_proved_and_on_what(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    prove = _apply.verify_analyzed

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return prove(*args, **kwargs)

    monkeypatch.setattr(_apply, "verify_analyzed", look)
    model, given = randomise(Residual()).eval(), (image(3),)
    result = torchshear.prune(model, (image(),))
    assert [args[1] for args in seen] == [result.model], "once"
    plan = torchshear.plan(analyzed(model, image()), ratio=0.5)
    torchshear.shrink(model, plan, given)
    torchshear.shrink(model, plan)
    assert plan.form is None, "it is not changed"
    assert seen[1][4].args[0] is given[0]
    assert seen[2][4] is None, "inputs of the plan"


def test_a_model_without_values_is_pruned_without_a_proof() -> None:
    with torch.device("meta"):
        model = copy.deepcopy(Residual())
    result = torchshear.prune(model, (torch.empty(2, 3, 8, 8, device="meta"),), criterion="random")
    assert result.verification is None
    assert result.form == "traced"
