"""A Hugging Face language model inside a generation loop: its parts are pruned, and the loop goes on with its cache."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.oracle import assert_equals_masked
from tests.zoo.torchvision_models import is_installed, load_torchvision

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers"),
]


class Generation(nn.Module):
    """Greedy decoding of five tokens: Python decides after each whether to go on."""

    def __init__(self, language_model: Any, use_cache: bool) -> None:
        super().__init__()
        self.language_model, self.use_cache = language_model, use_cache

    def forward(self, tokens: Tensor) -> Tensor:
        generated: Tensor = self.language_model.generate(
            tokens, max_new_tokens=5, do_sample=False, use_cache=self.use_cache, pad_token_id=0
        )
        return generated


def generation(use_cache: bool) -> Generation:
    if is_installed():
        load_torchvision()  # transformers imports it where it is there
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return Generation(transformers.LlamaForCausalLM(config).eval(), use_cache)


TOKENS = torch.tensor([[5, 6, 7], [11, 12, 13]])


@pytest.mark.parametrize("use_cache", [False, True])
def test_feed_forward_layers_in_a_generation_loop(use_cache: bool) -> None:
    model = generation(use_cache)
    parts = [f"language_model.model.layers.{layer}.mlp" for layer in range(2)]
    result = torchshear.prune(model, (TOKENS,), submodules=parts)
    assert result.form == "native"
    assert len(result.plan.parts.calls) == (4 if use_cache else 10)
    assert [group.width for group in result.plan.groups] == [48, 48]
    assert result.model(TOKENS).shape == (2, 8)
    assert_equals_masked(model, result.model, result.plan, (TOKENS,))
    assert result.model(TOKENS[:1, :2]).shape == (1, 7)


def test_the_decoder_of_a_generation_loop() -> None:
    model = generation(use_cache=False)
    result = torchshear.prune(model, (TOKENS,), submodules=["language_model.model"])
    assert len(result.plan.parts.calls) == 5
    assert result.report.parts[0].after.n_params < result.report.parts[0].before.n_params
    assert result.verification.max_error < 1e-4  # its norms compute in float32
    assert result.model(TOKENS).shape == (2, 8)
    config = result.model.language_model.config
    assert (config.hidden_size, config.vocab_size) == (32, 97)
