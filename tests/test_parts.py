"""Parts of models that cannot be captured whole: pruned in place, proved, replayed, and refused with a reason."""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Chunked, Net, Residual, image, randomise
from tests.oracle import assert_equals_masked, fingerprint
from tests.plan_files import edit_plan
from torchshear import PruningPlan
from torchshear.errors import ArgumentError, CaptureError, PlanError, TorchshearError, VerificationError
from torchshear.pruners import plan_from_kept
from torchshear.speedup import TracedModule, shrink_to_form


class Trunk(nn.Module):
    """Three maps of 6 channels, each half as large as the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.one, self.two = nn.Conv2d(10, 12, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1)
        self.out = nn.Conv2d(10, 6, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        maps = {}
        for level in range(3):
            x = x + self.two(torch.relu(self.one(x)))
            maps[str(level)] = self.out(x)
            x = nn.functional.avg_pool2d(x, 2)
        return maps


def head() -> Net:
    """Two scores a position. On maps of at least 8 pixels it mirrors its hidden channels, which ties them in pairs."""

    def run(m: Net, x: Tensor, scale: float = 1.0) -> Tensor:
        h = torch.relu(m.hidden(x))
        if x.shape[-1] >= 8:
            h = h + h.flip(1)
        return scale * m.score(h)

    return Net(run, hidden=nn.Conv2d(6, 8, 3, padding=1), score=nn.Conv2d(8, 2, 1))


class Detector(nn.Module):
    """Keeps the positions with high scores of each image, if there are any: only its parts can be captured."""

    def __init__(self, between: Callable[["Detector", Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.trunk, self.head, self.between = Trunk(), head(), between

    def forward(self, images: list[Tensor], targets: Tensor | None = None) -> Any:
        maps = self.trunk(torch.stack(images))
        if self.between is not None:
            maps = {name: self.between(self, x) for name, x in maps.items()}
        scores = torch.cat([self.head(x, scale=0.5).flatten(2) for x in maps.values()], 2).transpose(1, 2)
        if targets is not None:
            return {"loss": (scores.mean(1) - targets).square().mean()}
        kept = [one[one[:, 0] > one[:, 1]] for one in scores]
        return [one if len(one) else scores[0, :1] for one in kept]


PARTS = ["trunk", "head"]


def detector(between: Callable[[Detector, Tensor], Tensor] | None = None) -> Detector:
    return randomise(Detector(between)).eval()


def images(n: int = 2, seed: int = 5) -> tuple[list[Tensor]]:
    return (list(torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))),)


def same(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def result() -> torchshear.PruneResult:
    return torchshear.prune(detector(), images(), submodules=PARTS)


def test_parts_are_pruned_inside_the_model(result: torchshear.PruneResult) -> None:
    assert type(result.model) is Detector
    assert result.form == "native"
    assert result.verification.max_error < 1e-12
    assert [(group.name, group.width) for group in result.plan.groups] == [
        ("trunk.stem.weight[0]", 10),
        ("trunk.one.weight[0]", 12),
        ("head.hidden.weight[0]", 4),
    ]
    assert result.model.trunk.one.weight.shape == (6, 5, 3, 3)
    assert result.model.head.hidden.out_channels == 4
    # An oracle of the tests' own: the whole detector with the cut weights zeroed, in float64, on these and new images.
    assert_equals_masked(detector(), result.model, result.plan, images())
    assert [one.shape[1] for one in result.model(images(3)[0])] == [2, 2, 2]


def test_the_small_model_trains(result: torchshear.PruneResult) -> None:
    small = copy.deepcopy(result.model).train()
    loss = small(images()[0], torch.ones(2, 2))["loss"]
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in small.parameters())


@pytest.mark.parametrize(("part", "shape"), [("trunk", (2, 3, 16, 16)), ("head", (2, 6, 8, 8))])
def test_parts_export_to_onnx(
    result: torchshear.PruneResult, part: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    small = result.model.get_submodule(part)
    assert torchshear.export_onnx(small, tmp_path / "part.onnx", (torch.randn(shape),)).dynamic_batch


def test_the_report_lists_the_parts(result: torchshear.PruneResult) -> None:
    trunk, head = result.report.parts
    assert (trunk.name, trunk.n_calls, trunk.form) == ("trunk", 1, "native")
    assert (head.name, head.n_calls, head.form) == ("head", 3, "native")
    assert head.after.n_params == sum(p.numel() for p in result.model.head.parameters())
    assert trunk.before.macs + head.before.macs == result.report.before.macs
    assert head.before.macs == (8 * 6 * 9 + 2 * 8) * (16 * 16 + 8 * 8 + 4 * 4)
    assert trunk.after.n_params + head.after.n_params == result.report.after.n_params
    assert "part        head: parameters 458 -> 230" in str(result.report)
    assert result.report.refused["trunk.out.weight[0]"] == "output of part 'trunk'"
    assert result.report.refused["trunk.stem.weight[1]"] == "input of part 'trunk', dimension 1"


def test_every_call_counts() -> None:
    """Only the calls on larger maps tie channels in pairs; a plan made of the small ones alone would be wrong."""
    model = detector()
    groups = torchshear.analyze(torchshear.trace(model, images(), submodules=["head"]))
    assert [group.width for group in groups] == [4]
    assert groups.graph.parts.calls == ("head", "head", "head")
    small_maps = torchshear.analyze(torchshear.trace(model.head, (torch.randn(2, 6, 4, 4),)))
    assert [group.width for group in small_maps] == [8]
    plan = plan_from_kept(small_maps, {"hidden.weight[0]": [0, 1, 2, 3]})
    head = torchshear.shrink(model.head, plan)
    with pytest.raises(VerificationError, match="the shrunk model differs|rule of that operator"):
        torchshear.verify(model.head, head, plan, (torch.randn(2, 6, 8, 8),))


def test_a_signature_is_captured_once() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        first = m.part(x)
        return m.part(2 * x) if first.sum() > 0 else m.part(x - 1)

    graph = torchshear.trace(randomise(Net(run, part=Residual())).eval(), (image(),), submodules=["part"])
    assert graph.parts.calls == ("part",)
    assert graph.batch_hint is not None


def test_the_batch_is_free_only_where_all_calls_share_it() -> None:
    assert torchshear.trace(detector(), images(), submodules=["trunk"]).batch_hint is not None

    def run(m: Net, x: Tensor) -> Tensor:
        maps = m.trunk(x)
        return m.head(maps["0"].repeat_interleave(3, 0)).nonzero()

    result = torchshear.prune(randomise(Net(run, trunk=Trunk(), head=head())).eval(), (image(2, 16),), submodules=PARTS)
    assert result.plan.analysis.graph.batch_hint is None
    assert result.model(image(5, 16)).shape[1] == 4


def test_the_meta_device_plans_for_parts(result: torchshear.PruneResult) -> None:
    """The run on the meta device stops at the first size that depends on data; the parts were called by then."""
    with torch.device("meta"):
        model = Detector().eval()
        groups = torchshear.analyze(torchshear.trace(model, (list(torch.randn(2, 3, 16, 16)),), submodules=PARTS))
    kept = {group.name: list(range(group.width // 2)) for group in groups}
    real = detector()
    small = torchshear.shrink(real, plan_from_kept(groups, kept))
    assert_equals_masked(real, small, plan_from_kept(result.plan.analysis, kept), images())
    assert model.trunk.stem.weight.is_meta


def tied_parts() -> nn.Module:
    """An encoder whose embedding is also the output layer, which lies outside."""

    def run(m: Net, tokens: Tensor) -> Tensor:
        while tokens.shape[1] < 6:
            tokens = torch.cat([tokens, m.lm_head(m.encoder(tokens))[:, -1:].argmax(-1)], 1)
            if (tokens[:, -1] == 0).all():
                break
        return tokens

    encoder = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    model = Net(run, encoder=encoder, lm_head=nn.Linear(8, 11, bias=False))
    model.lm_head.weight = model.encoder[0].weight
    return model


def test_a_tensor_that_the_rest_of_the_model_holds_is_fixed() -> None:
    model = randomise(tied_parts()).eval()
    result = torchshear.prune(model, (torch.tensor([[3, 4, 5]]),), submodules=["encoder"])
    assert [group.name for group in result.plan.groups] == ["encoder.1.weight[0]"]
    reason = "also held outside the parts, as 'lm_head.weight'"
    assert result.report.refused["encoder.0.weight[1]"] == reason
    assert result.model.lm_head.weight is result.model.encoder[0].weight
    assert_equals_masked(model, result.model, result.plan, (torch.tensor([[3, 4, 5]]),))


def test_tied_parts_shrink_together() -> None:
    one, two = (nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 4)) for act in (nn.ReLU(), nn.Tanh()))
    two[0].weight = one[0].weight
    twins = Net(lambda m, x: m.two(x) if m.one(x).sum() > 0 else m.two(-x), one=one, two=two)
    model, x = randomise(twins).eval(), torch.randn(3, 4)
    result = torchshear.prune(model, (x,), submodules=["one", "two"])
    assert [group.width for group in result.plan.groups] == [8]
    assert result.model.two[0].weight is result.model.one[0].weight
    assert result.model.two[2].weight.shape == (4, 4)
    assert_equals_masked(model, result.model, result.plan, (x,))


READS = {
    "a value": lambda m, x: x + m.head.hidden.weight.mean(),
    "a view": lambda m, x: x + m.head.hidden.weight.T.flatten()[0],
    "a size": lambda m, x: x + m.head.hidden.weight.shape[0],
    "a length": lambda m, x: x + len(m.head.hidden.weight),
    "a size by number": lambda m, x: x + m.head.hidden.weight.size(0),
    "data": lambda m, x: x + m.head.hidden.weight.data[0, 0, 0, 0],
    "a call of an inner module": lambda m, x: x + m.head.hidden(x).mean(1, keepdim=True),
    "a method of a part": lambda m, x: x + m.head.forward(x).mean(1, keepdim=True),
}


@pytest.mark.parametrize("name", READS)
def test_a_tensor_that_the_rest_of_the_model_reads_is_fixed(name: str) -> None:
    model = detector(READS[name])
    result = torchshear.prune(model, images(), submodules=PARTS)
    assert "head.hidden.weight[0]" not in result.plan.kept
    assert result.report.refused["head.hidden.weight[0]"].startswith("also read outside the parts, at test_parts.py:")
    assert_equals_masked(model, result.model, result.plan, images())


HARMLESS = {
    "dtype and device": lambda m, x: x.to(m.head.hidden.weight.device, m.head.hidden.weight.dtype),
    "flags": lambda m, x: x * (1 + m.head.hidden.weight.requires_grad + m.head.hidden.weight.is_floating_point()),
    "rank": lambda m, x: x * m.head.hidden.weight.ndim * m.head.hidden.weight.dim(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_tells_no_size_or_value_fixes_nothing(name: str) -> None:
    result = torchshear.prune(detector(HARMLESS[name]), images(), submodules=PARTS)
    assert len(result.plan.kept["head.hidden.weight[0]"]) == 2


def test_a_fixed_grouped_weight_fixes_what_it_reads() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.part(x)
        return y if y.sum() > 0 else y + m.part[1].weight.norm()

    model = Net(run, part=nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1))).eval()
    model.part[2].bias.data.fill_(-50)
    result = torchshear.prune(model, (image(),), submodules=["part"])
    assert result.report.achieved_ratio == 0
    assert "part.0.weight[0]" in result.report.refused


class Literal(nn.Module):
    """A part whose forward holds a number that no attribute follows, called on maps of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.chunked = Residual(), Chunked()

    def forward(self, x: Tensor) -> Tensor:
        y = self.chunked(x).mean((2, 3)) + self.chunked(x[:, :, ::2, ::2]).mean((2, 3))
        return y.sum(1) + self.plain(x).sum(1) if y.sum() > 0 else y.sum(1) - self.plain(x).sum(1)


def test_a_part_in_traced_form_stands_in_its_place() -> None:
    model = randomise(Literal()).train()
    result = torchshear.prune(model, (image(),), ratio={"plain": 0.1, "chunked": 0.5}, submodules=["plain", "chunked"])
    assert result.form == "traced"
    assert {part.name: part.form for part in result.report.parts} == {"plain": "native", "chunked": "traced"}
    small = result.model
    assert type(small) is Literal
    assert type(small.plain) is Residual
    assert isinstance(small.chunked, TracedModule)
    assert "part 'chunked' is traced: module 'chunked': its own forward" in result.report.form
    assert small.state_dict().keys() == model.state_dict().keys()
    assert small.training
    assert small.chunked.training
    assert_equals_masked(model, small, result.plan, (image(),))
    assert_equals_masked(model, small, result.plan, (image(5),))
    with pytest.raises(ArgumentError, match="input 0 has shape"):
        small.chunked(image(size=5))


def test_a_traced_part_trains_and_copies() -> None:
    model = randomise(Literal())
    small = torchshear.prune(model, (image(),), submodules=["chunked"]).model
    small.train()
    before = small.chunked.norm.running_mean.clone()
    small(image(4)).sum().backward()
    assert not torch.equal(small.chunked.norm.running_mean, before)
    assert bool(small.chunked.one.weight.grad.abs().sum() > 0)
    twin = copy.deepcopy(small).eval()
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(image()), small.eval()(image()))


def with_table() -> Net:
    """A part with literals, different ones in each mode and for each size, that cannot be native."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = m.one(x)
        if m.training:
            h = h + torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
        if len(x) > 3:
            h = h * torch.tensor([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
        return m.two(h.reshape(-1, 2, 4).flatten(1) + torch.tensor(0.5))

    return Net(run, one=nn.Linear(4, 8), two=nn.Linear(8, 2))


def test_literals_of_each_call_and_mode_are_their_own() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.part(x)
        return m.part(x[:2]).sum() + y.sum() if y.sum() > 0 else m.part(x[:2]).sum()

    model, x = randomise(Net(run, part=with_table())), torch.randn(5, 4)
    groups = torchshear.analyze(torchshear.trace(model, (x,), submodules=["part"]))
    plan = plan_from_kept(groups, {group.name: list(range(group.width - 1)) for group in groups})
    small = shrink_to_form(model, plan, form="traced").model
    assert isinstance(small.part, TracedModule)
    torchshear.verify(model, small, plan, (x,))
    assert_equals_masked(model.eval(), small.eval(), plan, (x,))


def test_one_form_can_be_asked_for(result: torchshear.PruneResult) -> None:
    shrunk = shrink_to_form(detector(), result.plan, form="traced")
    assert dict(shrunk.parts) == {"trunk": "traced", "head": "traced"}
    assert_equals_masked(detector(), shrunk.model, result.plan, images())
    literal = randomise(Literal()).eval()
    with pytest.raises(PlanError, match="native form is not equal"):
        shrink_to_form(literal, torchshear.prune(literal, (image(),), submodules=["chunked"]).plan, form="native")


def test_code_outside_that_needs_the_inside_of_a_traced_part_is_found_out() -> None:
    class Asks(Literal):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.chunked.drop.p

    with pytest.raises(VerificationError, match="AttributeError"):
        torchshear.prune(randomise(Asks()).eval(), (image(),), submodules=["chunked"])


def test_a_plan_replays_on_a_fresh_model_without_running_it(result: torchshear.PruneResult, tmp_path: Path) -> None:
    result.plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["model"]["parts"]["calls"] == ["trunk", "head", "head", "head"]
    assert len(document["model"]["inputs"]["args"]) == 4
    plan = PruningPlan.load(tmp_path / "plan.json")
    fresh = Detector().eval()
    handle = fresh.register_forward_pre_hook(lambda *_: pytest.fail("the whole model was run"))
    small = torchshear.shrink(fresh, plan)
    handle.remove()
    small._forward_pre_hooks.clear()
    small.load_state_dict(result.model.state_dict())
    assert same(small(images()[0]), result.model(images()[0]))
    assert torchshear.verify(detector(), result.model, plan, images()).reference == "masked"
    torchshear.verify(detector(), result.model, plan)  # on inputs of the shapes that the plan describes


def test_a_plan_keeps_what_must_stay_whole(tmp_path: Path) -> None:
    model = detector(READS["a value"])
    result = torchshear.prune(model, images(), submodules=PARTS)
    result.plan.save(tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert set(plan.parts.pinned) == {"head.hidden.weight"}
    fresh = copy.deepcopy(model)
    assert same(torchshear.shrink(fresh, plan)(images()[0]), result.model(images()[0]))


def test_a_plan_whose_inputs_cannot_be_described_asks_for_them(tmp_path: Path) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.part({0: x})
        return y if y.sum() > 0 else -y

    class Keyed(Residual):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x[0])

    model = randomise(Net(run, part=Keyed())).eval()
    result = torchshear.prune(model, (image(),), submodules=["part"])
    assert result.plan.inputs is None
    result.plan.save(tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    fresh = copy.deepcopy(model)
    with pytest.raises(ArgumentError, match="does not describe its example inputs"):
        torchshear.shrink(fresh, plan)
    assert torch.equal(torchshear.shrink(fresh, plan, (image(),))(image()), result.model(image()))


def test_a_damaged_list_of_parts_is_refused(result: torchshear.PruneResult, tmp_path: Path) -> None:
    result.plan.save(tmp_path / "plan.json")
    for parts in ({"calls": []}, {"calls": ["trunk"], "pinned": [1]}, {"calls": [3], "pinned": {}}, 5):
        edit_plan(tmp_path / "plan.json", lambda document, parts=parts: document["model"].update(parts=parts))
        with pytest.raises(PlanError, match="damaged: entry"):
            PruningPlan.load(tmp_path / "plan.json")


def test_a_plan_for_another_model_is_refused(result: torchshear.PruneResult) -> None:
    with pytest.raises(PlanError, match=r"'trunk.stem.weight' has shape .* does not exist"):
        torchshear.shrink(Residual(), result.plan)


def test_plans_for_parts_compose(result: torchshear.PruneResult) -> None:
    second = torchshear.prune(result.model, images(), ratio=0.25, submodules=PARTS)
    both = torchshear.shrink(detector(), result.plan.then(second.plan))
    assert same(both(images()[0]), second.model(images()[0]))


class Unused(Detector):
    """A module that is never called, and a list whose items are."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = Residual()
        self.layers = nn.ModuleList([nn.Conv2d(6, 6, 1)])

    def forward(self, images: list[Tensor], targets: Tensor | None = None) -> Any:
        self.layers[0](torch.zeros(1, 6, 2, 2))
        return super().forward(images, targets)


@pytest.mark.parametrize(
    ("submodules", "message"),
    [
        (["trnk"], r"Detector .*'trnk'.*'trunk'.*'trunk', 'head'"),
        (["trunk", ""], "the whole model"),
        (["trunk", "trunk.stem"], "part 'trunk.stem' lies in part 'trunk'"),
        (["trunk", "trunk"], "names 'trunk' twice"),
        ("trunk", "submodules='trunk'; expected a list of names"),
        ([], "expected a list of names"),
        ([3], "has no module 3"),
    ],
)
def test_names_of_parts_are_checked(submodules: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        torchshear.trace(detector(), images(), submodules=submodules)


@pytest.mark.parametrize(
    ("name", "message"),
    [("spare", "'spare' of Unused .*'head', 'trunk'"), ("layers", "'layers' of Unused .*'layers.0'")],
)
def test_a_part_that_is_never_called_is_refused(name: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        torchshear.trace(Unused().eval(), images(), submodules=[name])


def test_outputs_of_parts_cannot_be_prunable(result: torchshear.PruneResult) -> None:
    with pytest.raises(ArgumentError, match="with submodules"):
        torchshear.analyze(result.plan.analysis.graph, prunable_outputs="0.0")


@pytest.mark.parametrize("words", [{"ratio": {"head.*": 0.5}}, {"exclude": ["trunk.one"]}])
def test_roles_and_patterns_choose_inside_parts(result: torchshear.PruneResult, words: dict[str, Any]) -> None:
    plan = torchshear.plan(result.plan.analysis, **words)
    assert [len(kept) for kept in plan.kept.values()] == [10, 12, 2]


def test_an_alias_names_the_same_part() -> None:
    model = detector()
    model.again = model.trunk
    graph = torchshear.trace(model, images(), submodules=["again"])
    assert graph.parts.names == ("trunk",)
    assert not graph.parts.pinned
    with pytest.raises(ArgumentError, match="twice"):
        torchshear.trace(model, images(), submodules=["again", "trunk"])


class Fails(nn.Module):
    """Its part looks at values, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Residual(), nn.Sequential(nn.Linear(5, 8), Choice(), nn.Linear(8, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Choice(nn.Module):
    """Two ways, by a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_capture_that_fails_inside_a_part_names_it() -> None:
    with pytest.raises(CaptureError, match=r"part 'body' of Fails: .*'body.1.1', .*test_par"):
        torchshear.trace(Fails().eval(), (image(),), submodules=["body"])


def test_capture_that_fails_says_which_parts_would_do(result: torchshear.PruneResult) -> None:
    with pytest.raises(CaptureError, match=r"give submodules=\['body.0'\]"):
        torchshear.trace(Fails().eval(), (image(),))
    left = " of ".join(f"{sum(p.numel() for p in one.parameters()):,}" for one in (result.model, detector()))
    with pytest.raises(CaptureError, match=rf"(?s)give submodules=\['trunk', 'head'\].*{left} parameters \(32%\)"):
        torchshear.prune(detector(), images())
    with pytest.raises(CaptureError, match="outside of torch.export"):
        torchshear.trace(detector(), (list(torch.randn(2, 5, 16, 16)),))


class Taken(nn.Module):
    """Counts positions over all dimensions at once, so that none can go."""

    def forward(self, x: Tensor) -> Tensor:
        return x.take(torch.arange(x.numel())).view(x.shape)


def test_parts_that_would_not_do_are_not_advised() -> None:
    def whole() -> Net:
        return Net(
            lambda m, x: m.wide(m.stem(x)) if x.sum() > 0 else -x[:, :2],
            stem=nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8)),
            wide=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)),
        )

    x = torch.ones(2, 3)
    with pytest.raises(CaptureError, match=r"submodules=\['wide'\]: .* 138 of 226 "):
        torchshear.trace(whole().eval(), (x,))
    without = whole().eval()
    without.wide = nn.Sequential(nn.Linear(8, 4), Taken(), nn.Linear(4, 2))
    with pytest.raises(CaptureError, match="'wide' .*none of its channels"):
        torchshear.trace(without, (x,))


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(CaptureError, match="Detector does not run"):
        torchshear.trace(detector(), (list(torch.randn(2, 5, 16, 16)),), submodules=PARTS)


def test_an_argument_that_no_graph_takes_is_refused() -> None:
    def boxed() -> Net:
        return Net(lambda m, x: m.part(Box(x)), part=Net(lambda m, box: m.inner(box.x), inner=Residual()))

    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    message = "'part' .*Box, .*'part.inner'"
    with pytest.raises(CaptureError, match=message):
        torchshear.trace(boxed().eval(), (image(),), submodules=["part"])
    assert torchshear.prune(boxed().eval(), (image(),), submodules=["part.inner"]).report.achieved_ratio == 0.5


@pytest.mark.parametrize(
    "work",
    [
        lambda model: torchshear.prune(model, images(), submodules=PARTS),
        lambda model: torchshear.prune(model, images()),
        lambda model: torchshear.prune(model, images(), submodules=PARTS, ratio=7),
        lambda model: torchshear.trace(model, images(), submodules=["spare"]),
        lambda model: torchshear.trace(model, ([torch.zeros(2, 2)],), submodules=PARTS),
    ],
)
def test_the_model_is_as_it_was_also_after_a_failure(work: Callable[[nn.Module], object]) -> None:
    model = randomise(Unused()).train()
    model.trunk.norm.eval()
    model.head.register_forward_hook(lambda module, args, output: None)
    before = fingerprint(model)
    with contextlib.suppress(TorchshearError):
        work(model)
    assert fingerprint(model) == before


class Decoder(nn.Module):
    """Causal attention and a feed-forward layer over a growing sequence."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.embedding, self.positions = nn.Embedding(13, width), nn.Embedding(12, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 32), nn.Linear(32, width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = self.embedding(tokens) + self.positions(torch.arange(length, device=tokens.device))
        q, k, v = (f(x).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x = x + self.proj(a.transpose(1, 2).reshape(batch, length, -1))
        return self.out(x + self.down(torch.relu(self.up(x))))


def generator() -> Net:
    """Greedy decoding until a token comes that ends it."""

    def run(m: Net, tokens: Tensor) -> Tensor:
        for _ in range(4):
            following = m.lm_head(m.decoder(tokens)[:, -1]).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], 1)
            if (following == 12).all():
                break
        return tokens

    return Net(run, decoder=Decoder(), lm_head=nn.Linear(16, 13))


def test_a_generation_loop_prunes_its_decoder() -> None:
    model, tokens = randomise(generator()).eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    result = torchshear.prune(model, (tokens,), submodules=["decoder"])
    assert set(result.plan.parts.calls) == {"decoder"}
    assert len(result.plan.parts.calls) == result.model(tokens).shape[1] - 3 or len(result.plan.parts.calls) > 1
    widths = {group.name: group.width for group in result.plan.groups}
    assert 32 in widths.values()
    assert {4, 16} <= set(widths.values())
    assert result.verification.max_error < 1e-9
    assert result.model(torch.tensor([[1, 2]])).shape[1] > 2
