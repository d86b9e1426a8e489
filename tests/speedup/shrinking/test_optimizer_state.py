"""The optimizer follows a cut: training goes on as the masked model's does, value by value in float64.

Masked training is written out here: values and gradients at cut positions are set to zero around each step. It shares
nothing with the library but the plan's masks, and nothing is sliced to compare: kept positions are picked by masks.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

import torchshear
from tests.networks import Net, Network, named, noise, randomise
from torchshear.errors import ArgumentError, PlanError
from torchshear.pruners.masks import Masks, apply
from torchshear.speedup import shrink_average, shrink_optimizer, shrink_to_form

# Of a network whose norms or softmaxes run over cut channels the masked model is another function.
TRAINED = named(
    *("sequential", "residual", "inverted_residual", "grouped_bottleneck", "vit", "multihead_attention", "generator"),
    *("separate_projections", "squeeze_excitation", "glu_chunk", "tied_embedding", "tied_transpose", "lstm"),
    *("frozen_branch", "unused_parameters"),
)

Make = Callable[[list[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_of(model: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    outputs = [y for y in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(y, Tensor) and y.is_floating_point()]
    return sum((y - noise(*y.shape, seed=3)).square().mean() for y in outputs)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


class Training:
    """A model with its optimizer and its schedule; with masks, cut values and their gradients are zero at all times."""

    def __init__(self, model: nn.Module, make: Make) -> None:
        self.model, self.optimizer, self.make = model, make(trained(model)), make
        self.masks: dict[str, Tensor] = {}
        self.schedule = lr_scheduler.MultiplicativeLR(self.optimizer, lambda step: 0.8)

    def twin(self) -> "Training":
        """The same with a model, an optimizer and a schedule of its own."""
        other = Training(copy.deepcopy(self.model), self.make)
        pairs = zip(trained(self.model), trained(other.model), strict=True)
        other.optimizer.state.update({b: copy.deepcopy(self.optimizer.state[a]) for a, b in pairs})
        for group, mine in zip(other.optimizer.param_groups, self.optimizer.param_groups, strict=True):
            group |= {key: value for key, value in mine.items() if key != "params"}
        other.schedule.load_state_dict(self.schedule.state_dict())
        return other

    def mask(self) -> None:
        named_tensors = dict(self.model.named_parameters(remove_duplicate=False))
        for name, mask in self.masks.items():
            if name in named_tensors:
                named_tensors[name].data.masked_fill_(~mask, 0)
                if named_tensors[name].grad is not None:
                    named_tensors[name].grad.masked_fill_(~mask, 0)

    def step(self, args: tuple, kwargs: dict) -> float:
        self.optimizer.zero_grad()
        loss = loss_of(self.model, args, kwargs)
        loss.backward()
        self.mask()
        self.optimizer.step()
        self.mask()
        self.schedule.step()
        return loss.item()


def assert_kept_are_equal(model: nn.Module, small: nn.Module, masks: dict[str, Tensor], rtol: float = 1e-9) -> None:
    wanted = tensors(model)
    for name, tensor in small.named_parameters(remove_duplicate=False):
        kept = wanted[name][masks[name]].reshape(tensor.shape) if name in masks else wanted[name]
        scale = kept.abs().max().clamp(min=1e-3)
        assert (tensor - kept).abs().max() <= rtol * scale, name


def planned(network: Network) -> tuple[nn.Module, tuple, dict, torchshear.PruningPlan]:
    """A network without dropout in train mode, its arguments and a plan for half of it."""
    model, args, kwargs = network.build()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    roles = ("heads", "head_dim", "ffn") if "cross_channel" in network.tags else None
    groups = torchshear.analyze(torchshear.trace(model, args, kwargs))
    return model.train(), args, kwargs, torchshear.plan(groups, ratio=0.5, roles=roles)


def trained_both_ways(network: Network, make: Make, n_before: int = 2, n_after: int = 4) -> tuple[Training, Training]:
    """Train a network dense, and then masked and shrunk; both must agree at each step."""
    model, args, kwargs, plan = planned(network)
    other = Training(model, make)
    for _ in range(n_before):
        other.step(args, kwargs)
    masked = other.twin()
    masked.masks = plan.masks()
    masked.mask()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = shrink_to_form(model, plan, verify=False).model
    shrink_optimizer(other.optimizer, model, small, plan)
    other.model = small
    assert [p.shape for p in trained(small)] != [p.shape for p in trained(model)]
    for _ in range(n_after):
        assert other.step(args, kwargs) == pytest.approx(masked.step(args, kwargs), rel=1e-9)
        assert_kept_are_equal(masked.model, small, masked.masks)
    assert other.schedule.get_last_lr() == masked.schedule.get_last_lr()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return masked, other


@pytest.mark.parametrize("network", TRAINED, ids=lambda one: one.name)
def test_shrunk_training_goes_on_as_masked_training(network: Network) -> None:
    _, other = trained_both_ways(network, OPTIMIZERS["SGD" if TRAINED.index(network) % 2 else "AdamW"])
    held = {id(parameter) for group in other.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trained(other.model)}


@pytest.mark.parametrize(
    ("name", "kind"), [*(("flatten_head", kind) for kind in OPTIMIZERS), ("qkv_unbind_sdpa", "Adam")]
)
def test_every_optimizer_follows(name: str, kind: str) -> None:
    """All state of one run is that of the other, in a network in which every value has a gradient, and in attention.

    Where a gradient is zero but for rounding, as of a bias before a batch norm, some optimizers go by its sign.
    """
    masked, other = trained_both_ways(named(name)[0], OPTIMIZERS[kind])
    names = {id(parameter): name for name, parameter in other.model.named_parameters()}
    parameters = dict(masked.model.named_parameters())
    assert other.optimizer.state
    for parameter, held in other.optimizer.state.items():
        name = names[id(parameter)]
        wanted = masked.optimizer.state[parameters[name]]
        assert wanted.keys() == held.keys()
        for key, value in wanted.items():
            if isinstance(value, Tensor) and value.shape == parameters[name].shape and name in masked.masks:
                value = value[masked.masks[name]].reshape(held[key].shape)
            if isinstance(value, Tensor):
                torch.testing.assert_close(held[key], value, rtol=1e-7, atol=1e-12)
            else:
                assert held[key] == value
    assert len(other.optimizer.state) == len(masked.optimizer.state)


def small_network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    return randomise(model.double()), noise(4, 6)


def stepped(model: nn.Module, optimizer: Optimizer, x: Tensor, n_steps: int = 2) -> None:
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss_of(model, (x,), {}).backward()
        optimizer.step()


def test_masks_on_the_model_are_no_obstacle() -> None:
    """Masks of a training session lie on the model: its dense weights have other names, and small ones none."""
    model, x = small_network()
    plan = torchshear.plan(torchshear.analyze(torchshear.trace(model, (x,))), ratio=0.5)
    parameters = {name for name, _ in model.named_parameters()}
    optimizer = OPTIMIZERS["AdamW"](list(model.parameters()))
    stepped(model, optimizer, x)
    apply(model, Masks.of({name: mask for name, mask in plan.masks().items() if name in parameters}))
    stepped(model, optimizer, x)
    other, follower = copy.deepcopy((model, optimizer))
    plain = copy.deepcopy(other)
    torchshear.pruners.masks.make_permanent(plain)
    small = torchshear.shrink(plain, plan)
    shrink_optimizer(follower, other, small, plan)
    for _ in range(4):
        stepped(model, optimizer, x, 1)
        stepped(small, follower, x, 1)
        permanent = copy.deepcopy(model)
        torchshear.pruners.masks.make_permanent(permanent)
        assert_kept_are_equal(permanent, small, plan.masks())


def test_groups_numbers_and_other_parameters_stay() -> None:
    model, x = small_network()
    scale = nn.Parameter(torch.ones(3))
    groups = [
        {"params": [model[0].weight, scale], "lr": 0.3, "name": "first"},
        {"params": [model[1].weight, model[3].weight, model[3].bias], "weight_decay": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    schedule = lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=20)
    scale.grad = torch.ones(3)
    stepped(model, optimizer, x)
    schedule.step()
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    kept = optimizer.state[scale]
    result = torchshear.prune(model, (x,), ratio=0.5)
    small = result.model
    shrink_optimizer(optimizer, model, small, result.plan)
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == before
    wanted = [[small[0].weight, scale], [small[1].weight, small[3].weight, small[3].bias]]
    for group, parameters in zip(optimizer.param_groups, wanted, strict=True):
        assert all(a is b for a, b in zip(group["params"], parameters, strict=True))
    assert optimizer.state[scale] is kept
    assert len(optimizer.state) == 5
    for _ in range(18):
        stepped(small, optimizer, x, 1)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.get_last_lr()[0])
    assert optimizer.param_groups[0]["lr"] < 0.01


def test_gradients_that_wait_for_a_step_go_along() -> None:
    model, x = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, (x,), {}).backward()
    result = torchshear.prune(model, (x,), ratio=0.5)
    shrink_optimizer(optimizer, model, result.model, result.plan)
    for name, parameter in result.model.named_parameters():
        whole, masks = dict(model.named_parameters())[name].grad, result.plan.masks()
        assert torch.equal(parameter.grad, (whole[masks[name]] if name in masks else whole).reshape(parameter.shape))


def test_state_lies_in_memory_as_the_weights_do() -> None:
    """Fused kernels read weights and moments side by side."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).to(memory_format=torch.channels_last)
    optimizer, x = torch.optim.AdamW(model.parameters(), fused=True), torch.randn(2, 3, 8, 8)
    stepped(model.double(), optimizer, x.double())
    result = torchshear.prune(model, (x.double(),), ratio=0.5)
    shrink_optimizer(optimizer, model, result.model, result.plan)
    weight = result.model[2].weight
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    stepped(result.model, optimizer, x.double())


class Sharpness(Optimizer):
    """Wraps another optimizer, as sharpness-aware minimisation does: groups are shared, and state is not."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["before"] = parameter.detach().clone()
        self.inner.step()


def test_an_optimizer_inside_another_follows() -> None:
    model, x = small_network()
    optimizer = Sharpness(list(model.parameters()))
    stepped(model, optimizer, x)
    result = torchshear.prune(model, (x,), ratio=0.5)
    shrink_optimizer(optimizer, model, result.model, result.plan)
    for parameter in result.model.parameters():
        assert optimizer.state[parameter]["before"].shape == parameter.shape
        assert optimizer.inner.state[parameter]["momentum_buffer"].shape == parameter.shape
    stepped(result.model, optimizer, x)


def test_factored_moments_are_sliced_along_what_they_have() -> None:
    model, x = small_network()
    optimizer = torch.optim.Adafactor(model.parameters())
    stepped(model, optimizer, x)
    before = optimizer.state[model[3].weight]
    result = torchshear.prune(model, (x,), ratio=0.5)
    rows, columns = (torch.from_numpy(result.plan.state["3.weight"].kept[dim]) for dim in (0, 1))
    shrink_optimizer(optimizer, model, result.model, result.plan)
    held = optimizer.state[result.model[3].weight]
    assert torch.equal(held["row_var"], before["row_var"][rows])
    assert torch.equal(held["col_var"], before["col_var"][:, columns])
    assert held["step"] == 2
    stepped(result.model, optimizer, x)


def test_an_average_follows() -> None:
    """An average of the masked weights and one of the shrunk model's stay the same, with one history."""
    network = named("residual")[0]
    model, args, kwargs, plan = planned(network)
    dense = Training(model, OPTIMIZERS["SGD"])
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=use) for use in (False, True)]
    for _ in range(3):
        dense.step(args, kwargs)
        for average in averages:
            average.update_parameters(model)
    others, masked = copy.deepcopy(averages), dense.twin()
    masked.masks = plan.masks()
    masked.mask()
    small = shrink_to_form(model, plan, verify=False).model
    shrink_optimizer(dense.optimizer, model, small, plan)
    for average in others:
        shrink_average(average, model, small, plan)
    dense.model = small
    for _ in range(3):
        dense.step(args, kwargs)
        masked.step(args, kwargs)
        for average, other in zip(averages, others, strict=True):
            average.update_parameters(masked.model)
            other.update_parameters(small)
            assert_kept_are_equal(average.module, other.module, plan.masks())
    assert [int(other.n_averaged) for other in others] == [6, 6]
    assert others[0].module(*args).shape == model(*args).shape
    buffers, masks = dict(averages[1].module.named_buffers()), plan.masks()
    assert buffers
    for name, value in others[1].module.named_buffers():
        wanted = buffers[name][masks[name]].reshape(value.shape) if name in masks else buffers[name]
        torch.testing.assert_close(value, wanted)


def shampoo_like(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.state[model[3].weight]["preconditioners"] = [torch.eye(8), torch.eye(12)]


def statistics_of_another_shape(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.state[model[3].weight]["exp_avg_sq_row"] = torch.ones(8)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shampoo_like, r"keeps 'preconditioners' of '3.weight', a list"),
        (statistics_of_another_shape, r"keeps 'exp_avg_sq_row' of '3.weight', of shape \(8,\)"),
    ],
)
def test_state_without_known_meaning_is_refused_and_nothing_changes(spoil: Callable, said: str) -> None:
    model, x = small_network()
    optimizer = torch.optim.Adam(model.parameters())
    stepped(model, optimizer, x)
    spoil(model, optimizer)
    result = torchshear.prune(model, (x,), ratio=0.5)
    before = [list(group["params"]) for group in optimizer.param_groups], dict(optimizer.state)
    with pytest.raises(ArgumentError, match=said):
        shrink_optimizer(optimizer, model, result.model, result.plan)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], before[0][0], strict=True))
    assert all(optimizer.state[key] is held for key, held in before[1].items())
    assert len(optimizer.state) == len(before[1])
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_an_optimizer_that_cannot_follow_is_refused() -> None:
    model, x = small_network()
    result = torchshear.prune(model, (x,), ratio=0.5)
    small, plan = result.model, result.plan
    with pytest.raises(ArgumentError, match="LBFGS keeps parameters in its attribute '_params'"):
        shrink_optimizer(torch.optim.LBFGS(model.parameters()), model, small, plan)
    of_a_copy = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="holds none of the parameters of this Sequential"):
        shrink_optimizer(of_a_copy, model, small, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=r"'0.weight' is torch.float32 on cpu in the shrunk model"):
        shrink_optimizer(optimizer, model, copy.deepcopy(small).float(), plan)
    with pytest.raises(PlanError, match=r"'0.weight' has shape \(12, 6\) in the shrunk model; by the plan it has"):
        shrink_optimizer(optimizer, model, model, plan)
    with pytest.raises(PlanError, match=r"'0.weight' has shape \(12, 6\); in Sequential it has \(6, 6\)"):
        shrink_optimizer(optimizer, small, small, plan)
    other = Net(lambda m, x: m.fc(x), fc=nn.Linear(6, 3))
    with pytest.raises(PlanError, match=r"which has '0.bias'; Net does not"):
        shrink_optimizer(torch.optim.SGD(other.parameters(), lr=0.1), other, small, plan)
    shrink_optimizer(optimizer, model, small, plan)
    with pytest.raises(ArgumentError, match="follows the shrunk model already"):
        shrink_optimizer(optimizer, model, small, plan)
    average = AveragedModel(model)
    shrink_average(average, model, small, plan)
    with pytest.raises(ArgumentError, match="the average has no '0.weight' as Sequential has it"):
        shrink_average(average, model, small, plan)
