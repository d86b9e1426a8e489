"""Norms over masked channels: a network that trains with masks is the small one that comes of it, step by step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.training.loops import sgd, train
from torchshear import PruningSession
from torchshear.pruners.masks import Masks, apply
from torchshear.pruners.schedules import AGP
from torchshear.training._kept_norms import KeptNorm, lay_kept_norms

WIDTH = 12


class OwnRms(nn.Module):
    """A norm as language models write it themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(WIDTH)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class ChannelsFirst(nn.LayerNorm):
    """A norm over the channels of maps, as of convolutional networks that learnt from transformers."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Stream(nn.Module):
    """A residual stream of tokens with a norm in front of each layer."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 5)
        self.norms = nn.ModuleList([norm() for _ in range(3)])
        self.ups = nn.ModuleList([nn.Linear(WIDTH, 16) for _ in range(2)])
        self.downs = nn.ModuleList([nn.Linear(16, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, down in zip(self.norms[:2], self.ups, self.downs, strict=True):
            x = x + down(functional.gelu(up(norm(x))))
        out: Tensor = self.head(self.norms[2](x))
        return out


class Maps(nn.Module):
    """The same of maps."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(2, WIDTH, 1), nn.Linear(WIDTH, 5)
        self.norms = nn.ModuleList([norm() for _ in range(2)])
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (2, 2, 2)))
        x = x + self.mix(self.norms[0](x)).relu()
        out: Tensor = self.head(self.norms[1](x).mean((2, 3)))
        return out


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: Stream(lambda: nn.LayerNorm(WIDTH)),
    "layer norm without a bias": lambda: Stream(lambda: nn.LayerNorm(WIDTH, eps=1e-3, bias=False)),
    "rms norm": lambda: Stream(lambda: nn.RMSNorm(WIDTH)),
    "rms norm of its own": lambda: Stream(OwnRms),
    "group norm": lambda: Maps(lambda: nn.GroupNorm(3, WIDTH)),
    "channels first": lambda: Maps(lambda: ChannelsFirst(WIDTH)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    with torch.no_grad():
        for norm in model.norms:
            for parameter in norm.parameters():
                parameter.uniform_(0.5, 1.5)
    return model


def vectors(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 8, generator=generator, dtype=torch.float64), torch.randint(0, 5, (8,), generator=generator)


def begun(name: str, **options: Any) -> tuple[PruningSession, torch.optim.Optimizer]:
    model = made(name)
    optimizer = sgd(model)
    words = {"ratio": 0.5, "schedule": AGP(start=1, end=7, frequency=2), "optimizer": optimizer}
    return PruningSession(model, vectors(0)[0], **(words | options)), optimizer


@pytest.mark.parametrize("name", NETWORKS)
def test_training_with_masks_is_training_of_the_small_network(name: str) -> None:
    losses: dict[int | None, list[float]] = {}
    results = {}
    for every in (None, 1):
        session, optimizer = begun(name, shrink_every=every)
        seen: list[float] = []

        def model(x: Tensor, session: PruningSession = session, seen: list[float] = seen) -> Tensor:
            out: Tensor = session.model(x)
            seen.append(float(out.detach().square().sum()))
            return out

        train(session, model, optimizer, vectors, 10, per_epoch=10)
        losses[every] = seen
        before = session.model(vectors(99)[0])
        results[every] = session.finish().model
        assert torch.allclose(results[every](vectors(99)[0]), before, rtol=1e-9)
    assert losses[None] == pytest.approx(losses[1], rel=1e-9)
    assert results[None].embed.weight.shape[0] == WIDTH // 2
    for one, two in zip(results[None].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-11)


def hooks(model: nn.Module) -> int:
    return sum(isinstance(one, KeptNorm) for module in model.modules() for one in module._forward_hooks.values())


def test_copies_compute_the_same_and_nothing_is_left_in_the_result() -> None:
    session, optimizer = begun("layer norm")
    average = torch.optim.swa_utils.AveragedModel(session.model)
    train(session, session.model, optimizer, vectors, 10, per_epoch=10)
    x = vectors(99)[0]
    assert hooks(session.model) == 3
    assert torch.equal(copy.deepcopy(session.model)(x), session.model(x))
    average.module.load_state_dict(session.model.state_dict())
    assert torch.equal(average(x), session.model(x))
    compiled = torch.compile(session.model, backend="eager")
    assert torch.allclose(compiled(x), session.model(x), rtol=1e-12)
    assert hooks(session.finish().model) == 0


def test_where_nothing_is_masked_the_norm_itself_is_run() -> None:
    session, _ = begun("layer norm")
    session.on_train_begin()
    x = vectors(0)[0]
    assert torch.equal(session.model(x), made("layer norm")(x))


def test_norms_over_whole_maps_and_batch_norms_stay_as_they_are() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(WIDTH, 4, 3), nn.LayerNorm([4, 4, 4]), nn.Flatten(), nn.Linear(64, 5))
    session = PruningSession(model, torch.randn(2, 1, 8, 8), ratio=0.5, schedule=AGP(end=4))
    assert hooks(session.model) == 0


def test_half_precision_is_computed_in_single() -> None:
    norm = KeptNorm(1e-5, -1, True)
    x, kept = 100 * torch.randn(4, WIDTH), torch.arange(WIDTH) % 3 > 0
    ones = kept.float()
    expected = functional.layer_norm(x.half().float()[:, kept], (int(kept.sum()),))
    assert torch.allclose(norm.compute(x.half(), kept, ones, None)[:, kept], expected, atol=1e-5)


class Refusing(nn.LayerNorm):
    """A norm that asserts its shape, and draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        assert x.shape[-1] == WIDTH
        assert len(x) == 8, "asked for another batch"
        return super().forward(x)


def test_a_norm_that_refuses_what_it_is_asked_stays_and_no_random_number_is_drawn() -> None:
    torch.manual_seed(0)
    model = Stream(lambda: Refusing(WIDTH)).double()
    before = torch.random.get_rng_state()
    _lay_on(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert hooks(model) == 0


def _lay_on(model: nn.Module) -> None:
    masks = {name: torch.ones(WIDTH, dtype=torch.bool) for name, _ in model.named_parameters() if "norms" in name}
    apply(model, Masks.of(masks))
    lay_kept_norms(model)
