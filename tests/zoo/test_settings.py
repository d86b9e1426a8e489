"""Models of transformers are saved and loaded again after pruning, where their config can say the widths."""

from pathlib import Path
from typing import Any

import pytest
import torch

import torchshear
from tests.zoo.torchvision_models import load_torchvision
from tests.zoo.transformers_models import is_installed
from tests.zoo.weights import spread_weights

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not is_installed(), reason="needs transformers: make zoo-setup"),
]

TOKENS = torch.randint(1, 98, (2, 12), generator=torch.Generator().manual_seed(1))


def t5() -> Any:
    load_torchvision()
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = T5EncoderModel(config).eval()
    spread_weights(model)
    return model


@pytest.mark.parametrize(
    ("choice", "widths"), [({"roles": "ffn"}, (32, 8, 32, 4)), ({}, (32, 4, 32, 2))], ids=["ffn", "all"]
)
def test_t5_is_loaded_again(choice: dict[str, Any], widths: tuple[int, ...], tmp_path: Path) -> None:
    model = t5()
    small = torchshear.prune(model, kwargs={"input_ids": TOKENS}, **choice).model
    config = small.config
    assert (config.d_model, config.d_kv, config.d_ff, config.num_heads) == widths
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, found = (one(input_ids=TOKENS).last_hidden_state for one in (small, again))
    torch.testing.assert_close(found, expected)


def test_layers_of_their_own_widths_are_in_no_config() -> None:
    ratio = {"encoder.block.0.*.DenseReluDense.wi": 0.5, "encoder.block.1.*.DenseReluDense.wi": 0.25}
    result = torchshear.prune(t5(), kwargs={"input_ids": TOKENS}, ratio=ratio)
    assert result.form == "native"
    assert "no config says these widths" in result.report.form
