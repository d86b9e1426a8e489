"""A plan from a file makes of a fresh model what `prune` gave: form, attributes, hooks, tensors and outputs."""

import pytest

from tests.zoo import timm_models, torchvision_models, transformers_models, zoo
from tests.zoo.replaying import replay

LIBRARIES = {"torchvision": torchvision_models, "timm": timm_models, "transformers": transformers_models}
NAMES = (
    *(f"torchvision:{name}" for name in ("resnet18", "vit_b_16")),
    "timm:convit_tiny",
    *(
        f"transformers:{name}"
        for name in (
            "bert", "roberta", "electra", "albert", "distilbert", "deberta-v2", "modernbert", "phi", "falcon", "llama",
            "swin", "vit",
        )
    ),
)  # fmt: skip
# Heads and head dimensions stand in attributes of most, and stay whole in ModernBERT; hooks keep the scale in some.
WITH_HOOKS = {"transformers:deberta-v2", "transformers:falcon"}
WITHOUT_ATTRIBUTES = {"torchvision:resnet18", "transformers:deberta-v2", "transformers:modernbert"}

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_model_becomes_what_prune_gave(name: str) -> None:
    if not LIBRARIES[name.partition(":")[0]].is_installed():
        pytest.skip("needs the libraries of the zoo: make zoo-setup")
    found = replay(name)
    assert found.differences == ()
    assert found.n_equal == found.n_tensors
    assert found.error <= 1e-6
    assert (found.n_scales > 0) == (name in WITH_HOOKS)
    assert (found.n_sizes > 0) == (found.form == "native" and name not in WITHOUT_ATTRIBUTES)


def test_all_models_are_replayed_by_the_benchmark() -> None:
    assert set(NAMES) <= set(zoo.REPLAYED)
