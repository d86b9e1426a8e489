"""Roles in named architectures: counted from their published configurations, not from what the analysis says."""

import importlib.util
from collections import Counter

import pytest
import torch

import torchshear
from tests.zoo.torchvision_models import build, is_installed, load_torchvision
from torchshear.dependency import ChannelGroups

pytestmark = pytest.mark.zoo
needs_torchvision = pytest.mark.skipif(not is_installed(), reason="needs torchvision: make zoo-setup")
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")

# Role -> number of groups. Swin-T has blocks (2, 2, 6, 2) on four streams, ViT-B/16 twelve on one; ConvNeXt-T blocks
# (3, 3, 9, 3) on four; ResNet-50 bottlenecks (3, 4, 6, 3), each with two inner widths, and a stem.
TORCHVISION = {
    "vit_b_16": {"residual": 1, "heads": 12, "head_dim": 12, "ffn": 12},
    "swin_t": {"residual": 4, "heads": 12, "head_dim": 12, "ffn": 12},
    "convnext_tiny": {"residual": 4, "ffn": 18},
    "resnet50": {"residual": 4, "channels": 33},
    "vgg16_bn": {"channels": 13, "ffn": 2},
    "densenet121": {"channels": 120},
}


def counts(groups: ChannelGroups) -> Counter[str]:
    return Counter(group.role for group in groups)


@needs_torchvision
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    model, args = build(name)
    assert counts(torchshear.analyze(torchshear.trace(model, args))) == TORCHVISION[name]


COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
WORDS = COMMON | {"vocab_size": 99}
SHARED = WORDS | {"num_key_value_heads": 2}
MAMBA = {"vocab_size": 99, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}

# Model, its configuration, and role -> widths: each of the two layers has one of every kind, but what layers share.
FAMILIES = {
    "Bert": ("ForMaskedLM", WORDS, {"heads": [4, 4], "qk_dim": [16, 16], "v_dim": [16, 16]}),
    "GPT2": (
        "LMHeadModel",
        {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4},
        {"residual": [64], "heads": [4, 4], "qk_dim": [16, 16], "v_dim": [16, 16], "ffn": [256, 256]},
    ),
    # Rotary positions are one table for all layers, which ties the pairs of their queries and keys.
    "Llama": (
        "ForCausalLM",
        SHARED,
        {"residual": [64], "kv_heads": [2, 2], "q_heads": [2, 2], "qk_dim": [8], "v_dim": [16, 16], "ffn": [128, 128]},
    ),
    "ViT": (
        "ForImageClassification",
        COMMON | {"image_size": 32, "patch_size": 8},
        {"residual": [64], "heads": [4, 4], "qk_dim": [16, 16], "v_dim": [16, 16], "ffn": [128, 128]},
    ),
    # T5 shares the bias of positions, and with it the heads, between the layers of a stack.
    "T5": (
        "ForConditionalGeneration",
        {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        {"qk_dim": [16] * 6, "v_dim": [16] * 6, "ffn": [128] * 4},
    ),
    "Mamba": ("ForCausalLM", MAMBA, {"residual": [32], "inner": [64, 64], "state": [8, 8], "rank": [4, 4]}),
}


@needs_torchvision
@needs_transformers
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers(name: str) -> None:
    load_torchvision()  # transformers imports it, which needs its operators declared
    import transformers

    head, options, expected = FAMILIES[name]
    config = getattr(transformers, f"{name}Config")(**options)
    config.use_cache = False
    model = getattr(transformers, f"{name}{head}")(config).eval()
    if name == "ViT":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    else:
        inputs = {"input_ids": torch.randint(0, 99, (2, 12))}
    if name == "T5":
        inputs["decoder_input_ids"] = torch.randint(0, 99, (2, 9))
    groups = torchshear.analyze(torchshear.trace(model, (), inputs))
    for role, widths in expected.items():
        assert sorted(group.width for group in groups if group.role == role) == sorted(widths), role


@needs_torchvision
@needs_transformers
def test_a_feature_extractor_may_give_fewer_features() -> None:
    load_torchvision()
    import transformers

    config = transformers.ViTConfig(**COMMON, image_size=32, patch_size=8)
    model = transformers.ViTModel(config, add_pooling_layer=False).double().eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64), "output_hidden_states": True}
    options = {"ratio": 0.5, "prunable_outputs": ["last_hidden_state", "hidden_states"]}
    result = torchshear.prune(model, (), inputs, **options)
    assert [output.name for output in result.plan.outputs] == [
        "last_hidden_state",
        "hidden_states.0",
        "hidden_states.1",
        "hidden_states.2",
    ]
    small = result.model(**inputs)
    assert small.last_hidden_state.shape == small.hidden_states[0].shape == (2, 17, 32)
    assert result.verification.max_error <= 1e-9
    assert {group.role for group in result.report.groups if group.kept * 2 == group.width} == {
        "residual",
        "heads",
        "qk_dim",
        "v_dim",
        "ffn",
    }
