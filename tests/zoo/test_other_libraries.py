"""Segmentation, diffusion, contrastive and speech models of other libraries, with what is built on their classes."""

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import torchshear
from tests.zoo.torchvision_models import load_torchvision
from tests.zoo.weights import spread_weights

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


def needs(library: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"needs {library}: make zoo-setup")


def pruned(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, **choice: Any
) -> torchshear.PruneResult:
    spread_weights(model)
    result = torchshear.prune(model.eval(), args, kwargs, **choice)
    assert result.verification.max_error < 1e-9
    assert result.verification.modes == ("eval", "train")
    return result


@needs("segmentation_models_pytorch")
def test_unet_of_segmentation_models() -> None:
    load_torchvision()
    import segmentation_models_pytorch

    torch.manual_seed(0)
    model = segmentation_models_pytorch.Unet("resnet18", encoder_weights=None, classes=3)
    result = pruned(model, (torch.randn(1, 3, 64, 64),))
    assert type(result.model) is type(model)
    assert result.report.after.n_params < 0.27 * result.report.before.n_params
    assert result.model.predict(torch.randn(2, 3, 96, 64)).shape == (2, 3, 96, 64)


@needs("monai")
def test_swin_unetr_of_monai() -> None:
    """Widths of heads stay whole, which costs little beside its convolutions; its own inference takes larger images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.inferers import sliding_window_inference
        from monai.networks.nets import SwinUNETR

    torch.manual_seed(0)
    model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=2)
    result = pruned(model, (torch.randn(1, 1, 64, 64),))
    assert type(result.model) is SwinUNETR
    assert result.report.after.n_params < 0.3 * result.report.before.n_params
    with torch.no_grad():
        out = sliding_window_inference(torch.randn(1, 1, 80, 64), (64, 64), 1, result.model)
    assert out.shape == (1, 2, 80, 64)


@needs("diffusers")
def test_unet_of_diffusers_denoises() -> None:
    """As its pipelines call it: with a scheduler, guidance by two prompts in one batch, and no word on its output."""
    load_torchvision()
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        norm_num_groups=8,
    )
    sample, prompts = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 24)
    small = pruned(model, (sample, torch.tensor([7, 7]), prompts)).model
    assert type(small) is UNet2DConditionModel
    scheduler, latent = DDIMScheduler(), sample[:1]
    scheduler.set_timesteps(3)
    for step in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([latent, latent]), step)
        with torch.no_grad():
            without, given = small(both, step, encoder_hidden_states=prompts).sample.chunk(2)
        latent = scheduler.step(without + 7.5 * (given - without), step, latent).prev_sample
    assert latent.shape == sample[:1].shape
    assert bool(latent.isfinite().all())
    assert small.config.in_channels == 4


@needs("diffusers")
def test_autoencoder_of_diffusers() -> None:
    load_torchvision()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    small = pruned(model, (torch.randn(1, 3, 32, 32),)).model
    assert type(small) is AutoencoderKL
    with torch.no_grad():
        latent = small.encode(torch.randn(2, 3, 48, 32)).latent_dist.mode()
        assert small.decode(latent).sample.shape == (2, 3, 48, 32)


@needs("open_clip")
def test_vision_transformer_of_open_clip() -> None:
    load_torchvision()
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    model = CLIP(
        32,
        CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=8, image_size=32),
        CLIPTextCfg(context_length=12, vocab_size=99, width=48, heads=4, layers=2),
    )
    image, text = torch.randn(2, 3, 32, 32), torch.randint(1, 98, (2, 12))
    result = pruned(model, (image, text))
    assert type(result.model) is CLIP
    with torch.no_grad():
        assert result.model.encode_image(image, normalize=True).shape == (2, 32)
        assert result.model.encode_text(text[:1]).shape == (1, 32)


@needs("transformers")
@pytest.mark.parametrize(("layers", "form"), [(6, "native"), (1, "traced")])
def test_siglip(layers: int, form: str) -> None:
    """Its pooling is an nn.MultiheadAttention, which is as wide inside as outside: whole where that costs little."""
    load_torchvision()
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    own = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    text = own | {"vocab_size": 99, "max_position_embeddings": 16, "projection_size": 32}
    vision = own | {"image_size": 32, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    inputs = {"input_ids": torch.randint(1, 98, (2, 16)), "pixel_values": torch.randn(2, 3, 32, 32)}
    result = pruned(model, kwargs=inputs)
    assert result.form == form
    whole = [group.name for group in result.report.groups if group.kept == group.width]
    assert all(name.startswith("vision_model.head.attention.in_proj_weight[0]") for name in whole)
    assert len(whole) == (2 if form == "native" else 0)
    assert result.report.after.n_params < 0.6 * result.report.before.n_params
    with torch.no_grad():
        assert result.model(**inputs).logits_per_image.shape == (2, 2)
        if form == "native":
            assert result.model.get_image_features(torch.randn(1, 3, 32, 32)).pooler_output.shape == (1, 32)


def test_conformer_of_torchaudio() -> None:
    """Its layers, since the mask that it makes of the lengths depends on their values."""
    try:
        from torchaudio.models import Conformer
    except (ImportError, OSError) as error:
        pytest.skip(f"needs torchaudio, built for this torch: {error}")
    torch.manual_seed(0)
    model = Conformer(input_dim=32, num_heads=4, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=7)
    inputs = (torch.randn(2, 20, 32), torch.tensor([20, 20]))
    result = pruned(model, inputs, submodules=["conformer_layers.0", "conformer_layers.1"])
    assert type(result.model) is Conformer
    assert result.report.after.n_params < 0.6 * result.report.before.n_params
    assert result.model(torch.randn(2, 20, 32), torch.tensor([20, 15]))[0].shape == (2, 20, 32)
