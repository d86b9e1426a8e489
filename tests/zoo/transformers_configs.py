"""Small configurations of Hugging Face families: rules by the names of sizes, and what single families need besides."""

from collections.abc import Callable
from typing import Any

# Sizes of a transformer by the names that configurations give them; only those that a configuration has are set.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("emb_dim", "decoder_hidden_size", "projection_dim", "embed_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 128),
    **dict.fromkeys(("dff", "mlp_dim", "decoder_intermediate_size"), 128),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "n_routed_experts"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "n_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "sliding_window": 32,
    "image_size": 32,
    "patch_size": 8,
}
_LAYERS = tuple(key for key in _SIZES if "layer" in key)
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
# A family of stages has its sizes in lists, one a stage; widths shrink by one factor, so that they go on fitting.
_STAGE_DEPTHS = ("depths", "depth", "layers_per_stage")
_STAGE_WIDTHS = (
    "hidden_sizes", "embed_dim", "embed_dims", "embedding_size", "neck_hidden_sizes", "groups_width", "stem_channels",
    "stage_in_channels", "stage_mid_channels", "stage_out_channels", "decoder_hidden_size",
)  # fmt: skip
_STAGE_FACTOR, _STAGE_IMAGE = 4, 64
_LIST_WIDTHS = ("conv_dim", "tdnn_dim", "fusion_hidden_size", "reassemble_hidden_size")
# A backbone that needs no library besides.
_RESNET = {
    "backbone_config": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [32, 64, 128, 256],
                        "depths": [1, 1, 1, 1], "out_features": ["stage4"]},
    "image_size": None,
}  # fmt: skip
_MEL = {"num_mel_bins": 16, "max_source_positions": 32}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_FOUR_LEVELS = {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]}
_VIDEO = {"num_frames": 4}
# What else single families need to stay small and themselves: None leaves a size as it is.
_OWN: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"num_mel_bins": 32, "max_length": 48},
    "bart": {"forced_eos_token_id": 2},
    "beit": _FOUR_LEVELS,
    "bit": {"num_groups": 8},
    "canine": {"num_hash_buckets": 256},
    "codegen": {"rotary_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "conditional_detr": _RESNET,
    "cvt": {"depth": [1, 2, 3]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
                   "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    "detr": _RESNET,
    "data2vec-vision": _FOUR_LEVELS,
    "dinov2": {"apply_layernorm": True},
    "dpt": {"backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4, "neck_hidden_sizes": [16, 32, 64, 64],
            "fusion_hidden_size": 64},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640, "image_size": 64},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "n_head": None},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
              "use_mamba_kernels": False},
    "mamba": {"state_size": 8, "intermediate_size": None, "time_step_rank": 8},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "mobilenet_v1": {"depth_multiplier": 0.5, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.5, "image_size": 64},
    "mobilevitv2": {"width_multiplier": 0.25, "aspp_out_channels": 64, "patch_size": 2, "image_size": 64},
    "musicgen_decoder": {"num_codebooks": 2},
    "patchtst": {"context_length": 32, "patch_length": 4, "patch_stride": 4, "num_input_channels": 3},
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
                  "num_cross_attention_heads": 4},
    "phi3": {"original_max_position_embeddings": 64},
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "segformer": {"hidden_sizes": [16, 32, 48, 64], "decoder_hidden_size": 48, "depths": [1, 1, 1, 1],
                  "num_attention_heads": [1, 2, 4, 4], "num_encoder_blocks": 2},
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 64, "max_source_positions": 64},
    "splinter": {"question_token_id": 90},
    "swin": {"embed_dim": 32, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4, "patch_size": 2,
             "image_size": 32},
    "table-transformer": _RESNET,
    "time_series_transformer": {"prediction_length": 6, "context_length": 12, "num_time_features": 3},
    "timesformer": _VIDEO,
    "videomae": _VIDEO,
    "vivit": {**_VIDEO, "tubelet_size": [2, 8, 8]},
    "whisper": {**_MEL, "suppress_tokens": None, "begin_suppress_tokens": None},
}  # fmt: skip


def small_config(name: str, rule: str = "small") -> Any:
    """The configuration of a model type by one of the rules."""
    from transformers import AutoConfig

    sizes = RULES[rule](AutoConfig.for_model(name))
    return AutoConfig.for_model(name, **{**sizes, **_own(name)})


def _own(name: str) -> dict[str, Any]:
    return {key: value for key, value in _OWN.get(name, {}).items() if value is not None}


def _small(plain: Any) -> dict[str, Any]:
    """All sizes small."""
    known = _fields(plain)
    rules = _of_stages(plain) if _has_stages(plain) else _SIZES
    left = {key for key, value in _OWN.get(plain.model_type, {}).items() if value is None}
    sizes = {key: _fit(getattr(plain, key, None), value) for key, value in rules.items() if key in known - left}
    sizes |= {key: _scaled(getattr(plain, key)) for key in _LIST_WIDTHS if _is_row(plain, key)}
    if "qk_rope_head_dim" in known:  # keys of all heads come from one latent, and head_dim is theirs that turn
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return sizes | _of_parts(plain, _small)


def _shallow(plain: Any) -> dict[str, Any]:
    """Widths as they are, depth and vocabulary small."""
    scalars = {key for key in _fields(plain) if not _is_row(plain, key)}
    sizes = {key: _SIZES[key] for key in (*_LAYERS, *_IDS, "vocab_size") if key in scalars}
    sizes |= {key: _few(getattr(plain, key)) for key in _STAGE_DEPTHS if _is_row(plain, key)}
    return sizes | _of_parts(plain, _shallow)


def _deeper(plain: Any) -> dict[str, Any]:
    """All sizes small but for depth, for families in which only every third or fourth layer is attention."""
    sizes = _small(plain)
    return sizes | {key: 4 for key in _LAYERS if sizes.get(key) == _SIZES[key]}


RULES = {"small": _small, "deeper": _deeper, "shallow": _shallow}


def _of_parts(plain: Any, rule: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Sizes of the configurations of parts, by the names that they have in the whole."""
    found = ((key, getattr(plain, key, None)) for key in type(plain).sub_configs)
    parts = {key: part for key, part in found if hasattr(part, "model_type")}
    return {key: {"model_type": part.model_type, **rule(part), **_own(part.model_type)} for key, part in parts.items()}


def _fields(plain: Any) -> set[str]:
    return set(plain.to_dict()) | set(plain.attribute_map)


def _is_row(plain: Any, key: str) -> bool:
    return isinstance(getattr(plain, key, None), list | tuple)


def _has_stages(plain: Any) -> bool:
    return any(_is_row(plain, key) for key in (*_STAGE_DEPTHS, "hidden_sizes"))


def _of_stages(plain: Any) -> dict[str, Any]:
    """Sizes of a family that has them in lists, one a stage."""
    depths = {key: _few(getattr(plain, key)) for key in _STAGE_DEPTHS if hasattr(plain, key)}
    widths = {key: _scaled(getattr(plain, key)) for key in _STAGE_WIDTHS if getattr(plain, key, None) is not None}
    return {"image_size": _STAGE_IMAGE, **{key: _SIZES[key] for key in _IDS}, **depths, **widths}


def _fit(plain: Any, size: Any) -> Any:
    """A size in the form that the field has it."""
    is_row = isinstance(plain, list | tuple) and not isinstance(size, list)
    return [size] * len(plain) if is_row else size


def _scaled(widths: Any) -> Any:
    return [_scaled(width) for width in widths] if isinstance(widths, list | tuple) else max(widths // _STAGE_FACTOR, 1)


def _few(depths: Any) -> Any:
    return [_few(depth) for depth in depths] if isinstance(depths, list | tuple) else min(depths, 2)
