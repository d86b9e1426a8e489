"""Hugging Face architectures by model type: random weights, the smallest configuration that keeps the structure."""

import copy
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.torchvision_models import load_torchvision
from tests.zoo.transformers_configs import RULES, small_config
from tests.zoo.transformers_inputs import example_inputs
from tests.zoo.weights import raise_gains, settle_statistics, spread_weights
from torchshear.graph._outputs import output_leaves

# Tasks in the order in which they are looked for: the models whose outputs leave the residual stream free.
_TASKS = (
    "SpeechSeq2Seq", "Seq2SeqLM", "CausalLM", "MaskedLM", "SemanticSegmentation", "ImageClassification", "CTC",
    "AudioClassification", "SequenceClassification", "ObjectDetection", "DepthEstimation", "VideoClassification",
    "ImageTextToText", "PreTraining", "TimeSeriesPrediction", "QuestionAnswering",
)  # fmt: skip
# Classes of families that no task knows.
_CLASSES = {"patchtst": "PatchTSTForPrediction", "time_series_transformer": "TimeSeriesTransformerForPrediction"}
_MOST_PARAMS = 150_000_000
NAMES = (
    "bert", "distilbert", "albert", "deberta-v2", "gpt2", "opt", "llama", "qwen3", "gemma2", "phi3", "falcon",
    "mixtral", "t5", "bart", "vit", "dinov2", "swin", "segformer", "whisper", "mamba",
)  # fmt: skip


def is_installed() -> bool:
    """Whether transformers is there at all."""
    return importlib.util.find_spec("transformers") is not None


class UnknownFamilyError(LookupError):
    """No rule gives a small model of a family that runs on the example inputs."""


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model with random weights in eval mode, as its class makes it, and its example inputs as keywords.

    Raises:
        UnknownFamilyError: the builder knows no sizes or no inputs with which the family's own forward runs.
    """
    load_torchvision()  # where its kernels do not load, transformers cannot import its models either
    import transformers

    transformers.logging.set_verbosity_error()
    failures = []
    for rule in RULES:
        torch.manual_seed(seed)
        try:
            model, inputs = _attempt(name, rule)
        except Exception as error:  # whatever a configuration, a constructor or a forward raises is the reason
            failures.append(f"{rule}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        else:
            return model, (), inputs
    raise UnknownFamilyError(f"the builder does not know the family {name!r}; " + "; ".join(failures))


def _attempt(name: str, rule: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = small_config(name, rule)
    kind = _class_for(config)
    with torch.device("meta"):
        n_params = sum(p.numel() for p in kind._from_config(copy.deepcopy(config)).parameters())
    if n_params > _MOST_PARAMS:
        raise ValueError(f"{n_params} parameters are more than {_MOST_PARAMS}")
    model = kind._from_config(config)
    spread_weights(model)
    raise_gains(model)
    generation = getattr(model, "generation_config", None)
    if generation is not None and config.is_encoder_decoder and generation.decoder_start_token_id is None:
        generation.decoder_start_token_id = 0  # not every configuration can hold it
    inputs = example_inputs(model.eval())
    settle_statistics(model, inputs)
    with torch.no_grad():
        _check_samples_differ(output_leaves(model(**inputs)))
    return model, inputs


def _check_samples_differ(outputs: list[Any]) -> None:
    """Two samples must not give one result, or no proof on such a model would mean anything.

    Raises:
        ValueError: they do.
    """
    rows = [out for out in outputs if isinstance(out, Tensor) and out.is_floating_point() and out.ndim > 1]
    if not any(float((out[0] - out[1]).abs().max()) > 1e-3 * float(out.abs().max()) for out in rows):
        raise ValueError("the outputs do not depend on the inputs")


def _class_for(config: Any) -> Any:
    """The class of the first task that the family has one for; of two towers, images and texts, the whole."""
    import transformers

    if config.model_type in _CLASSES:
        return getattr(transformers, _CLASSES[config.model_type])
    encodes_only = getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False)
    has_towers = all(hasattr(config, f"{tower}_config") for tower in ("text", "vision"))
    for task in ("MaskedLM", *_TASKS) if encodes_only else _TASKS:
        mapping = getattr(transformers, f"AutoModelFor{task}")._model_mapping
        if type(config) in mapping and not (has_towers and task == "ImageClassification"):
            return _first(mapping[type(config)])
    if type(config) in transformers.AutoModel._model_mapping:
        return _first(transformers.AutoModel._model_mapping[type(config)])
    return _class_beside(type(config))


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


def _class_beside(config_type: type) -> Any:
    """The last model in the file beside a configuration's that names it as its own."""
    file = importlib.import_module(config_type.__module__.replace("configuration_", "modeling_"))
    found = [value for value in vars(file).values() if getattr(value, "config_class", None) is config_type]
    if not found:
        raise LookupError(f"no model has the configuration {config_type.__name__}")
    return found[-1]
