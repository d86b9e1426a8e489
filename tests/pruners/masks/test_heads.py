"""Heads are scored and masked with all their rows and columns."""

import copy

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import Attention, Net, Residual, Separate, image, randomise
from torchshear.errors import ArgumentError, MaskError
from torchshear.pruners import masks as m

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))


def analysed(net: nn.Module, x: Tensor = X) -> object:
    return torchshear.analyze(torchshear.trace(net, (x,)))


@pytest.mark.parametrize("is_fused", [True, False])
def test_score_and_masks_as_by_hand(is_fused: bool) -> None:
    net = randomise(Attention(16, 4) if is_fused else Separate(4, 4, 6))
    inner = 4 if is_fused else 6
    if is_fused:
        rows = list(net.qkv.weight.detach().abs().reshape(3, 4, inner, 16))
        columns = net.proj.weight.detach().abs().reshape(16, 4, inner)
    else:
        rows = [layer.weight.detach().abs().reshape(4, inner, 16) for layer in (net.q, net.k, net.v)]
        columns = net.out.weight.detach().abs().reshape(16, 4, inner)
    scores = (sum(one.mean((1, 2)) for one in rows) + columns.mean((0, 2))) / 4
    (gone,) = scores.argsort()[:1].tolist()
    masks = m.choose_masks(net, "heads", 0.3, groups=analysed(net))
    for name, mask in masks.tensors.items():
        if name in ("proj.weight", "out.weight"):
            lost = (~mask).reshape(16, 4, inner)
            assert lost[:, gone].all()
            assert lost.sum() == 16 * inner
        else:
            lost = (~mask).reshape(-1, 4, inner, *mask.shape[1:])
            assert lost[:, gone].all()
            assert lost.sum() == lost[:, gone].numel()
    assert len(masks.tensors) == (3 if is_fused else 7), "biases of queries, keys and values too"
    (report,) = masks.layers
    assert (report.n_units, report.n_masked, report.achieved) == (4, 1, 0.25)


def test_other_reductions_and_scores() -> None:
    net = randomise(Separate(4, 4, 6))
    groups = analysed(net)
    net.v.weight.data[13, 2] = 100.0  # of head 2
    for reduce in ("max", "sum"):
        masks = m.choose_masks(net, "heads", 0.75, groups=groups, reduce=reduce)
        assert masks.tensors["v.weight"].any(1).nonzero().flatten().tolist() == list(range(12, 18))
    ones = {name: torch.ones_like(net.get_submodule(name).weight) for name in ("q", "k", "v", "out")}
    ones["k"][:6] = 0
    masks = m.choose_masks(net, "heads", 0.25, groups=groups, score=ones)
    assert (~masks.tensors["q.weight"]).any(1).nonzero().flatten().tolist() == list(range(6))


def test_one_attention_keeps_a_head_in_a_global_choice() -> None:
    net = randomise(nn.Sequential(Separate(4, 4, 6), Separate(4, 4, 6), Separate(4, 4, 6)))
    with torch.no_grad():
        for parameter in net[1].parameters():
            parameter.mul_(1e-3)
    masks = m.choose_masks(net, "heads", 0.5, groups=analysed(net), scope="global")
    assert [layer.n_masked for layer in masks.layers][1] == 3, "max_ratio leaves one"
    assert sum(layer.n_masked for layer in masks.layers) == 6


def test_gradual() -> None:
    net = randomise(Separate(4, 4, 6))
    groups = analysed(net)
    first = m.choose_masks(net, "heads", 0.25, groups=groups)
    m.apply(net, first)
    second = m.choose_masks(net, "heads", 0.5, groups=groups, previous=first)
    assert second.layers[0].n_masked == 2
    assert not (second.tensors["q.weight"] & ~first.tensors["q.weight"]).any()


def test_query_heads_go_with_what_they_read_unless_named() -> None:
    net = randomise(Separate(4, 2))
    groups = analysed(net)
    assert {group.role for group in groups} >= {"q_heads", "kv_heads"}
    (report,) = m.choose_masks(net, "heads", 0.5, groups=groups).layers
    assert groups[report.name].role == "kv_heads"
    name = next(group.name for group in groups if group.role == "q_heads")
    masks = m.choose_masks(net, "heads", 0.5, groups=groups, layers=[name])
    assert masks.layers[0].name == name
    assert "k.weight" not in masks.tensors
    with pytest.raises(ArgumentError, match="layer 'q.heads' is not one that can be masked"):
        m.choose_masks(net, "heads", groups=groups, layers=["q.heads"])


def test_module_of_torch() -> None:

    net = randomise(
        Net(
            lambda m, x: m.attention(x, x, x, need_weights=False)[0],
            attention=nn.MultiheadAttention(16, 4, batch_first=True),
        )
    ).eval()
    masks = m.choose_masks(net, "heads", 0.25, groups=analysed(net))
    assert sorted(masks.tensors) == ["attention.in_proj_bias", "attention.in_proj_weight", "attention.out_proj.weight"]
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in masks.tensors.items():
            twin.get_parameter(name).mul_(mask)
    m.apply(net, masks)
    torch.testing.assert_close(net(X), twin(X))
    with torch.no_grad():  # torch's fused kernel
        torch.testing.assert_close(net(X), twin(X))
    net.train()(X).sum().backward()


def test_networks_without_heads() -> None:
    net = Residual()
    with pytest.raises(MaskError, match="heads; .*channels, residual"):
        m.choose_masks(net, "heads", groups=analysed(net, image()))


def test_layers_that_multiply_in_their_own_way() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    net, plain = Separate(4, 4), randomise(Separate(4, 4))
    net.q, net.out = Own(16, 24), Own(24, 16)
    net.load_state_dict(plain.state_dict())
    masks, expected = (m.choose_masks(one, "heads", 0.5, groups=analysed(one)) for one in (net, plain))
    assert masks.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(mask, expected.tensors[name]) for name, mask in masks.tensors.items())


def test_heads_that_no_projection_holds() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Parameter(torch.randn(4, 1, 16)), nn.Parameter(torch.randn(4, 1, 16))

        def forward(self, x: Tensor) -> Tensor:
            q, k = x[:, None] * self.q, x[:, None] * self.k
            return nn.functional.scaled_dot_product_attention(q, k, k).sum(1)

    with pytest.raises(MaskError, match="fits none of 1 layers: .*no projection holds its heads"):
        m.choose_masks(Scaled(), "heads", groups=analysed(Scaled()))


def test_the_groups_are_those_of_the_model() -> None:
    with pytest.raises(MaskError, match="'q.weight' has another shape"):
        m.choose_masks(Separate(2, 2), "heads", groups=analysed(Separate(4, 4)))
