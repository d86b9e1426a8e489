"""Why some wrong rules of `mutations.py` go unnoticed: (operator or "*", beginning of the mutation) -> reason."""

EXPLAINED: dict[tuple[str, str], str] = {}

WITHOUT_CASE = {
    "transformers.grouped_mm_fallback": "its own package registers it, which is an extra; it has the rule of "
    "aten._grouped_mm, which torch.export takes in bfloat16 alone. An operator of this script stands for both.",
    "aten._grouped_mm": "see transformers.grouped_mm_fallback",
}
