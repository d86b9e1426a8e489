"""Why some wrong rules of `mutations.py` go unnoticed: (operator or "*", beginning of the mutation) -> reason."""

EXPLAINED: dict[tuple[str, str], str] = {}
