"""Whole transformers against an oracle made of hooks on the modules of the original."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import torchshear
from tests.zoo import transformers_models
from tests.zoo.module_oracle import masked_with_norms_on_kept_positions

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

# Some compute their norms in float32, whatever their weights are.
TOLERANCES = {"bert": 1e-9, "distilbert": 1e-9, "gpt2": 1e-9, "opt": 1e-9, "vit": 1e-9, "llama": 1e-5, "qwen3": 1e-5}


def _flat(output: object) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@pytest.mark.parametrize("name", TOLERANCES)
def test_a_transformer_is_the_masked_one_with_norms_on_kept_positions(name: str) -> None:
    if not transformers_models.is_installed():
        pytest.skip("needs the libraries of the zoo: make zoo-setup")
    model, args, kwargs = transformers_models.build(name, 0)
    result = torchshear.prune(model, args, kwargs, ratio=0.5)
    assert result.plan.n_cut > 0
    oracle = masked_with_norms_on_kept_positions(model, result.plan.masks())
    small = copy.deepcopy(result.model).double().eval()
    wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
    with torch.no_grad():
        expected, actual = _flat(oracle(*wide[0], **wide[1])), _flat(small(*wide[0], **wide[1]))
    assert expected
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other.double(), one.double(), rtol=TOLERANCES[name], atol=TOLERANCES[name])
