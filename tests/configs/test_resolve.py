"""What a config asks of layers and of channel groups."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchshear
from tests.networks import Attention, Grouped, Residual, Tied, image
from torchshear.configs import parse_config, resolve
from torchshear.errors import ArgumentError


class Heads(nn.Module):
    """Layers whose names are parts of one another, and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 1)
        self.fc1 = nn.Linear(8, 16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.norm(self.deep(self.conv(x))))))
        return self.fc(torch.relu(self.fc1(x.mean((2, 3)))))


def analysed(model: nn.Module, *args: Tensor):
    return torchshear.analyze(torchshear.trace(model.eval(), args or (image(),)))


def resolved(model: nn.Module, config, *args: Tensor, criterion: str = "l1"):
    return resolve(model, parse_config(config), analysed(model, *args), criterion)


def row_of(found, layer: str):
    return next(row for row in found.rows if row.layer == layer)


def test_a_head_named_fc_does_not_exclude_fc1() -> None:
    nni = [{"op_types": ["Linear"], "sparsity": 0.5}, {"op_names": ["fc"], "exclude": True}]
    found = resolved(Heads(), nni)
    assert found.ratios == {"fc1.weight[0]": 0.5}
    assert row_of(found, "fc").reason.startswith("excluded")
    other = {"excluded_op_names": ["fc"], "pattern": "1xchannel", "target_sparsity": 0.5, "pruning_scope": "local"}
    assert resolved(Heads(), other).ratios.keys() == {"conv.weight[0]", "conv2.weight[0]", "fc1.weight[0]"}


def test_a_ratio_by_layer_is_one_of_its_group() -> None:
    config = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["one"], "sparsity": 0.25}]
    found = resolved(Residual(), config)
    assert found.ratios == {"stem.weight[0]": 0.5, "one.weight[0]": 0.25}
    assert found.layer_ratios == {"stem": 0.5, "one": 0.25, "two": 0.5}
    plan = torchshear.plan(analysed(Residual()), ratio=found.ratios)
    assert {name: len(kept) for name, kept in plan.kept.items()} == {"stem.weight[0]": 4, "one.weight[0]": 12}


def test_coupled_layers_lose_what_they_have_in_common() -> None:
    config = [{"op_names": ["stem"], "sparsity": 0.3}, {"op_names": ["two"], "sparsity": 0.2}]
    found = resolved(Residual(50), config)
    assert found.ratios == {"stem.weight[0]": 0.2}
    assert row_of(found, "stem").only_masked == pytest.approx(0.1)
    assert "coupled with 'two', of which 0.2 is to go: 0.1 could only be masked" in row_of(found, "stem").reason
    assert row_of(found, "two").only_masked == 0
    plan = torchshear.plan(analysed(Residual(50)), ratio=found.ratios)
    assert len(plan.kept["stem.weight[0]"]) == 40


def test_a_coupled_layer_that_is_not_configured_keeps_the_group_whole() -> None:
    config = [{"op_names": ["stem", "one"], "sparsity": 0.5}]
    found = resolved(Residual(), config)
    assert found.ratios == {"one.weight[0]": 0.5}
    assert row_of(found, "stem").reason == "stays whole: it is coupled with 'two', which no entry configures"
    assert row_of(found, "stem").only_masked == 0.5


@pytest.mark.parametrize(("place", "conv"), [(0, 0.5), (1, None), (2, None)])
def test_exclusion_holds_for_the_entries_before_it(place: int, conv: float | None) -> None:
    """As in NNI 1 and 2, where the last entry that means a layer counts."""
    config = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["conv2"], "sparsity": 0.25}]
    config.insert(place, {"op_names": ["conv"], "exclude": True})
    found = resolved(Heads(), config)
    assert found.ratios == {"conv2.weight[0]": 0.25, **({} if conv is None else {"conv.weight[0]": conv})}
    idle = "config_list[0]: excludes nothing: entries behind it select its layers again, and these count"
    assert found.notes == (() if place else (idle,))


@pytest.mark.parametrize("group", [1, "1", 0])
def test_groups_of_layers_are_numbers_or_texts(group: object) -> None:
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "global_group_id": group, "dependency_group_id": group}]
    (entry,) = parse_config(config)
    assert entry.pool == str(group)
    with pytest.raises(ArgumentError, match="global_group_id=True; expected a text or an integer"):
        parse_config([{**config[0], "global_group_id": True}])


def test_norms_are_layers_of_their_own() -> None:
    found = resolved(Heads(), [{"op_types": ["BatchNorm2d"], "total_sparsity": 0.5}], criterion="bn_scale")
    assert found.ratios == {"conv.weight[0]": 0.5}
    assert row_of(found, "norm").criterion == "bn_scale"


CONVS, CONV2, NORMS = {"op_types": ["Conv2d"]}, {"op_names": ["conv2"]}, {"op_types": ["BatchNorm2d"]}
BROAD = [{**CONVS, "sparsity": 0.5}, {**CONV2, "sparsity": 0.25}]
EXACT = [{**CONV2, "sparse_ratio": 0.25}, {**CONVS, "sparse_ratio": 0.5}]
WITHOUT = {"op_names": ["conv"], "exclude": True}
# What a config asks of the groups of convolutions and of the hidden layer.
RATIOS = {
    "depthwise layers and norms follow": ([{"op_names": ["conv"], "sparsity": 0.5}], {"conv": 0.5}),
    "a group with an excluded layer": (
        [{"op_names": ["conv", "conv2"], "sparsity": 0.5}, {"op_names": ["deep"], "exclude": True}],
        {"conv2": 0.5},
    ),
    "an entry behind an exclusion": ([{**CONVS, "exclude": True}, BROAD[1]], {"conv2": 0.25}),
    "an exclusion of version 3 in front": ([WITHOUT, EXACT[1]], {"conv2": 0.5}),
    "an exclusion of version 3 behind": ([EXACT[1], WITHOUT], {"conv2": 0.5}),
    "the last entry counts": (BROAD, {"conv": 0.5, "conv2": 0.25}),
    "the first entry counts in version 3": (EXACT, {"conv": 0.5, "conv2": 0.25}),
    "a smaller selection is an override too": (
        [{"op_types": ["Conv2d", "Linear"], "sparsity": 0.5}, {"op_types": ["Linear"], "sparsity": 0.25},
         {"op_names": ["fc"], "exclude": True}],
        {"conv": 0.5, "conv2": 0.5, "fc1": 0.25},
    ),
    "two claims that ask the same": (
        [{"op_partial_names": ["conv"], "sparsity": 0.5}, BROAD[0]],
        {"conv": 0.5, "conv2": 0.5},
    ),
    "an excluded norm follows convolutions": ([BROAD[0], {**NORMS, "exclude": True}], {"conv": 0.5, "conv2": 0.5}),
    "excluded convolutions follow a norm": (
        [{"op_names": ["norm"], "sparsity": 0.5}, {**CONVS, "exclude": True}],
        {"conv": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RATIOS)
def test_ratios_of_groups(name: str) -> None:
    config, expected = RATIOS[name]
    assert resolved(Heads(), config).ratios == {f"{layer}.weight[0]": ratio for layer, ratio in expected.items()}


UNMATCHED = [
    ([BROAD[0], {**CONVS, "exclude": True}, BROAD[1]], r"config_list\[0\] is left without layers"),
    (BROAD[::-1], r"layer 'conv2' is claimed by config_list\[0\] and config_list\[1\]"),
    (EXACT[::-1], r"'conv2' is claimed by config_list\[0\] and config_list\[1\]"),
    ([{"op_partial_names": [n], "sparsity": r} for n, r in (("conv", 0.5), ("n", 0.25))], "is claimed by"),
    (
        [{"op_names": [n], "target_sparsity": r} for n, r in (("conv.*", 0.5), ("conv2", 0.4))],
        r"'conv2' .*pruning_configs\[0\] and pruning_configs\[1\]",
    ),
    (
        [{"op_names": ["conv"], "sparsity": 0.5}, {"op_partial_names": ["conv"], "exclude": True}],
        r"_list\[0\] .*_list\[1\]",
    ),
    ({"op_names": ["fc"], "pattern": "1xchannel"}, r"'fc': fc.weight\[0\] is fixed: model output 0"),
    ({"op_names": ["onv"], "pattern": "1xchannel"}, "the pattern 'onv' fits no layer.*only part of 'conv'"),
    ({"op_types": ["Conv2D"], "sparsity": 0.5}, r"config_list\[0\]: the type 'Conv2D'.*Close to it: Conv2d"),
    ({"op_names": ["conv22"], "sparsity": 0.5}, r"the name 'conv22' fits no layer.*Close to it: conv2"),
    ({"op_partial_names": ["block"], "sparsity": 0.5}, r"the part of a name 'block' fits no layer"),
    ({"op_types": ["Conv2d"], "op_names": ["fc"], "sparsity": 0.5}, r"config_list\[0\] selects no layer"),
    ({"op_types": ["Conv2d"], "sparse_ratio": 0.5, "exclude_op_names": ["con"]}, "the excluded name 'con'"),
    ({"op_types": ["Conv2d"], "sparse_ratio": 0.5, "exclude_op_types": ["Linea"]}, "the excluded type 'Linea'"),
    ({"op_types": ["Conv2d"], "sparse_ratio": 0.5, "exclude_op_names_re": ["x.*"]}, "the excluded pattern 'x"),
    ({"op_names": ["fcc"], "exclude": True}, r"the name 'fcc' fits no layer of the model\. Close to it: fc"),
    ({"op_types": ["Conv2d"], "sparsity": 0.0}, r"nothing that the config asks for can be removed\. 'conv"),
    ({"op_types": ["Conv2d"], "exclude": True}, "can be removed: its entries leave out layers and choose none"),
]


@pytest.mark.parametrize(("config", "message"), UNMATCHED, ids=[message for _, message in UNMATCHED])
def test_words_that_fit_nothing_or_contradict(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        resolved(Heads(), config if isinstance(config, list) else [config])


def test_names_of_modules_that_hold_others() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), nn.Conv2d(8, 2, 1))
    with pytest.raises(ArgumentError, match=r"only holds others, as '0\.0'"):
        resolved(model, [{"op_names": ["0"], "sparsity": 0.5}])
    with pytest.raises(ArgumentError, match="has no parameters"):
        resolved(model, [{"op_names": ["0.1"], "sparsity": 0.5}])


def test_input_channels_are_those_of_the_layer_before() -> None:
    config = [{"op_names": ["two"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    found = resolved(Residual(), config)
    assert found.ratios == {"one.weight[0]": 0.5}
    shared = [{"op_names": ["one"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    with pytest.raises(ArgumentError, match="coupled with 'head', which no entry configures"):
        resolved(Residual(), shared)


def test_rows_of_heads_are_cut_once() -> None:
    model, tokens = Attention(), torch.randn(2, 5, 24)
    found = resolved(model, [{"op_names": ["qkv"], "sparsity": 0.4}], tokens)
    assert found.ratios == {"qkv.weight[0]": 0.4}
    heads = resolved(model, [{"op_names": ["qkv"], "pattern": "mha", "target_sparsity": 0.4}], tokens)
    assert heads.ratios == {"qkv.weight[0]": 0.4}
    with pytest.raises(ArgumentError, match="makes no attention heads"):
        resolved(Residual(), [{"op_names": ["one"], "pattern": "mha"}])


def test_balanced_groups_and_tied_weights() -> None:
    found = resolved(Grouped(), [{"op_types": ["Conv2d"], "sparsity": 0.5}])
    assert found.ratios == {"one.weight[0]": 0.5, "two.weight[0]": 0.5}
    tokens = torch.zeros(2, 4, dtype=torch.long)
    found = resolved(Tied(), [{"op_types": ["Linear"], "sparsity": 0.5}], tokens)
    assert found.ratios == {"hidden.weight[0]": 0.5}
    assert "embedding.weight[0] is fixed" in row_of(found, "head").reason
    found = resolved(Tied(), [{"op_types": ["Embedding", "Linear"], "sparsity": 0.5}], tokens)
    assert found.ratios == {"embedding.weight[1]": 0.5, "hidden.weight[0]": 0.5}


def test_parametrized_layers_keep_their_names() -> None:
    model = Heads()
    parametrizations.weight_norm(model.conv2)
    found = resolved(model, [{"op_types": ["Conv2d"], "sparsity": 0.5}])
    assert row_of(found, "conv2").type_name == "Conv2d"
    assert found.ratios.keys() >= {"conv.weight[0]"}
    assert len(found.ratios) == 2


def test_single_weights_need_no_groups() -> None:
    entries = parse_config([{"op_types": ["default"], "sparse_ratio": 0.5, "granularity": [1, 1]}])
    found = resolve(Heads(), entries)
    assert found.weight_ratios.keys() == {f"{n}.weight" for n in ("conv", "deep", "conv2", "fc1", "fc")}
    with pytest.raises(ArgumentError, match="removes channels of 'conv'.*groups="):
        resolve(Heads(), parse_config([{"op_types": ["Conv2d"], "sparsity": 0.5}]))
    with pytest.raises(ArgumentError, match="outputs"):
        resolve(Heads(), parse_config([{"pattern": "1x1"}]))


def test_layers_that_masks_do_not_know_are_skipped() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.LSTM(3, 4)
            self.head = parametrizations.weight_norm(nn.Linear(4, 2))
            self.other = nn.Linear(4, 2)

    found = resolve(Recurrent(), parse_config([{"op_types": ["default"], "sparsity": 0.5}]), pattern="1x1")
    assert found.weight_ratios == {"other.weight": 0.5}
    assert row_of(found, "steps").reason == "how a LSTM keeps its weights is not known to masks"
    assert "its weight is computed" in row_of(found, "head").reason
    tied = resolve(Tied(), parse_config([{"op_names": ["head"], "sparsity": 0.5}]), pattern="1x1")
    assert tied.weight_ratios == {"head.weight": 0.5}


def test_a_pattern_that_is_a_name_is_that_name() -> None:
    model = nn.Module()
    model.add_module("inner", nn.ModuleDict({"c": nn.Linear(2, 2)}))
    model.add_module("innerXc", nn.Linear(2, 2))
    entries = parse_config([{"op_names_re": ["inner.c"], "sparse_ratio": 0.5, "granularity": [1, 1]}])
    assert resolve(model, entries).weight_ratios.keys() == {"inner.c.weight"}


def test_kv_heads_take_the_ratio_of_all_projections() -> None:
    class Grouped4(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, n, bias=False) for n in (32, 16, 16))
            self.o = nn.Linear(32, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q = self.q(x).reshape(b, n, 8, 4).transpose(1, 2)
            k, v = (p(x).reshape(b, n, 4, 4).transpose(1, 2).repeat_interleave(2, 1) for p in (self.k, self.v))
            return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 32))

    config = [{"op_names": ["q", "k", "v"], "sparsity": 0.5}]
    groups = analysed(Grouped4(), torch.randn(2, 5, 16))
    found = resolve(Grouped4(), parse_config(config), groups, "l1")
    assert [groups[name].role for name in found.ratios] == ["kv_heads"]
    plan = torchshear.plan(groups, "l1", found.ratios)
    assert plan.state["q.weight"].new_shape == (16, 16)
    assert plan.state["k.weight"].new_shape == (8, 16)


def test_layers_that_make_outputs_are_left_whole() -> None:
    found = resolved(Heads(), [{"pattern": "1x1", "pruning_type": "magnitude"}])
    assert "fc.weight" not in found.weight_ratios
    assert "fc1.weight" in found.weight_ratios
    assert row_of(found, "fc").reason == "it makes an output of the model"


def test_the_table_says_all_of_it() -> None:
    config = [{"op_types": ["Conv2d"], "total_sparsity": 0.5}, {"op_names": ["fc"], "exclude": True}]
    found = resolved(Heads(), config)
    text = str(found)
    for word in ("conv2.weight[0]", "config_list[0]", "l1", "50.0%", "no entry selects it", "excluded"):
        assert word in text
    assert "config_list[0]: 50.0% of all its layers together, each layer 0.0% to 99.0%" in text
    assert found.to_dict()["rows"][0]["groups"] == ["conv.weight[0]"]


def test_model_and_config_are_left_alone() -> None:
    model = Heads()
    before = copy.deepcopy(model.state_dict())
    config = [{"op_types": ["Conv2d"], "sparsity": 0.5}]
    resolved(model, config)
    assert config == [{"op_types": ["Conv2d"], "sparsity": 0.5}]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
