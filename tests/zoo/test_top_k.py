"""Models that select by top-k: what rounding reorders is no difference."""

import pytest
import torch

import torchshear
from tests.zoo.rt_detr import build_rt_detr
from tests.zoo.transformers_models import is_installed
from torchshear.graph._outputs import output_leaves
from torchshear.graph._run import run_graph
from torchshear.graph.numerics._float64 import compute_in, to_float64
from torchshear.graph.numerics._ties import TieBreaker

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(not is_installed(), reason="needs transformers: make zoo-setup"),
    pytest.mark.filterwarnings("ignore"),
]


def test_rt_detr_has_a_free_batch_and_is_pruned() -> None:
    model, inputs = build_rt_detr()
    result = torchshear.prune(model, (), inputs, ratio=0.3)
    assert result.plan.analysis.graph.batch_hint is not None
    assert result.verification.dtype == torch.float64


def test_choices_of_float32_are_followed_in_float64_where_they_are_ties() -> None:
    model, inputs = build_rt_detr()
    for head in (model.model.enc_score_head, *model.model.decoder.class_embed):
        head.weight.data.mul_(1e-12)  # every position has the same score in float32, and nearly so in float64
        torch.nn.init.ones_(head.bias)
    graph = torchshear.trace(model, (), inputs)
    choices, wide = TieBreaker(), to_float64(graph.inputs)
    with torch.no_grad(), choices.record():
        expected = output_leaves(model(**inputs))
    with compute_in(torch.float64), choices.replay(1e-4):
        actual = output_leaves(run_graph(graph, wide))
    assert choices.n_replayed
    for one, two in zip(expected, actual, strict=True):
        if one is not None and one.is_floating_point():
            torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-4)
