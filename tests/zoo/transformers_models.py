"""Hugging Face architectures by model type: random weights, the smallest configuration that keeps the structure."""

import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.torchvision_models import load_torchvision
from tests.zoo.weights import spread_weights

# Sizes of a transformer by the names that configurations give them; only those that a configuration has are set.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 128),
    **dict.fromkeys(("head_dim", "d_kv"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "sliding_window": 32,
    "image_size": 32,
    "patch_size": 8,
}
# What else the named families need to stay small and themselves.
_OWN: dict[str, dict[str, Any]] = {
    "bart": {"forced_eos_token_id": 2},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
                   "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    "dinov2": {"apply_layernorm": True},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "n_head": None},
    "gemma2": {"num_key_value_heads": 2, "query_pre_attn_scalar": 16},
    "llama": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "mamba": {"state_size": 8, "intermediate_size": None, "time_step_rank": 8},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": 64},
    "qwen3": {"num_key_value_heads": 2},
    "segformer": {"hidden_sizes": [16, 32, 48, 64], "decoder_hidden_size": 48, "depths": [1, 1, 1, 1],
                  "num_attention_heads": [1, 2, 4, 4], "image_size": 64, "patch_size": None,
                  "patch_sizes": [7, 3, 3, 3], "hidden_size": None},
    "swin": {"embed_dim": 32, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4, "patch_size": 2,
             "hidden_size": None, "num_layers": None, "num_hidden_layers": None, "num_attention_heads": None},
    "whisper": {"num_mel_bins": 16, "max_source_positions": 32, "suppress_tokens": None,
                "begin_suppress_tokens": None},
}  # fmt: skip
# Tasks in the order in which they are looked for: the models whose outputs leave the residual stream free.
_TASKS = (
    "SpeechSeq2Seq",
    "Seq2SeqLM",
    "CausalLM",
    "MaskedLM",
    "SemanticSegmentation",
    "ImageClassification",
    "CTC",
    "AudioClassification",
    "SequenceClassification",
)
NAMES = (
    "bert",
    "distilbert",
    "albert",
    "deberta-v2",
    "gpt2",
    "opt",
    "llama",
    "qwen3",
    "gemma2",
    "phi3",
    "falcon",
    "mixtral",
    "t5",
    "bart",
    "vit",
    "dinov2",
    "swin",
    "segformer",
    "whisper",
    "mamba",
)


def is_installed() -> bool:
    """Whether transformers is there at all."""
    return importlib.util.find_spec("transformers") is not None


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model with random weights in eval mode, as its class makes it, and its example inputs as keywords."""
    load_torchvision()  # where its kernels do not load, transformers cannot import its models either
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    config = small_config(name)
    model = _class_for(config)._from_config(config)
    spread_weights(model)
    if config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = 0  # not every configuration can hold it
    assert isinstance(model, transformers.PreTrainedModel)
    return model.eval(), (), example_inputs(model)


def small_config(name: str) -> Any:
    """The configuration of a model type, small."""
    from transformers import AutoConfig

    own = _OWN.get(name, {})
    plain = AutoConfig.for_model(name)
    known = set(plain.to_dict()) | set(plain.attribute_map)
    sizes = {key: value for key, value in {**_SIZES, **own}.items() if key in known and value is not None}
    config = AutoConfig.for_model(name, **sizes)
    for key in ("text_config", "vision_config", "audio_config"):
        nested = getattr(config, key, None)
        if nested is not None:
            for size, value in _SIZES.items():
                if hasattr(nested, size):
                    setattr(nested, size, value)
    return config


def _class_for(config: Any) -> Any:
    import transformers

    encodes_only = getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False)
    for task in ("MaskedLM", *_TASKS) if encodes_only else _TASKS:
        mapping = getattr(transformers, f"AutoModelFor{task}")._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    found = transformers.AutoModel._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def example_inputs(model: Any, batch: int = 2, length: int = 11) -> dict[str, Tensor]:
    """Inputs of the model's main kind, by name."""
    config = model.config
    names = set(inspect.signature(model.forward).parameters)
    vocabulary = getattr(config, "vocab_size", None) or 96
    main = model.main_input_name
    if main == "pixel_values":
        size = getattr(config, "image_size", 32)
        shape = tuple(size) if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.randn(batch, getattr(config, "num_channels", 3), *shape)}
    if main == "input_values":
        return {"input_values": torch.randn(batch, 4000)}
    if main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 32)
        inputs = {"input_features": torch.randn(batch, getattr(config, "num_mel_bins", 16), frames)}
    else:
        inputs = {"input_ids": torch.randint(3, vocabulary, (batch, length))}
        if "attention_mask" in names:
            inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.randint(3, vocabulary, (batch, length - 2))
    return inputs
