"""The pruner classes: masked copies, shrunk models, files; and what is refused."""

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear
from tests.compat.nni.plain import HALF, Plain, batches
from tests.networks import Attention, Chunked, Grouped, Residual, Tied, image, randomise
from torchshear.compat import nni
from torchshear.errors import ArgumentError
from torchshear.pruners import registered_criteria
from torchshear.pruners.criteria._criterion import declared_needs, needs_of
from torchshear.pruners.masks import Masks

CLASSES = {
    "L1FilterPruner": "l1",
    "L2FilterPruner": "l2",
    "FPGMPruner": "fpgm",
    "ActivationAPoZRankFilterPruner": "apoz",
    "ActivationMeanRankFilterPruner": "mean_activation",
    "TaylorFOWeightFilterPruner": "taylor",
}
ALIASES = {
    "L1NormPruner": "L1FilterPruner",
    "L2NormPruner": "L2FilterPruner",
    "ActivationAPoZRankPruner": "ActivationAPoZRankFilterPruner",
    "ActivationMeanRankPruner": "ActivationMeanRankFilterPruner",
    "TaylorFOWeightPruner": "TaylorFOWeightFilterPruner",
}


def double(model: nn.Module) -> nn.Module:
    return randomise(model).double().eval()


def outputs_agree(masked: nn.Module, small: nn.Module, *args: Tensor) -> bool:
    with torch.no_grad():
        expected, got = masked.eval()(*args), small.eval()(*args)
    return torch.allclose(expected, got, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_is_its_criterion(name: str) -> None:
    model, args = double(Plain()), (image().double(),)
    data = [(x.double(), y) for x, y in batches()]
    given: dict[str, Any] = {"data": data, "loss_fn": functional.cross_entropy, "batches": 3}
    if not needs_of(CLASSES[name]):
        with pytest.raises(ArgumentError, match="data is given"):
            getattr(nni, name)(model, HALF, args=args, **given)
        given = {}
    pruner = getattr(nni, name)(model, HALF, args=args, **given)
    masked, result = pruner.compress(), pruner.shrink()
    graph = torchshear.trace(model, args)
    statistics = torchshear.collect(graph, data, functional.cross_entropy, 3, progress=False)
    ratio = {"one.weight[0]": 0.5, "two.weight[0]": 0.5}
    groups = torchshear.analyze(graph)
    expected = torchshear.plan(groups, CLASSES[name], ratio, statistics=statistics, group_reduction="filters")
    assert result.plan == expected
    assert isinstance(result, torchshear.PruneResult)
    assert (result.model.one.out_channels, result.model.two.out_channels) == (4, 6)
    assert outputs_agree(masked, result.model, *args)
    assert result.verification.max_error <= 1e-9


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_newer_names_are_the_same_classes(alias: str, name: str) -> None:
    assert getattr(nni, alias) is getattr(nni, name)


@pytest.mark.parametrize(
    ("model", "args", "config"),
    [
        (Residual(), (image(),), HALF),
        (Grouped(), (image(),), HALF),
        (Chunked(), (image(),), HALF),
        (Attention(), (torch.randn(2, 5, 24),), [{"op_types": ["Linear"], "sparsity": 0.4}]),
        (Tied(), (torch.arange(8).reshape(2, 4),), [{"op_types": ["Linear", "Embedding"], "sparsity": 0.5}]),
    ],
    ids=["residual", "grouped", "chunked", "attention", "tied"],
)
def test_the_masked_copy_computes_what_the_small_model_does(model, args, config) -> None:
    model = double(model)
    args = tuple(arg.double() if arg.is_floating_point() else arg for arg in args)
    before = copy.deepcopy(model.state_dict())
    pruner = nni.L1FilterPruner(model, config, args=args)
    masked = pruner.compress()
    small = pruner.shrink().model
    assert outputs_agree(masked, small, *args)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert not outputs_agree(masked, model, *args)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert pruner.compress() is masked


def test_what_is_trained_is_what_is_shrunk() -> None:
    model, args = double(Residual()), (image().double(),)
    pruner = nni.L1FilterPruner(model, HALF, args=args)
    masked = pruner.compress().train()
    before = pruner.shrink().model
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        masked(image(4).double()).square().mean().backward()
        optimizer.step()
    small = pruner.shrink().model
    assert outputs_agree(masked, small, *args)
    assert not outputs_agree(before, small, *args)


class TwoNorms(nn.Module):
    """Two convolutions of one width, each with a batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm_a(self.a(x)))
        return self.head(torch.relu(self.norm_b(self.b(x))))


@pytest.mark.parametrize(("width", "left"), [(64, 1), (200, 2)])  # of 64 at most int(0.99 * 64) = 63 go, of 200 198
@pytest.mark.parametrize(("a", "b"), [((1e-3, 2e-3), (1.0, 2.0)), ((1.0, 2.0), (1e-3, 2e-3))])
def test_slim_leaves_a_hundredth_of_each_norm(
    a: tuple[float, float], b: tuple[float, float], width: int, left: int
) -> None:
    model = TwoNorms(width).eval()
    model.norm_a.weight.data.copy_(torch.linspace(*a, width))
    model.norm_b.weight.data.copy_(torch.linspace(*b, width))
    config = [{"op_types": ["BatchNorm2d"], "sparsity": 0.5}]
    kept = nni.SlimPruner(model, config, args=(image(),)).plan.kept
    small, large = sorted(kept.values(), key=len)
    assert small.tolist() == list(range(width - left, width))
    assert large.tolist() == list(range(left, width)), "as many as are protected there go here instead"


def test_slim_ranks_all_norms_together() -> None:
    model = TwoNorms(3).eval()
    model.norm_a.weight.data.copy_(torch.tensor([0.1, 0.5, -0.9]))
    model.norm_b.weight.data.copy_(torch.tensor([0.2, -0.3, 0.8]))
    config = [{"op_types": ["BatchNorm2d"], "sparsity": 0.5}]
    pruner = nni.SlimPruner(model, config, args=(image(),))
    result = pruner.shrink()
    assert {name: kept.tolist() for name, kept in result.plan.kept.items()} == {
        "a.weight[0]": [1, 2],
        "b.weight[0]": [2],
    }
    assert outputs_agree(pruner.compress().double(), result.model.double(), image().double())
    assert "50.0% of all its layers together, each layer 0.0% to 99.0%" in pruner.table


def test_what_coupled_layers_do_not_share_is_masked() -> None:
    model, args = double(Residual(50)), (image().double(),)
    config = [{"op_names": ["stem"], "sparsity": 0.3}, {"op_names": ["two"], "sparsity": 0.2}]
    pruner = nni.L1FilterPruner(model, config, args=args, dependency_aware=True)
    masked, result = pruner.compress(), pruner.shrink()
    assert result.model.stem.out_channels == 40
    assert {row.layer: (row.common, row.extra) for row in pruner.layer_masks if row.ratio} == {
        "stem": (10, 5),
        "two": (10, 0),
    }
    sums = [model.get_submodule(name).weight.detach().abs().sum((1, 2, 3)) for name in ("stem", "two")]
    common = set((sums[0] + sums[1]).argsort()[:10].tolist())
    extra = [c for c in sums[0].argsort().tolist() if c not in common][:5]
    gone = (masked.stem.weight == 0).flatten(1).all(1)
    assert set(gone.nonzero().flatten().tolist()) == common | set(extra)
    assert set(range(50)) - set(result.plan.kept["stem.weight[0]"].tolist()) == common
    assert outputs_agree(masked, result.model, *args)


def test_depthwise_layers_follow_in_the_dependency_aware_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    config = [{"op_names": ["0"], "sparsity": 0.5}]
    pruner = nni.L1FilterPruner(double(model), config, args=(image().double(),), dependency_aware=True)
    result = pruner.shrink()
    assert result.model[0].out_channels == result.model[1].out_channels == 4
    assert outputs_agree(pruner.compress(), result.model, image().double())


@pytest.mark.parametrize(
    ("name", "entry", "args", "message"),
    [
        ("SlimPruner", {"op_types": ["BatchNorm2d"], "sparsity": 0.5}, (image(),), "it has a pool"),
        ("L1FilterPruner", {"op_names": ["qkv"], "sparsity": 0.4}, (torch.randn(2, 5, 24),), "products of groups"),
    ],
)
def test_where_the_dependency_aware_mode_says_no(name, entry, args, message) -> None:
    model = Attention().eval() if "op_names" in entry else Residual().eval()
    pruner = getattr(nni, name)(model, [entry], args=args, dependency_aware=True)
    with pytest.raises(ArgumentError, match=message):
        pruner.compress()


def test_a_pool_keeps_to_its_layers_and_bounds() -> None:
    model = double(Residual(16))
    config = [
        {"op_names": ["one"], "sparsity": 0.25},
        {"op_names": ["stem", "two"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.6},
    ]
    result = nni.L1FilterPruner(model, config, args=(image().double(),)).shrink()
    assert {name: len(kept) for name, kept in result.plan.kept.items()} == {"stem.weight[0]": 8, "one.weight[0]": 24}


def test_a_bound_holds_where_one_layer_would_lose_nearly_all() -> None:
    model = double(Residual(16))
    model.one.weight.data *= 1e-6
    config = [{"op_types": ["Conv2d"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.6}]
    result = nni.TaylorFOWeightPruner(
        model, config, args=(image().double(),), data=[(x.double(), y) for x, y in batches()],
        loss_fn=functional.cross_entropy, batches=3,
    ).shrink()  # fmt: skip
    assert {name: len(kept) for name, kept in result.plan.kept.items()} == {"stem.weight[0]": 11, "one.weight[0]": 13}


def test_level_masks_the_least_weights_without_a_trace() -> None:
    model = Plain()
    pruner = nni.LevelPruner(model, [{"op_types": ["default"], "sparsity": 0.35}])
    masked = pruner.compress()
    for name in ("one", "two", "head"):
        dense, kept = model.get_submodule(name).weight.detach(), masked.get_submodule(name).weight.detach()
        lowest = dense.flatten().abs().argsort(stable=True)[: int(dense.numel() * 0.35 + 1e-9)]
        expected = dense.flatten().index_fill(0, lowest, 0.0)
        assert torch.equal(kept.flatten(), expected)
    with pytest.raises(ArgumentError, match="LevelPruner was made without example inputs"):
        pruner.shrink()


@pytest.mark.parametrize(
    ("weights", "ratio", "masked"),
    [((1.0, 1.0, 1.0, 2.0), 0.25, [2]), ((5.0, 2.0, 8.0, 1.0, 9.0, 3.0, 7.0, 4.0, 6.0, 10.0), 0.35, [1, 3, 5])],
)
def test_level_masks_exactly_as_many_as_asked(weights: tuple[float, ...], ratio: float, masked: list[int]) -> None:
    model = nn.Sequential(nn.Linear(len(weights), 1, bias=False))
    model[0].weight.data.copy_(torch.tensor([weights]))
    pruner = nni.LevelPruner(model, [{"op_types": ["Linear"], "sparsity": ratio}])
    pruner.compress()
    assert (~pruner.masks.tensors["0.weight"][0]).nonzero().flatten().tolist() == masked


def test_level_removes_what_its_zeros_leave_without_effect() -> None:
    model, args = double(Plain()), (image().double(),)
    model.two.weight.data[3:] *= 1e-9
    model.two.bias.data[3:] = 0
    config = [{"op_names": ["two"], "sparsity": 0.75}]
    pruner = nni.LevelPruner(model, config, args=args)
    result = pruner.shrink()
    assert result.plan.kept["two.weight[0]"].tolist() == [0, 1, 2]
    assert outputs_agree(pruner.compress(), result.model, *args)


def test_a_config_of_neural_compressor() -> None:
    model, args = double(Plain()), (image().double(),)
    config = {
        "pruning_configs": [
            {"op_names": ["one"], "pattern": "1xchannel", "target_sparsity": 0.25},
            {"op_names": ["two"], "pattern": "2:4", "target_sparsity": 0.5},
        ],
        "pruning_type": "snip_momentum",
        "pruning_scope": "local",
    }
    data = [(x.double(), y) for x, y in batches()]
    pruner = nni.ConfigPruner(model, config, args, data=data, loss_fn=functional.cross_entropy, batches=3)
    masked, result = pruner.compress(), pruner.shrink()
    assert result.model.one.out_channels == 6
    assert (masked.two.weight.detach().movedim(1, -1).reshape(-1, 4) == 0).sum(1).min() >= 2
    assert outputs_agree(masked, result.model, *args)
    with pytest.raises(ArgumentError, match=r"pruning_configs\[0\] .*snip_momentum"):
        nni.L1FilterPruner(model, config, args)


def test_files(tmp_path: Path) -> None:
    model, args = randomise(Residual()).eval(), (image(),)
    pruner = nni.L1FilterPruner(model, HALF, args=args)
    masked = pruner.compress()
    pruner.export_model(tmp_path / "weights.pth", tmp_path / "masks.safetensors", tmp_path / "model.onnx")
    state = torch.load(tmp_path / "weights.pth", weights_only=True)
    plain = Residual().eval()
    plain.load_state_dict(state)
    assert torch.equal(plain(*args), masked(*args))
    assert (state["one.weight"] == 0).flatten(1).all(1).sum() == 8
    masks = Masks.load(tmp_path / "masks.safetensors")
    assert torch.equal(masks.tensors["one.weight"], state["one.weight"] != 0)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: args[0].numpy()})
    expected = masked(*args).detach()
    assert torch.allclose(torch.from_numpy(got), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    pruner.export_model(tmp_path / "weights.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_two_pruners_are_independent(tmp_path: Path) -> None:
    model, args = Plain().eval(), (image(),)
    (tmp_path / "config.yaml").write_text("- op_names: [one]\n  sparsity: 0.5\n")
    first = nni.L1FilterPruner(model, tmp_path / "config.yaml", args=args)
    second = nni.L1FilterPruner(model, [{"op_names": ["two"], "sparsity": 0.25}], args=args)
    first.compress()
    assert second.resolved.ratios == {"two.weight[0]": 0.25}
    assert first.resolved.ratios == {"one.weight[0]": 0.5}
    assert len(second.plan.kept["one.weight[0]"]) == 8


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("L1FilterPruner", {}, "removes channels of 'one'.*args="),
        ("ActivationAPoZRankFilterPruner", {"args": (image(),)}, "'apoz' looks at data; give batches of it as data="),
        ("TaylorFOWeightPruner", {"args": (image(),), "data": [1]}, "'taylor' looks at gradients; give a loss"),
        ("TaylorFOWeightPruner", {"data": [1], "loss_fn": print}, "'taylor' needs the traced model"),
        ("ConfigPruner", {"args": (image(),)}, r"config_list\[0\] says no criterion, and ConfigPruner has none"),
        ("L1FilterPruner", {"args": (image(),), "dependency_aware": 1}, "dependency_aware=1; expected True or False"),
        ("L1FilterPruner", {"args": (image(),), "align": 0}, "align must be a whole number"),
        (
            "L1FilterPruner",
            {"args": (image(),), "align": 8, "dependency_aware": True},
            "leave align and min_width away",
        ),
    ],
)
def test_what_is_refused(name: str, given, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        getattr(nni, name)(Plain(), HALF, **given)


def test_a_criterion_of_channels_scores_no_single_weights() -> None:
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": [4, 1]}]
    with pytest.raises(ArgumentError, match="'fpgm' scores channels and no single weights"):
        nni.FPGMPruner(Plain(), config).compress()
    assert nni.L2FilterPruner(Plain(), config).masks.pattern == "4x1"


def test_criteria_declare_what_they_look_at() -> None:
    graph = torchshear.trace(Plain().eval(), (image(),))
    groups = torchshear.analyze(graph)
    forward = torchshear.collect(graph, batches(), batches=1, progress=False)
    for name in registered_criteria():
        needs = declared_needs(name)
        for statistics, is_missing in ((None, bool(needs)), (forward, not needs <= forward.sums)):
            if is_missing:
                with pytest.raises(ArgumentError, match="looks at"):
                    torchshear.plan(groups, name, statistics=statistics)
            else:
                torchshear.plan(groups, name, statistics=statistics)


@pytest.mark.parametrize(("args", "kwargs"), [(3, None), (None, None), ((), [1])])
def test_example_inputs_of_another_kind_are_refused(args: object, kwargs: object) -> None:
    with pytest.raises(ArgumentError, match="example inputs"):
        nni.L1FilterPruner(Plain(), HALF, args, kwargs)  # type: ignore[arg-type]
