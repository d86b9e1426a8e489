"""A small RT-DETR of Hugging Face with random weights: it picks its queries by top-k."""

import torch
from torch import Tensor, nn

from tests.zoo.torchvision_models import load_torchvision
from tests.zoo.weights import raise_gains, spread_weights


def build_rt_detr(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in eval mode, and two images as its keywords."""
    load_torchvision()  # where its kernels do not load, transformers cannot import its models either
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    torch.manual_seed(seed)
    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[24, 32, 48],
        encoder_hidden_dim=32,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_layers=2,
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        num_queries=30,
        num_labels=7,
    )
    model = RTDetrForObjectDetection(config)
    spread_weights(model)
    raise_gains(model)
    return model.eval(), {"pixel_values": torch.randn(2, 3, 128, 128)}
