"""All architectures of the zoo by names of one kind: `torchvision:resnet18`, `timm:levit_128s`, `transformers:bert`."""

from typing import Any

from torch import nn

from tests.zoo import timm_models, torchvision_models, transformers_models

NAMES = (
    *(f"torchvision:{name}" for name in torchvision_models.ALL),
    *(f"timm:{name}" for name in timm_models.NAMES),
    *(f"transformers:{name}" for name in transformers_models.NAMES),
)

# Those whose plans are replayed: also families in which a plan once did not come back as it was.
REPLAYED = (
    *NAMES,
    "timm:convit_tiny",
    *(f"transformers:{name}" for name in ("roberta", "electra", "modernbert", "phi")),
)


def build(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model with random weights in eval mode, and its example arguments."""
    library, _, own = name.partition(":")
    if library == "transformers":
        return transformers_models.build(own, seed)
    model, args = {"torchvision": torchvision_models, "timm": timm_models}[library].build(own, seed)
    return model, args, {}
