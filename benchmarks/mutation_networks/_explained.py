"""Why some wrong rules of `mutations.py` go unnoticed: (operator or "*", beginning of the mutation) -> reason."""

EXPLAINED: dict[tuple[str, str], str] = {}

MADE = "it makes values of sizes that are not cut; it reads nothing and demands nothing"
WITHOUT_CASE = {
    **dict.fromkeys(
        (
            "aten.arange",
            "aten.eye",
            "aten.linspace",
            "aten.rand",
            "aten.randn",
            "aten.scalar_tensor",
            "aten.tril_indices",
            "aten.triu_indices",
        ),
        MADE,
    ),
    "aten.fake_quantize_per_channel_affine": "it takes no grids in float64, test_quantization.py",
    "aten.fused_moving_avg_obs_fake_quant": "it writes to buffers of observers, test_quantization.py",
    "torchvision.deform_conv2d": "torchvision is an extra; the rule refuses, test_deformable.py",
    "transformers.grouped_mm_fallback": "its own package registers it, which is an extra; it has the rule of "
    "aten._grouped_mm, which torch.export takes in bfloat16 alone. An operator of this script stands for both.",
    "aten._grouped_mm": "see transformers.grouped_mm_fallback",
}
