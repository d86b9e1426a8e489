"""Large language models by their published configurations, made without weights."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.zoo.torchvision_models import is_installed, load_torchvision
from torchshear.graph import parameters_on_meta

if is_installed():
    load_torchvision()  # transformers imports it, which fails where its kernels are not those of the installed torch

# Settings and type of https://huggingface.co/meta-llama/Llama-2-70b-hf/blob/main/config.json
LLAMA_2_70B = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# Settings and type of https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json
MIXTRAL_8X7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def _llama(settings: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(LlamaConfig(**settings))
    return model


def _mixtral(settings: dict[str, Any]) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    model: nn.Module = MixtralForCausalLM(MixtralConfig(**settings))
    return model


PUBLISHED: dict[str, tuple[Callable[[dict[str, Any]], nn.Module], dict[str, Any], torch.dtype]] = {
    "LLaMA-2-70B": (_llama, LLAMA_2_70B, torch.float16),
    "Mixtral-8x7B": (_mixtral, MIXTRAL_8X7B, torch.bfloat16),
}


def build(name: str, with_weights: bool = False, **changes: Any) -> nn.Module:
    """A published model in eval mode and in its type, with parameters on the meta device or random ones."""
    make, settings, dtype = PUBLISHED[name]
    torch.set_default_dtype(dtype)  # as from_pretrained does: what is made in a type of its own keeps that
    try:
        with nullcontext() if with_weights else parameters_on_meta():
            return make(settings | changes).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def example_tokens() -> tuple[torch.Tensor]:
    """Two sentences of 16 tokens."""
    return (torch.zeros(2, 16, dtype=torch.long),)
