"""Shrunk models: their dtypes, modes, calls, and what only training reads. Every network is in test_forms.py."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Between, Chunked, Grouped, Net, Residual, image, randomise
from torchshear.errors import ArgumentError, CaptureError, PlanError
from torchshear.pruners import plan_from_kept
from torchshear.speedup import TracedModule, shrink_to_form

FORMS = ("native", "traced")


def made(model: nn.Module, *args: Tensor, ratio: float = 0.5) -> torchshear.PruningPlan:
    return torchshear.plan(torchshear.analyze(torchshear.trace(model, args)), ratio=ratio)


@pytest.fixture
def model() -> nn.Module:
    return randomise(Residual())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_are_kept(form: str, dtype: torch.dtype) -> None:
    model = randomise(Residual()).to(dtype).eval()
    x = image().to(dtype)
    plan = made(model, x)
    small = shrink_to_form(model, plan, form=form).model
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(x).dtype == dtype
    assert torchshear.verify(model, small, plan, args=(x,)).max_error <= 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_modes_of_modules_are_kept(model: nn.Module, form: str) -> None:
    model.norm.eval()
    small = shrink_to_form(model, made(model, image()), form=form).model
    modes = {name: module.training for name, module in small.named_modules()}
    assert (modes["norm"], modes[""]) == (False, True)


@pytest.mark.parametrize("form", FORMS)
def test_copies_change_alone_and_are_cast(model: nn.Module, form: str) -> None:
    small = shrink_to_form(model, made(model, image()), form=form).model.eval()
    twin = copy.deepcopy(small)
    assert torch.equal(twin(image()), small(image()))
    with torch.no_grad():
        twin.get_parameter("head.bias").add_(1)
    assert not torch.equal(twin(image()), small(image()))
    assert small.to(torch.float64)(image().double()).dtype == torch.float64


def test_the_native_form_pickles(model: nn.Module) -> None:
    small = shrink_to_form(model, made(model, image()), form="native").model.eval()
    assert torch.equal(pickle.loads(pickle.dumps(small))(image()), small(image()))


def test_a_size_that_only_training_reads_is_followed_by_the_traced_form() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.one(x)
        if m.training:
            y = y + torch.full((x.shape[0], m.width), 0.1)
        return m.two(y)

    model = randomise(Net(run, one=nn.Linear(3, 8), two=nn.Linear(8, 2), width=8))
    small = shrink_to_form(model, made(model, torch.randn(2, 3)))
    assert small.form == "traced"
    assert "does not run in train mode" in small.reason
    small.model.train()(torch.randn(2, 3)).sum().backward()
    small.model.eval()(torch.randn(5, 3))


def test_saturated_activations_do_not_hide_a_difference() -> None:
    model = randomise(Between(lambda h: torch.relu(h - 30).roll(2, 1), nn.Linear(3, 8), nn.Linear(8, 2)))
    x = torch.zeros(4096, 3)
    x[0] = 64  # random inputs of this spread, about 1, leave every unit at zero
    with torch.no_grad():
        model.one.weight.abs_()[4:] /= 100
    result = torchshear.prune(model, (x,))
    assert result.plan.kept["one.weight[0]"].tolist() == [0, 1, 2, 3]
    assert result.form == "traced"


def test_parameters_that_only_training_reads_shrink_too() -> None:
    def run(m: Net, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = torch.relu(m.one(x))
        return (m.two(h), m.aux(h)) if m.training else m.two(h)

    model = randomise(Net(run, one=nn.Linear(3, 8), two=nn.Linear(8, 2), aux=nn.Linear(8, 2)))
    for form in FORMS:
        small = shrink_to_form(model, made(model, torch.randn(2, 3)), form=form).model
        assert small.get_parameter("aux.weight").shape == (2, 4)
        main, aux = small.train()(torch.randn(2, 3))
        assert main.shape == aux.shape == (2, 2)
        assert small.eval()(torch.randn(2, 3)).shape == (2, 2)


class Optional(nn.Module):
    """A literal, so that the form is traced, and arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None, **rest: Tensor) -> dict[str, Tensor | None]:
        h = torch.cat(self.one(x).split([5, 3], 1)[::-1], 1)
        return {"out": self.two(h if scale is None else h * scale) + rest.get("shift", 0), "none": None}


def test_keywords_and_defaults_call_the_traced_form_as_the_original() -> None:
    model, x = randomise(Optional()).eval(), torch.randn(2, 3)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    small = torchshear.shrink(model, torchshear.plan(groups))
    assert isinstance(small, TracedModule)
    torch.testing.assert_close(small(x)["out"], small(x=x)["out"])
    assert small(x)["none"] is None
    with pytest.raises(ArgumentError, match="do not fit the model"):
        small(y=x)
    with pytest.raises(ArgumentError, match="(?s)expected .* that of the example inputs"):
        small(x, x)


def test_keywords_may_come_in_any_order() -> None:
    model, x = randomise(Optional()).eval(), torch.randn(2, 3)
    scale, shift = torch.randn(2, 1), torch.randn(2, 1)
    groups = torchshear.analyze(torchshear.trace(model, (), {"shift": shift, "scale": scale, "x": x}))
    small = torchshear.shrink(model, torchshear.plan(groups))
    assert isinstance(small, TracedModule)
    expected = small(shift=shift, scale=scale, x=x)
    torch.testing.assert_close(small(x=x, scale=scale, shift=shift), expected)
    torch.testing.assert_close(small(x, scale, shift=shift), expected)


def test_a_model_without_train_graph_says_so() -> None:
    class EvalOnly(Chunked):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and float(x.sum()) > 0:
                x = 2 * x
            return super().forward(x)

    model = randomise(EvalOnly())
    small = torchshear.shrink(model, made(model, image()))
    assert small.eval()(image()).shape == (2, 4, 8, 8)
    with pytest.raises(CaptureError, match="train mode: .*EvalOnly"):
        small.train()(image())


def test_a_plan_of_another_model_is_refused(model: nn.Module, tmp_path: Path) -> None:
    plan = made(model, image())
    with pytest.raises(PlanError, match=r"'stem.weight' .*\(8, 3, 3, 3\); in Grouped"):
        torchshear.shrink(Grouped(), plan)
    with pytest.raises(PlanError, match="in Residual it has shape"):
        torchshear.shrink(Residual(16), plan)

    class Impostor(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="Impostor has graph"):
        torchshear.shrink(Impostor(), torchshear.PruningPlan.load(tmp_path / "plan.json"))
    with pytest.raises(ArgumentError, match="plan is dict; expected a PruningPlan"):
        torchshear.shrink(model, {})  # type: ignore[arg-type]


def test_native_attributes_of_torch_modules_follow() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(8, 8), nn.PReLU(8), nn.ConvTranspose2d(8, 4, 2)
    )
    small = torchshear.prune(randomise(model), (image(),)).model
    assert (small[1].groups, small[1].in_channels, small[1].out_channels) == (4, 4, 4)
    assert (small[2].num_groups, small[2].num_channels) == (4, 4)
    assert small[3].num_parameters == 4
    assert (small[4].in_channels, small[4].out_channels) == (4, 4)
    assert model[1].groups == 8


class Literals(nn.Module):
    """Literals of its own in each mode; in training the hidden values come out as well if `is_open`."""

    def __init__(self, is_open: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.is_open = is_open

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.one(x)
        if self.training:
            h = h + torch.tensor([10.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
        hidden = self.two(h * torch.tensor([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]))
        y = self.three(torch.relu(hidden))
        return (y, hidden) if self.training and self.is_open else y


def test_norms_without_tensors_know_their_channels() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8), nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        nn.Conv2d(8, 2, 1),
    ).eval()  # fmt: skip
    result = torchshear.prune(model, (torch.randn(2, 3, 4, 4),), ratio=0.5)
    assert result.form == "native"
    assert [result.model[1].num_features, result.model[2].num_features] == [4, 4]


@pytest.mark.parametrize("is_open", [False, True])
def test_literals_of_each_mode_are_its_own(is_open: bool) -> None:
    model, x = randomise(Literals(is_open)), torch.randn(3, 4)
    groups = torchshear.analyze(torchshear.trace(model, (x,)))
    plan = plan_from_kept(groups, {"one.weight[0]": [0, 2, 5]})
    small = shrink_to_form(model, plan, form="traced").model
    h = x @ model.one.weight[[0, 2, 5]].T + model.one.bias[[0, 2, 5]] + torch.tensor([10.0, 2.0, 5.0])
    hidden = (h * torch.tensor([7.0, 5.0, 2.0])) @ model.two.weight[:, [0, 2, 5]].T + model.two.bias
    expected = model.three(torch.relu(hidden))
    torch.testing.assert_close(small.train()(x), (expected, hidden) if is_open else expected)


def test_outputs_of_training_alone_keep_their_shapes() -> None:
    x = torch.randn(1, 4)
    assert [group.width for group in torchshear.prune(randomise(Literals()), (x,)).plan.groups] == [8, 6]
    result = torchshear.prune(randomise(Literals(is_open=True)), (x,))
    assert [group.width for group in result.plan.groups] == [8]
    assert result.report.refused["two.weight[0]"] == "model output 1 in train mode"
    assert result.model.train()(x)[1].shape == (1, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_devices_are_kept(form: str) -> None:
    model, x = randomise(Residual()).cuda().eval(), image().cuda()
    plan = made(model, x)
    small = shrink_to_form(model, plan, form=form).model
    assert {p.device.type for p in small.parameters()} == {"cuda"}
    assert torchshear.verify(model, small, plan, args=(x,)).max_error <= 1e-9
