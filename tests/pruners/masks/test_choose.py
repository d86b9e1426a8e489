"""Masks against naive loops over weights, for every pattern and every kind of layer."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.networks import Tied, randomise
from torchshear.errors import ArgumentError, MaskError, WeightError
from torchshear.pruners import masks as m
from torchshear.pruners.masks import _layers

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 12),
    "conv1d": lambda: nn.Conv1d(8, 12, 3),
    "conv2d": lambda: nn.Conv2d(8, 12, (3, 2)),
    "conv3d": lambda: nn.Conv3d(4, 8, 2),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(8, 12, 3),
    "grouped_transposed": lambda: nn.ConvTranspose1d(8, 12, 3, groups=2),
}


def places(layer: nn.Module) -> dict[tuple[int, int, int], tuple[int, ...]]:
    """(output, tap, input) -> index in the weight, by hand; inputs and outputs counted over all groups."""
    weight = layer.weight
    groups = getattr(layer, "groups", 1)
    found = {}
    for index in itertools.product(*map(range, weight.shape)):
        tap = 0
        for size, i in zip(weight.shape[2:], index[2:], strict=True):
            tap = tap * size + i
        if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
            group = index[0] // (weight.shape[0] // groups)
            found[group * weight.shape[1] + index[1], tap, index[0]] = index
        else:
            group = index[0] // (weight.shape[0] // groups)
            found[index[0], tap, group * weight.shape[1] + index[1]] = index
    return found


def units_of(layer: nn.Module, pattern: str) -> list[list[tuple[int, ...]]]:
    """Indices of the weights of each unit, in the order in which units are counted."""
    units: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    n_inputs = max(i for _, _, i in places(layer)) + 1
    for (output, tap, i), index in sorted(places(layer).items()):
        own = i % (n_inputs // getattr(layer, "groups", 1))  # inputs are counted inside a group
        if pattern == "channelx1":
            key: tuple[int, ...] = (i,)
        elif pattern == "1xchannel":
            key = (output,)
        else:
            rows, columns = map(int, pattern.split("x"))
            key = (output // rows, tap, own // columns)
        units.setdefault(key, []).append(index)
    return [units[key] for key in sorted(units)]


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("pattern", ["1x1", "4x1", "1x2", "2x4", "channelx1", "1xchannel"])
@pytest.mark.parametrize("kind", LAYERS)
def test_units_as_by_hand(kind: str, pattern: str, reduce: str) -> None:
    layer = randomise(LAYERS[kind]()).double()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.mul(4).round())  # many ties
    if pattern in ("1x2", "2x4") and kind == "depthwise":
        with pytest.raises(MaskError, match="none of 1 layers: '' .*: 1 inputs"):
            m.choose_masks(layer, pattern)
        return
    masks = m.choose_masks(layer, pattern, 0.4, reduce=reduce)
    units, weight = units_of(layer, pattern), layer.weight.detach()
    combine = {"mean": lambda v: sum(v) / len(v), "sum": sum, "max": max}[reduce]
    scores = [combine([abs(float(weight[i])) for i in unit]) for unit in units]
    n_cut = int(len(units) * 0.4 + 1e-9)
    gone = sorted(range(len(units)), key=lambda u: (round(scores[u], 9), -u))[:n_cut]
    expected = torch.ones(layer.weight.shape, dtype=torch.bool)
    for index in (index for unit in gone for index in units[unit]):
        expected[index] = False
    assert torch.equal(masks.tensors["weight"], expected)
    assert ("bias" in masks.tensors) is (pattern == "1xchannel")
    if pattern == "1xchannel":
        assert (~masks.tensors["bias"]).nonzero().flatten().tolist() == sorted(gone)
    (report,) = masks.layers
    assert (report.n_units, report.n_masked, report.requested) == (len(units), n_cut, 0.4)
    assert report.achieved == pytest.approx(1 - expected.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "6:8"])
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "depthwise"])
def test_exactly_n_of_m_also_on_ties(kind: str, pattern: str) -> None:
    layer = LAYERS[kind]()
    n, of = map(int, pattern.split(":"))
    per_group = places(layer)
    inputs = len({i for o, _, i in per_group if o == 0})
    nn.init.constant_(layer.weight, 1.0)
    if inputs % of:
        with pytest.raises(MaskError, match=f"{inputs} inputs .* of {of}"):
            m.choose_masks(layer, pattern, n / of)
        return
    mask = m.choose_masks(layer, pattern, n / of).tensors["weight"]
    for _, run in runs(layer, of):
        assert [bool(mask[index]) for index in run] == [True] * (of - n) + [False] * n, "the later ones go"
    randomise(layer)
    mask = m.choose_masks(layer, pattern, n / of).tensors["weight"]
    for _, run in runs(layer, of):
        values = [abs(float(layer.weight.detach()[index])) for index in run]
        gone = {i for i in range(of) if not mask[run[i]]}
        assert gone == set(sorted(range(of), key=values.__getitem__)[:n])


def runs(layer: nn.Module, of: int) -> list[tuple[tuple[int, int, int], list[tuple[int, ...]]]]:
    """M consecutive inputs of one output at one tap."""
    found: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}
    for (output, tap, i), index in sorted(places(layer).items()):
        found.setdefault((output, tap, i // of), []).append(index)
    return sorted(found.items())


def test_gradual_share_of_groups() -> None:
    layer = randomise(nn.Linear(16, 6))
    masks = m.choose_masks(layer, "2:4", 0.25)  # int(24 groups * .25 * 4 / 2)
    assert (masks.layers[0].n_units, masks.layers[0].n_masked, masks.layers[0].achieved) == (24, 12, 0.25)
    weight, mask = layer.weight.detach().abs().reshape(-1, 4), masks.tensors["weight"].reshape(-1, 4)
    lost = weight.sort(dim=1).values[:, :2].sum(1)  # of the weights that would go
    assert set(lost.argsort()[:12].tolist()) == set((~mask).any(1).nonzero().flatten().tolist())
    assert ((~mask).sum(1) == 2).sum() == 12
    final = m.choose_masks(layer, "2:4", 0.5, previous=masks)
    assert (final.tensors["weight"].reshape(-1, 4).sum(1) == 2).all()
    assert not (final.tensors["weight"] & ~masks.tensors["weight"]).any()


def test_level() -> None:
    layer = nn.Linear(5, 2, bias=False)
    assert (~m.choose_masks(layer, ratio=0.35).tensors["weight"]).sum() == 3
    layer.weight.data.copy_(torch.tensor([[1.0, 1, 1, 2, 2], [2, 2, 2, 2, 2]]))
    assert (~m.choose_masks(layer, ratio=0.1).tensors["weight"]).nonzero().tolist() == [[0, 2]]


def test_filters_and_channels_of_convolutions_are_whole() -> None:
    net = randomise(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)))
    rows = m.choose_masks(net, "1xchannel", 0.5, scope="global")
    assert sum(int((~mask.flatten(1).any(1)).sum()) for n, mask in rows.tensors.items() if n.endswith("weight")) == 16
    assert all(len({int(r.sum()) for r in mask.flatten(1)}) <= 2 for n, mask in rows.tensors.items() if "weight" in n)
    columns = m.choose_masks(net[1], "channelx1", 0.5).tensors["weight"]
    assert (~columns.any(0).any(1).any(1)).sum() == 8


def test_layers_that_do_not_fit_are_reported_and_not_counted() -> None:
    net = randomise(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 4)))
    for scope in ("local", "global"):
        masks = m.choose_masks(net, "4x1", 0.5, scope=scope)
        assert [layer.note for layer in masks.layers] == [
            "skipped: 6 outputs cannot be divided into blocks of 4",
            "",
            "",
        ]
        assert set(masks.tensors) == {"1.weight", "2.weight"}
        assert sum(layer.n_masked for layer in masks.layers) == 10, "half of 12 and of 8 units"
    assert "skipped" in m.choose_masks(net, "2:4", 0.5).layers[1].note


def test_global_ranks_layers_against_one_another() -> None:
    net = nn.Sequential(nn.Linear(16, 12, bias=False), nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False))
    for number, layer in enumerate(net):
        nn.init.uniform_(layer.weight, number + 0.1, number + 1)

    def lost(**options: object) -> list[int]:
        return [layer.n_masked for layer in m.choose_masks(net, "1x1", 0.6, **options).layers]

    assert lost() == [115, 115, 115]
    assert lost(scope="global") == [188, 157, 0]
    assert lost(scope="global", max_ratio=0.8) == [153, 153, 39]
    assert lost(scope="global", min_ratio=0.3) == [188, 100, 57]
    assert lost(scope="global", min_ratio=0.6, max_ratio=0.6) == [115, 115, 115]
    step = m.choose_masks(net, "1x1", 0.4, scope="global", min_ratio=0.3, final_ratio=0.6)
    assert [layer.n_masked for layer in step.layers] == [188, 42, 0], "the minimum is reserved, not due yet"
    capped = m.choose_masks(net, "1x1", 0.6, scope="global", max_ratio=0.5)
    assert [layer.n_masked for layer in capped.layers] == [96, 96, 96]
    assert "max_ratio" in capped.layers[0].note


def test_global_limits_of_n_of_m_are_in_weights() -> None:
    net = randomise(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16)))
    net[0].weight.data.mul_(1e-3)
    masks = m.choose_masks(net, "2:4", 0.25, scope="global")
    assert [layer.achieved for layer in masks.layers] == [0.5, 0.0], "all groups of the first are switched"
    masks = m.choose_masks(net, "2:4", 0.25, scope="global", max_ratio=0.375)
    assert [layer.achieved for layer in masks.layers] == [0.375, 0.125]


def test_ratio_for_each_layer() -> None:
    net = randomise(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)))
    masks = m.choose_masks(net, layers={"2": 0.2, "0": 0.7})
    assert [(layer.name, layer.achieved) for layer in masks.layers] == [("0", 0.7), ("2", pytest.approx(0.2))]
    masks = m.choose_masks(net, layers={"2": 0.2, "0": 0.7}, scope="global")
    assert sum(layer.n_masked for layer in masks.layers) == 90
    assert set(m.choose_masks(net, layers="1").tensors) == {"1.weight"}


def test_previous_masks_stay_and_count() -> None:
    net = randomise(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    first = m.choose_masks(net, "1x1", 0.25)
    randomise(net, seed=5)
    second = m.choose_masks(net, "1x1", 0.5, previous=first)
    for name, mask in second.tensors.items():
        assert (~mask).sum() == 32
        assert not (mask & ~first.tensors[name]).any()
    again = m.choose_masks(net, "1x1", 0.1, previous=second)
    assert all(torch.equal(again.tensors[name], second.tensors[name]) for name in second.tensors)
    assert again.layers[0].note == "as many were masked before"
    assert (again.layers[0].n_masked, again.layers[0].achieved) == (32, 0.5)
    other = m.choose_masks(net, "1xchannel", 0.5, previous=second)
    assert not (other.tensors["0.weight"] & ~second.tensors["0.weight"]).any()
    assert (other.tensors["0.weight"].any(1)).sum() <= 4


def test_scores() -> None:
    net = randomise(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    with pytest.raises(ArgumentError, match="call backward on a loss first"):
        m.choose_masks(net, score="snip")
    net(torch.randn(5, 6, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    for name, value in (
        ("gradient", lambda p: p.grad.abs()),
        ("snip", lambda p: (p * p.grad).abs()),
        ("magnitude", lambda p: p.abs()),
    ):
        by_name = m.choose_masks(net, score=name).tensors
        given = {layer: value(net[int(layer)].weight).detach() for layer in "02"}
        by_mapping = m.choose_masks(net, score=given).tensors
        by_function = m.choose_masks(net, score=lambda layer, weight, given=given: given[layer]).tensors
        for key, mask in by_name.items():
            goes = value(net.get_parameter(key)).flatten().argsort(stable=True)[: mask.numel() // 2]
            if name == "magnitude":
                assert set((~mask).flatten().nonzero().flatten().tolist()) == set(goes.tolist())
            assert torch.equal(mask, by_mapping[key])
            assert torch.equal(mask, by_function[key])
    net[2].weight.grad = None
    assert (~m.choose_masks(net, score="snip").tensors["2.weight"]).sum() == 6, "no gradient counts as zeros"


def test_tied_weights_are_one_layer() -> None:
    net = Tied()
    masks = m.choose_masks(net, "2:4", 0.5)
    assert sorted(masks.tensors) == ["back.weight", "head.weight", "hidden.weight"]
    assert set(m.choose_masks(net, layers=["embedding"]).tensors) == {"head.weight"}
    with pytest.raises(ArgumentError, match="0.5 and 0.1"):
        m.choose_masks(net, layers={"embedding": 0.5, "head": 0.1})


def test_tables_of_embeddings_are_masked_if_named() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    assert set(m.choose_masks(net).tensors) == {"1.weight"}
    assert (~m.choose_masks(net, layers=["0", "1"]).tensors["0.weight"]).sum() == 20
    assert "table of embeddings" in m.choose_masks(net, "2:4", layers=["0", "1"]).layers[0].note


def test_attention_modules() -> None:
    net = randomise(nn.MultiheadAttention(8, 2))
    masks = m.choose_masks(net, "1xchannel", 0.25)
    assert {name: tuple(mask.shape) for name, mask in masks.tensors.items()} == {
        "in_proj_weight": (24, 8),
        "in_proj_bias": (24,),
        "out_proj.weight": (8, 8),
        "out_proj.bias": (8,),
    }
    assert [layer.name for layer in masks.layers] == ["in_proj", "out_proj"]
    apart = m.choose_masks(randomise(nn.MultiheadAttention(8, 2, kdim=4, vdim=12)), "2:4", 0.5)
    assert [layer.name for layer in apart.layers] == ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert apart.tensors["k_proj_weight"].shape == (8, 4)


def test_conv1d_of_transformers_has_its_inputs_first() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 8)
    randomise(conv1d)
    masks = m.choose_masks(conv1d, "1xchannel", 0.25)
    norms = conv1d.weight.detach().abs().mean(0)
    gone = set(norms.argsort()[:3].tolist())
    assert set((~masks.tensors["weight"].any(0)).nonzero().flatten().tolist()) == gone
    assert set((~masks.tensors["bias"]).nonzero().flatten().tolist()) == gone
    assert (m.choose_masks(conv1d, "2:4").tensors["weight"].reshape(2, 4, 12).sum(1) == 2).all()


def test_layer_types_of_ones_own() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.arange(12.0).reshape(3, 4))

    @m.layer_type(Mixer)
    def mixer(_: nn.Module) -> tuple[m.LayerWeight, ...]:
        return (m.LayerWeight("kernel", None, is_in_first=True),)

    try:
        assert m.choose_masks(Mixer(), "1xchannel", 0.25).tensors["kernel"].tolist() == 3 * [[False, True, True, True]]
        with pytest.raises(ArgumentError, match=r"Mixer' is registered already, as mixer"):
            m.layer_type(Mixer)(mixer)
    finally:
        del _layers._TYPES[_layers._full_name(Mixer)]


def test_computed_weights_are_skipped() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    masks = m.choose_masks(net)
    assert "is computed" in masks.layers[0].note
    assert set(masks.tensors) == {"1.weight"}


@pytest.mark.parametrize("pattern", ["1x1", "2x2", "2:4", "channelx1"])
def test_lock_keeps_the_zeros_of_any_pattern(pattern: str) -> None:
    net = randomise(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 8)))
    masks = m.choose_masks(net, pattern, 0.5)
    m.apply(net, masks)
    assert all(torch.equal(mask, masks.tensors[name]) for name, mask in m.pattern_lock(net).tensors.items())
    m.make_permanent(net)
    locked = m.pattern_lock(net)
    assert all(torch.equal(mask, masks.tensors[name]) for name, mask in locked.tensors.items())
    assert [layer.achieved for layer in locked.layers] == [0.5, 0.5]
    m.apply(net, locked)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net[1](net[0](torch.randn(2, 4, 5, 5)).mean((2, 3))).sum().backward()
        optimizer.step()
        assert all(torch.equal(mask, masks.tensors[n]) for n, mask in m.pattern_lock(net).tensors.items())


def test_nothing_of_the_model_is_changed() -> None:
    net = randomise(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 8))).half()
    before = copy.deepcopy(net.state_dict())
    for pattern in ("1x1", "2:4", "1xchannel"):
        m.choose_masks(net, pattern, scope="global")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


NET = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def nan_scores(_: str, weight: Tensor) -> Tensor:
    return weight * torch.nan


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pattern": "4by1"}, ArgumentError, "pattern='4by1'; expected 'NxM'.* or 'heads'. Close to it: 4x1"),
        ({"pattern": 3}, ArgumentError, "pattern is int; expected"),
        ({"pattern": "0x4"}, ArgumentError, "no weights in a block"),
        ({"pattern": "4:4"}, ArgumentError, "would mask 4 of 4; expected 0 < N < M"),
        ({"pattern": "0:4"}, ArgumentError, "would mask 0 of 4"),
        ({"ratio": 1.0}, ArgumentError, "ratio=1.0; expected a number of at least 0 and below 1"),
        ({"ratio": -0.1}, ArgumentError, "ratio=-0.1"),
        ({"ratio": float("nan")}, ArgumentError, "ratio=nan"),
        ({"ratio": "0.5"}, ArgumentError, "ratio='0.5'"),
        ({"ratio": True}, ArgumentError, "ratio=True"),
        ({"pattern": "2:4", "ratio": 0.6}, ArgumentError, "masks 0.5 of the weights at most"),
        ({"pattern": "2:4", "layers": {"0": 0.9}}, ArgumentError, "ratio=0.9 with pattern '2:4'"),
        ({"min_ratio": 0.9, "max_ratio": 0.8}, ArgumentError, "min_ratio=0.9 is above max_ratio=0.8"),
        ({"min_ratio": 0.7}, ArgumentError, "min_ratio=0.7 is above the ratio 0.5"),
        ({"min_ratio": 0.3, "layers": {"0": 0.2, "1": 0.9}}, ArgumentError, "min_ratio=0.3 is above the ratio 0.2"),
        ({"final_ratio": 0.3}, ArgumentError, "final_ratio=0.3 is below ratio=0.5"),
        ({"final_ratio": 0.9, "layers": {"0": 0.2}}, ArgumentError, "final_ratio goes with one ratio for all layers"),
        ({"scope": "layer"}, ArgumentError, "scope='layer'; expected one of 'local', 'global'"),
        ({"reduce": "median"}, ArgumentError, "reduce='median'; expected one of 'mean', 'sum', 'max'"),
        ({"layers": ["00"]}, ArgumentError, "layer '00' is not one that can be masked.*it has 0, 1.*Close to it: 0"),
        ({"layers": []}, MaskError, "no layer to mask"),
        ({"layers": {"0": 1.5}}, ArgumentError, "ratio of layer '0'=1.5"),
        ({"score": "magnitud"}, ArgumentError, "score='magnitud'.*Close to it: magnitude"),
        ({"score": 3}, ArgumentError, "score is int"),
        ({"score": {"0": torch.ones(8, 8)}}, ArgumentError, "hold nothing for layer '1'"),
        ({"score": {"0": torch.ones(8, 8), "1": torch.ones(8)}}, WeightError, r"have shape \(8,\)"),
        ({"score": lambda name, weight: 1}, WeightError, "have type int"),
        ({"score": nan_scores}, WeightError, "scores of layer '0' are NaN or infinite in 64 places"),
        ({"pattern": "heads"}, ArgumentError, "groups=NoneType; expected the channel groups"),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        m.choose_masks(NET, **options)


def test_bad_models() -> None:
    with pytest.raises(ArgumentError, match="model is list"):
        m.choose_masks([])
    with pytest.raises(MaskError, match="no layer to mask"):
        m.choose_masks(nn.ReLU())
    with pytest.raises(WeightError, match="'0.weight' is on the meta device"):
        m.choose_masks(copy.deepcopy(NET).to("meta"))
    with pytest.raises(WeightError, match="on the meta device"):
        m.pattern_lock(copy.deepcopy(NET).to("meta"))
    with pytest.raises(WeightError, match="'weight' has no shape before the model is run"):
        m.choose_masks(nn.LazyLinear(4))
    broken = copy.deepcopy(NET)
    nn.init.constant_(broken[1].weight, float("nan"))
    with pytest.raises(WeightError, match=r"'1.weight' holds values that are NaN"):
        m.choose_masks(broken)
    with pytest.raises(MaskError, match=r"\(2, 2\) for '0.weight', .*\(8, 8\)"):
        m.choose_masks(NET, previous=m.Masks.of({"0.weight": torch.ones(2, 2, dtype=torch.bool)}))
    with pytest.raises(MaskError, match="'0.wight', .*: 0.weight"):
        m.choose_masks(NET, previous=m.Masks.of({"0.wight": torch.ones(2, 2, dtype=torch.bool)}))
    with pytest.raises(ArgumentError, match="previous is dict"):
        m.choose_masks(NET, previous={})
