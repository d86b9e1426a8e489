"""Example inputs of Hugging Face models: rules by the main kind of input, and what single families ask for besides."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_IMAGE = 64
_Inputs = dict[str, Tensor]


def example_inputs(model: Any, batch: int = 2, length: int = 11) -> _Inputs:
    """Inputs of the model's main kind, by name."""
    config = model.config
    names = set(inspect.signature(model.forward).parameters)
    make = _MAIN.get(model.main_input_name, _of_tokens)
    inputs = make(config, batch, length)
    if "attention_mask" in names and make is _of_tokens:
        inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.randint(3, _vocabulary(config), (batch, length - 2))
    if hasattr(model, "logit_scale") and "pixel_values" in names:  # images are compared with texts
        inputs |= _of_pixels(config.vision_config, batch, length)
    if "bbox" in names:
        inputs["bbox"] = _boxes(batch, length)
    own = _OWN.get(config.model_type)
    return inputs if own is None else own(config, inputs)


def _vocabulary(config: Any) -> int:
    text = getattr(config, "text_config", None) or config
    return getattr(config, "vocab_size", None) or getattr(text, "vocab_size", None) or 96


def _of_tokens(config: Any, batch: int, length: int) -> _Inputs:
    return {"input_ids": torch.randint(3, _vocabulary(config), (batch, length))}


def _of_pixels(config: Any, batch: int, length: int) -> _Inputs:
    size = getattr(config, "image_size", None) or _IMAGE
    shape = tuple(size) if isinstance(size, list | tuple) else (size, size)
    frames = getattr(config, "num_frames", None)
    time = () if frames is None else (frames,)
    return {"pixel_values": torch.randn(batch, *time, getattr(config, "num_channels", 3), *shape)}


def _of_waves(config: Any, batch: int, length: int) -> _Inputs:
    """A wave form, or its spectrum where the configuration counts mel bins."""
    n_bins = getattr(config, "num_mel_bins", None)
    shape = (batch, 4000) if n_bins is None else (batch, config.max_length, n_bins)
    return {"input_values": torch.randn(shape)}


def _of_spectra(config: Any, batch: int, length: int) -> _Inputs:
    """Frames of features, or features of frames where the configuration counts mel bins."""
    frames = 2 * getattr(config, "max_source_positions", 32)
    for name in ("input_feat_per_channel", "feature_projection_input_dim"):
        if hasattr(config, name):
            return {"input_features": torch.randn(batch, frames, getattr(config, name))}
    return {"input_features": torch.randn(batch, getattr(config, "num_mel_bins", 16), frames)}


def _of_series(config: Any, batch: int, length: int) -> _Inputs:
    return {"past_values": torch.randn(batch, config.context_length, getattr(config, "num_input_channels", 1))}


def _of_bytes(config: Any, batch: int, length: int) -> _Inputs:
    return {"inputs": torch.randint(3, _vocabulary(config), (batch, length))}


_MAIN: dict[str, Callable[[Any, int, int], _Inputs]] = {
    "pixel_values": _of_pixels,
    "input_values": _of_waves,
    "input_features": _of_spectra,
    "past_values": _of_series,
    "inputs": _of_bytes,
}


def _boxes(batch: int, length: int) -> Tensor:
    """Boxes of words: left, top, right and bottom."""
    corners = torch.randint(0, 40, (batch, length, 2))
    return torch.cat([corners, corners + torch.randint(1, 20, (batch, length, 2))], -1)


def _with_noise(config: Any, inputs: _Inputs) -> _Inputs:
    """What decides on the masked patches, which a model would draw itself."""
    n_patches = (config.image_size // config.patch_size) ** 2
    return {**inputs, "noise": torch.rand(len(inputs["pixel_values"]), n_patches)}


def _with_question(config: Any, inputs: _Inputs) -> _Inputs:
    """A place that asks, in each row."""
    inputs["input_ids"][:, 2] = config.question_token_id
    return inputs


def _with_codebooks(config: Any, inputs: _Inputs) -> _Inputs:
    """A row for each codebook of each sample."""
    batch, length = inputs["input_ids"].shape
    rows = torch.randint(3, config.vocab_size, (batch * config.num_codebooks, length))
    return {**inputs, "input_ids": rows}


def _with_features_of_time(config: Any, inputs: _Inputs) -> _Inputs:
    """A past that reaches back to the last lag, its calendar, and the future for the decoder."""
    past, future, batch = config.context_length + max(config.lags_sequence), config.prediction_length, 2
    return {
        "past_values": torch.randn(batch, past),
        "past_time_features": torch.randn(batch, past, config.num_time_features),
        "past_observed_mask": torch.ones(batch, past),
        "future_values": torch.randn(batch, future),
        "future_time_features": torch.randn(batch, future, config.num_time_features),
    }


_OWN: dict[str, Callable[[Any, _Inputs], _Inputs]] = {
    "musicgen_decoder": _with_codebooks,
    "splinter": _with_question,
    "time_series_transformer": _with_features_of_time,
    "vit_mae": _with_noise,
}
