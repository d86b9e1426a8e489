"""2:4 on CUDA: the rules of shape and type, what is refused, and the report of what brings speed."""

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from tests.networks import randomise
from torchshear.errors import ArgumentError, MaskError
from torchshear.pruners import masks as m
from torchshear.pruners.masks._semi_structured import (
    MULTIPLES,
    _layers_to_convert,
    _pack,
    is_two_of_four,
    shape_problem,
)

HAS_CUDA = torch.cuda.is_available()


@pytest.mark.parametrize(
    ("backend", "of"),
    [("cusparselt", SparseSemiStructuredTensorCUSPARSELT), ("cutlass", SparseSemiStructuredTensorCUTLASS)],
)
def test_rules_are_those_of_torch(backend: str, of: type) -> None:
    rules = {
        dtype: (rule.sparse_min_rows, rule.sparse_min_cols)
        for dtype, rule in of._DTYPE_SHAPE_CONSTRAINTS.items()
        if dtype != torch.float32
    }
    assert dict(MULTIPLES[backend]) == rules


@pytest.mark.parametrize(
    ("shape", "dtype", "backend", "problem"),
    [
        ((16, 16), torch.float16, "cusparselt", ""),
        ((16, 16), torch.float16, "cutlass", "16 x 16 is no multiple of 32 x 64"),
        ((32, 64), torch.bfloat16, "cutlass", ""),
        ((24, 16), torch.bfloat16, "cusparselt", "24 x 16 is no multiple of 16 x 16"),
        ((0, 16), torch.bfloat16, "cusparselt", "0 x 16 is no multiple of 16 x 16"),
        ((32, 32), torch.float32, "cusparselt", "float32 is none of float16, bfloat16, int8, float8_e4m3fn"),
        ((32, 32, 3, 3), torch.float16, "cusparselt", "a weight of 4 dimensions; linear layers only"),
    ],
)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, backend: str, problem: str) -> None:
    assert shape_problem(shape, dtype, backend) == problem


def test_the_pattern_is_validated() -> None:
    assert is_two_of_four(torch.tensor([[0.0, 1, 0, 2, 3, 0, 0, 0]]))
    assert not is_two_of_four(torch.tensor([[0.0, 1, 1, 2, 3, 0, 0, 0]]))
    assert not is_two_of_four(torch.tensor([[0.0, 1, 0]]))


def network(dtype: torch.dtype = torch.float16) -> tuple[nn.Module, m.Masks]:
    net = randomise(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48), nn.Linear(48, 10), nn.Linear(48, 6)))
    masks = m.choose_masks(net, "2:4", layers=["0", "2", "3"])
    m.apply(net, masks)
    m.make_permanent(net)
    return net.to(dtype), masks


def test_layers_are_sorted_out() -> None:
    net, masks = network()
    assert _layers_to_convert(net, masks, "cusparselt") == (["0", "2"], {"3": "10 x 48 is no multiple of 16 x 16"})
    assert _layers_to_convert(net, masks, "cutlass")[0] == ["0"]
    assert _layers_to_convert(net.float(), masks, "cutlass")[0] == []
    dense = m.Masks.of({"0.weight": torch.ones(32, 64).bool(), "2.weight": masks.tensors["2.weight"]})
    assert _layers_to_convert(net.half(), dense, "cusparselt") == (["2"], {"0": "its mask is not 2:4"})

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    net[0].__class__ = Own
    assert _layers_to_convert(net, masks, "cusparselt")[1]["0"] == "its class has a forward of its own"


@pytest.mark.skipif(HAS_CUDA, reason="has CUDA")
def test_without_cuda_the_error_says_so() -> None:
    net, masks = network()
    with pytest.raises(MaskError, match="CUDA.*3 masks, 2 "):
        m.to_semi_structured(net, masks)


def test_what_is_refused() -> None:
    net, masks = network()
    net[0].weight.data.fill_(1)
    with pytest.raises(MaskError, match="'0.weight' is not zero"):
        m.to_semi_structured(net, masks)
    with pytest.raises(MaskError, match="the masks are of no layer of this model"):
        m.to_semi_structured(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(4, 4)), m.Masks.of({}))
    with pytest.raises(MaskError, match=r"mask of '0.weight' has shape \(32, 64\)"):
        m.to_semi_structured(nn.Sequential(nn.Linear(4, 4)), masks)
    m.apply(net, masks)
    with pytest.raises(MaskError, match="masks still lie on the model"):
        m.to_semi_structured(net, masks)
    with pytest.raises(ArgumentError, match="Linear and dict"):
        m.to_semi_structured(nn.Linear(2, 2), {})


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converted_layers_compute_the_same(dtype: torch.dtype) -> None:
    net, masks = network(dtype)
    net = nn.Sequential(*net[:3]).cuda()
    masks = m.Masks.of({name: masks.tensors[name] for name in ("0.weight", "2.weight")})
    found = m.to_semi_structured(net, masks)
    assert found.converted == ("0", "2")
    x = torch.randn(128, 64, device="cuda", dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), net(x), rtol=2e-2, atol=2e-2 * float(net(x).abs().max()))
    assert type(net[0].weight) is nn.Parameter, "the model is as it was"


def test_a_weight_on_the_cpu_is_refused() -> None:
    net, _ = network()
    with pytest.raises(MaskError, match="layer '0' is on cpu"):
        _pack("0", net[0].weight)


def test_report() -> None:
    _, masks = network()
    text = m.report(masks)
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    assert rows["0"] == ["linear", "32 x 64", "512", "512", "50.0%", "50.0%", ""]
    assert "onnxruntime CPU   nothing" in text
    assert "CUDA              2 of 3 layers in half precision, as torch's semi-structured tensors" in text
    assert "1 with CUTLASS" in text
    assert "3: 10 x 48 is no multiple of 16 x 16" in text
    skipped = m.report(m.choose_masks(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)), "4x1"))
    assert "skipped: 6 outputs cannot be divided into" in skipped
    assert "CUDA              nothing of this pattern" in skipped
    assert "plan_from_masks" in m.report(m.choose_masks(nn.Linear(8, 6), "channelx1"))
    assert "plan_from_masks" not in skipped
    attention = m.report(m.choose_masks(nn.MultiheadAttention(16, 2), "2:4"))
    assert "in_proj: projection: linear layers only" in attention
