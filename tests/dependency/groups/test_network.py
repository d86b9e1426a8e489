"""The NetworkX view: what it says of each node and edge, and that any format takes it."""

import io
import json
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.inspection.hostile import hostile_groups
from tests.networks import Attention, Between, Grouped, Residual, Tied, image
from torchshear.dependency import ChannelGroups
from torchshear.dependency.groups._network import Value


class Auxiliary(nn.Module):
    """A head that only training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Two values a sample, twice in training."""
        x = torch.relu(self.body(x))
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


MODELS = {
    "residual": (Residual(), image()),
    "grouped": (Grouped(), image()),
    "attention": (Attention(), torch.randn(2, 5, 24)),
    # Two edges between the same nodes.
    "square": (Between(lambda h: h * h, nn.Linear(3, 6), nn.Linear(6, 2)), torch.randn(2, 3)),
    "tied": (Tied(), torch.randint(0, 20, (2, 7))),
}


@pytest.fixture(params=MODELS)
def groups(request: pytest.FixtureRequest) -> ChannelGroups:
    model, x = MODELS[request.param]
    return torchshear.analyze(torchshear.trace(model, (x,)))


def assert_same(left: nx.MultiDiGraph, right: nx.MultiDiGraph) -> None:
    """Nodes, edges and attributes are equal; of what a format adds nothing is asked."""
    __tracebackhide__ = True
    assert list(left.nodes) == list(right.nodes)
    for node, attributes in left.nodes(data=True):
        assert attributes.items() <= right.nodes[node].items()
    wanted = sorted((u, v, d["operand"], d["groups"], d["axes"]) for u, v, d in left.edges(data=True))
    assert wanted == sorted((u, v, d["operand"], d["groups"], d["axes"]) for u, v, d in right.edges(data=True))


def through_graphml(network: nx.MultiDiGraph) -> nx.MultiDiGraph:
    stream = io.BytesIO()
    nx.write_graphml_xml(network, stream)
    return nx.read_graphml(io.BytesIO(stream.getvalue()), force_multigraph=True)


def through_gexf(network: nx.MultiDiGraph) -> nx.MultiDiGraph:
    stream = io.BytesIO()
    nx.write_gexf(network, stream)
    return nx.read_gexf(io.BytesIO(stream.getvalue()))


def through_json(network: nx.MultiDiGraph) -> nx.MultiDiGraph:
    return nx.node_link_graph(json.loads(json.dumps(nx.node_link_data(network, edges="edges"))), edges="edges")


@pytest.mark.parametrize("through", [through_graphml, through_gexf, through_json])
def test_formats_take_the_network_as_it_is(groups: ChannelGroups, through) -> None:
    network = groups.to_networkx()
    assert_same(network, through(network))


@pytest.mark.parametrize("through", [through_graphml, through_gexf, through_json])
def test_formats_take_hostile_names(tmp_path: Path, through) -> None:
    network = hostile_groups(tmp_path).to_networkx()
    back = through(network)
    assert list(back.nodes) == list(network.nodes)
    names = {json.loads(data["groups"])[0] for _, data in back.nodes(data=True) if json.loads(data["groups"])}
    assert any("\x01" in name for name in names)  # in a list names stand as they are
    assert not any("\x01" in data["module"] for _, data in back.nodes(data=True))


def test_weights_carry_the_groups_whose_members_they_are(groups: ChannelGroups) -> None:
    expected: dict[str, dict[int, set[str]]] = {}
    for group in groups:
        for member in group.members:
            expected.setdefault(member.name, {}).setdefault(member.dim, set()).add(group.name)
    seen = set()
    for _, data in groups.to_networkx().nodes(data=True):
        if data["kind"] == "parameter":
            found = {dim: set(names) for dim, names in enumerate(json.loads(data["axes"])) if names}
            assert found == expected.get(data["parameter"], {}), data["parameter"]
            seen.add(data["parameter"])
    assert {name for name in expected if groups.graph.state[name].kind == "parameter"} <= seen


def test_fixed_dimensions_say_why(groups: ChannelGroups) -> None:
    reasons = {
        data["parameter"]: json.loads(data["fixed"])
        for _, data in groups.to_networkx().nodes(data=True)
        if data["parameter"]
    }
    for fixed in groups.fixed:
        assert reasons[fixed.name][fixed.dim] == fixed.reason


def test_attributes_name_operator_module_line_and_shape() -> None:
    network = torchshear.analyze(torchshear.trace(Attention(), (torch.randn(2, 5, 24),))).to_networkx()
    linear = network.nodes["linear"]
    assert (linear["operator"], linear["module"], linear["label"]) == ("aten.linear.default", "qkv", "linear")
    assert linear["source"].startswith("attention.py:")
    assert json.loads(linear["shape"]) == ["batch", 5, 72]
    assert json.loads(linear["axes"]) == [[], [], ["qkv.weight[0]", "qkv.weight[0]#2"]]
    assert linear["group"] == "qkv.weight[0]"
    weight = network.nodes["qkv_weight"]
    assert (weight["kind"], weight["parameter"], weight["module"]) == ("parameter", "qkv.weight", "qkv")
    unbind = network.nodes["unbind"]
    assert json.loads(unbind["shape"]) == [["batch", 3, 5, 8]] * 3
    assert json.loads(unbind["axes"]) == [[[], ["qkv.weight[0]"], [], ["qkv.weight[0]#2"]]] * 3
    assert network.nodes["getitem"]["operator"] == "getitem"
    attention = network.nodes["scaled_dot_product_attention"]
    assert attention["mixed"]
    assert network.edges["qkv_weight", "linear", 0]["operand"] == 1
    assert json.loads(network.edges["qkv_weight", "linear", 0]["groups"]) == ["qkv.weight[0]", "qkv.weight[0]#2"]


def test_training_has_a_network_of_its_own_where_it_reads_more() -> None:
    groups = torchshear.analyze(torchshear.trace(Auxiliary(), (torch.randn(2, 4),)))
    tensors = {
        mode: {data["parameter"] for _, data in groups.to_networkx(mode).nodes(data=True)} for mode in ("eval", "train")
    }
    assert tensors["train"] - tensors["eval"] == {"extra.weight", "extra.bias"}


def test_blocked_weight_carries_the_groups_of_all_its_blocks() -> None:
    values = {v.state: v for v in torchshear.analyze(torchshear.trace(Grouped(), (image(),))).describe() if v.state}
    value: Value = values["two.weight"]
    assert [dim.groups for dim in value.tensors[0]] == [(1,), (0,), (), ()]
    assert value.tensors[0][1].size == 4
