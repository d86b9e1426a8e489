"""The fingerprint of a graph: the same for the same network wherever it lives, another for another network."""

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchshear


class Placed(nn.Module):
    """A network whose captured graph differs between devices, though it is the same network."""

    def __init__(self, scale: float = 0.5, size: int = 4) -> None:
        super().__init__()
        self.scale = scale
        self.size = size
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.reshape(x.shape[0], -1, 2, self.size).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k = q.to(torch.float32).to(x.dtype), k.to(x.dtype)
        place = torch.arange(x.shape[1], device=x.device)
        k = torch.cat([torch.tensor([], device=x.device, dtype=x.dtype).reshape(*k.shape[:2], 0, k.shape[3]), k], 2)
        y = functional.scaled_dot_product_attention(q, k, v, place[:, None] >= place, scale=self.scale)
        return self.out(y.transpose(1, 2).contiguous().reshape(x.shape))


def graph_of(model: nn.Module, device: str) -> torchshear.graph.Graph:
    return torchshear.trace(model.to(device), (torch.empty(2, 5, 8, device=device),))


def test_the_device_makes_no_difference() -> None:
    real, meta = graph_of(Placed(), "cpu"), graph_of(Placed(), "meta")
    assert any(torch.device("meta") in node.kwargs.values() for node in meta)
    calls = [[str(node.target) for node in graph] for graph in (real, meta)]
    assert calls[0] != calls[1], "torch.export captures the same calls; the test needs another network"
    assert real.fingerprint == meta.fingerprint


def test_the_type_makes_no_difference() -> None:
    real, half = graph_of(Placed(), "cpu"), torchshear.trace(Placed().bfloat16(), (torch.empty(2, 5, 8).bfloat16(),))
    assert real.fingerprint == half.fingerprint


def test_a_plan_made_on_meta_is_for_the_real_model() -> None:
    groups = torchshear.analyze(graph_of(Placed(), "meta"))
    plan = torchshear.pruners.plan_from_kept(groups, {group.name: [0] for group in groups.prunable})
    torch.manual_seed(0)
    small = torchshear.shrink(Placed(), plan)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in Placed().parameters())


def test_another_number_in_a_call_is_another_network() -> None:
    assert graph_of(Placed(), "cpu").fingerprint != graph_of(Placed(scale=0.25), "cpu").fingerprint
