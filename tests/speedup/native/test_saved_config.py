"""Models that are saved with a config, which follows where it can say the widths; else the report says it cannot."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.networks import randomise

TOKENS = torch.arange(10).reshape(2, 5)


@dataclass
class Config:
    width: int = 16
    inner: int = 32
    n_layers: int = 2
    n_tokens: int = 32  # as wide as the inner layers by chance


class Model(nn.Module):
    """As libraries have them: made of a config, and saved with it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.table, self.leave = nn.Embedding(config.n_tokens, config.width), nn.Linear(config.width, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(config.width, config.inner), nn.ReLU(), nn.Linear(config.inner, config.width))
            for _ in range(config.n_layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.leave(x)

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(asdict(self.config)))
        torch.save(self.state_dict(), folder / "weights.pt")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Model":
        model = cls(Config(**json.loads((folder / "config.json").read_text())))
        model.load_state_dict(torch.load(folder / "weights.pt"))
        return model.eval()


class Scaled(Model):
    """Made with a factor of its width, which a pruned model keeps and one of a smaller config would not have."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.factor = config.inner**-0.5

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.factor


@pytest.mark.parametrize("ratio", [0.5, {"ffn": 0.25}, {"residual": 0.5, "ffn": 0.75}])
def test_even_widths_are_saved_and_loaded_again(ratio: float | dict[str, float], tmp_path: Path) -> None:
    model = randomise(Model(Config()).eval(), 3)
    result = torchshear.prune(model, (TOKENS,), ratio=ratio)
    result.model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    torch.testing.assert_close(again(TOKENS), result.model(TOKENS))
    assert (again.config.n_tokens, again.config.n_layers) == (32, 2)
    assert model.config == Config()
    assert "no config" not in result.report.form


def test_a_plan_gives_the_same_config(tmp_path: Path) -> None:
    result = torchshear.prune(randomise(Model(Config()).eval(), 3), (TOKENS,))
    result.plan.save(tmp_path / "plan.json")
    again = torchshear.shrink(Model(Config()).eval(), torchshear.PruningPlan.load(tmp_path / "plan.json"))
    assert again.config == result.model.config == Config(8, 16)


@pytest.mark.parametrize(("kind", "ratio"), [(Model, {"layers.0.0": 0.5, "layers.1.0": 0.25}), (Scaled, {"ffn": 0.5})])
def test_what_no_config_says_is_in_the_report(kind: type[Model], ratio: dict[str, float]) -> None:
    """Widths that are not even, and a model of the same shapes that computes something else."""
    result = torchshear.prune(randomise(kind(Config()).eval(), 3), (TOKENS,), ratio=ratio)
    assert result.form == "native"
    assert result.model.config == Config()
    assert "no config says these widths" in result.report.form
    assert "keep the plan and a state_dict" in str(result.report)
