"""Hugging Face architectures as users have them: no switch flipped first, cache and all."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchshear
from tests.zoo import transformers_models
from tests.zoo.transformers_models import NAMES, UnknownFamilyError, build, is_installed

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(not is_installed(), reason="needs transformers: make zoo-setup"),
    pytest.mark.filterwarnings("ignore"),
]

GENERATING = ("gpt2", "opt", "llama", "qwen3", "gemma2", "phi3", "falcon", "mixtral", "t5", "bart", "mamba")
# Share of the parameters that may be left; more where an encoder's hidden states are an output, which stays whole.
MOST_LEFT = {"t5": 0.45, "bart": 0.5, "whisper": 0.45, "falcon": 0.4}
# DeBERTa and Falcon derive the scale of attention from the size of the tensor itself: a factor keeps it.
SCALE_KEPT = {"deberta-v2", "falcon"}


def pruned(name: str, **options: Any) -> tuple[nn.Module, dict[str, Any], torchshear.PruneResult]:
    model, args, kwargs = build(name)
    return model, kwargs, torchshear.prune(model, args, kwargs, **{"ratio": 0.5, **options})


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}: make zoo-setup")


@pytest.mark.parametrize("name", NAMES)
def test_half_of_everything_goes(name: str, tmp_path: Path) -> None:
    _, kwargs, result = pruned(name)
    left = result.report.after.n_params / result.report.before.n_params
    assert left <= MOST_LEFT.get(name, 0.35)
    assert result.form == "native", result.report.form
    assert ("scale of attention kept" in result.report.form) == (name in SCALE_KEPT)
    if name == "mixtral":  # grouped matrix products have no float64 kernel
        assert result.verification.max_error <= 1e-4
    else:
        assert result.verification.dtype == torch.float64
        assert result.verification.max_error <= 1e-9
    small = result.model.train()
    output = small(**kwargs)
    output.logits.square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in small.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_its_cache_gives_what_it_gives_without(name: str) -> None:
    _, kwargs, result = pruned(name)
    assert result.form == "native", result.report.form
    ids = kwargs["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": kwargs["attention_mask"]}
    fast, slow = (result.model.generate(ids, use_cache=cached, **settings) for cached in (True, False))
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_labels_give_a_loss_that_trains(name: str) -> None:
    _, kwargs, result = pruned(name)
    small = result.model.train()
    labels = torch.tensor([0, 1]) if name == "vit" else kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
    optimizer = torch.optim.AdamW(small.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = small(**kwargs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_stays_on() -> None:
    model, args, kwargs = build("llama")
    model.gradient_checkpointing_enable()
    small = torchshear.prune(model, args, kwargs, ratio=0.5).model.train()
    assert small.is_gradient_checkpointing
    small(**kwargs, labels=kwargs["input_ids"]).loss.backward()
    assert small.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_half_precision() -> None:
    model, args, kwargs = build("llama")
    result = torchshear.prune(model.to(torch.bfloat16), args, kwargs, ratio=0.5)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert result.verification.dtype == torch.float64
    assert result.form == "native"


@needs("peft")
def test_lora_adapters_shrink_with_their_layers() -> None:
    from peft import LoraConfig, get_peft_model

    model, args, kwargs = build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    result = torchshear.prune(adapted, args, kwargs, ratio=0.5)
    assert result.form == "native"
    layer = result.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[1] == layer.base_layer.weight.shape[1] == 32
    assert layer.lora_B["default"].weight.shape[0] == layer.base_layer.weight.shape[0]
    assert {n for n, p in result.model.named_parameters() if p.requires_grad} == {
        n for n, p in adapted.named_parameters() if p.requires_grad
    }


class Texts(torch.utils.data.Dataset):
    """Rows that count upwards, which a language model can learn."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(12) + index) % 90 + 3
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


@needs("accelerate")
def test_the_trainer_of_transformers_trains_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    _, _, result = pruned("llama")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[], use_cpu=True,
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(result.model, arguments, train_dataset=Texts())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@needs("lightning")
def test_lightning_trains_it(tmp_path: Path) -> None:
    import lightning

    _, _, result = pruned("llama")

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            loss = self.model(**batch).loss
            self.losses.append(float(loss))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    task = Task(result.model.train())
    trainer = lightning.Trainer(
        max_steps=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(Texts(), batch_size=8))
    assert task.losses[-1] < task.losses[0]


def test_onnx_takes_other_batches_and_other_lengths(tmp_path: Path) -> None:
    for name in ("llama", "bert"):
        _, kwargs, result = pruned(name)
        file = torchshear.export_onnx(result.model, tmp_path / f"{name}.onnx", (), kwargs, check_batches=(1, 3))
        assert file.dynamic_batch
        assert file.dynamic_length


def test_every_family_of_the_list_is_there() -> None:
    assert len(NAMES) == 20
    assert set(GENERATING) <= set(NAMES)
    assert transformers_models.example_inputs


@pytest.mark.parametrize("name", ["deepseek_v3", "mobilevit", "clip", "timesformer", "musicgen_decoder", "levit"])
def test_other_families_are_built_small(name: str) -> None:
    model, _, kwargs = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert not model.training
    model(**kwargs)


def test_a_family_that_the_builder_does_not_know_is_named() -> None:
    with pytest.raises(UnknownFamilyError, match="the builder does not know the family 'idefics'"):
        build("idefics")
