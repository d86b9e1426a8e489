"""Runs of Lightning's Trainer: equal to a loop by hand, resumed with the same numbers, two ranks bit for bit."""

import socket
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from tests.integrations import runs
from tests.zoo.torchvision_models import load_torchvision
from torchshear.errors import ArgumentError, CheckpointError
from torchshear.pruners.schedules import Linear

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("lightning") is None, reason="needs lightning: make zoo-setup"),
]


@pytest.fixture(scope="module", autouse=True)
def _torchvision() -> None:
    load_torchvision()  # Lightning imports it


def module_of(net: nn.Module, is_manual: bool = False, n_optimizers: int = 1, is_by_index: bool = False) -> Any:
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.automatic_optimization = not is_manual

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if is_by_index:  # loaders of torch begin anew where a training resumes
                return runs.loss_of(self.net, range(runs.BATCH * batch_idx, runs.BATCH * (batch_idx + 1)))
            loss = functional.cross_entropy(self.net(batch["x"]), batch["labels"])
            if is_manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            made = [torch.optim.SGD(self.net.parameters(), lr=runs.LR, momentum=0.9) for _ in range(n_optimizers)]
            return made[0] if n_optimizers == 1 else made

    return Classifier()


def trainer_of(callback: Any, folder: Path | str, **options: Any) -> Any:
    from lightning.pytorch import Trainer

    settings = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder, **options,
    }  # fmt: skip
    return Trainer(callbacks=[callback, *settings.pop("beside", [])], **settings)


def loader() -> DataLoader:
    return DataLoader(runs.Samples(), batch_size=runs.BATCH)


def callback_of(model: nn.Module, **options: Any) -> Any:
    from torchshear.integrations.lightning import PruningCallback

    return PruningCallback(runs.session_of(model, **options))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gathering_and_clipping_equal_a_loop_by_hand(precision: str, tmp_path: Path) -> None:
    net = runs.network()
    callback = callback_of(net)
    trainer = trainer_of(
        callback, tmp_path, accumulate_grad_batches=3, gradient_clip_val=0.1, precision=precision
    )  # fmt: skip
    trainer.fit(module_of(net), loader())
    dtype = torch.bfloat16 if precision == "bf16-mixed" else None
    expected, state = runs.by_hand(2, 3, 0.1, clips_first=False, dtype=dtype)
    runs.assert_same(dict(net.state_dict()), state)
    runs.assert_same(callback.result.model.state_dict(), expected.model.state_dict())
    runs.check_result(callback.result)
    history = callback.result.history
    assert history.renewals == expected.history.renewals
    assert history.steps == tuple(range(1, 9))
    with torch.no_grad():
        first = sum(float(runs.loss_of(runs.network(), range(4 * i, 4 * i + 4))) for i in range(3)) / 3
    assert history.losses[0] == pytest.approx(first, rel=1e-6 if dtype is None else 1e-2)


@pytest.mark.parametrize("every", [5, 12])
def test_resumed_it_goes_on_with_the_same_numbers(every: int, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(**fit: Any) -> tuple[nn.Module, Any]:
        net = runs.network()
        callback = callback_of(net, schedule=Linear(start=2, end=16, frequency=7))
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=every, save_top_k=-1)
        trainer = trainer_of(callback, tmp_path, beside=[saving], enable_checkpointing=True)
        trainer.fit(module_of(net, is_by_index=True), loader(), **fit)
        return net, callback.result

    whole, result = run()
    path = next(tmp_path.glob(f"*step={every}.ckpt"))
    resumed, again = run(ckpt_path=path, weights_only=True)
    runs.assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    runs.assert_same(again.model.state_dict(), result.model.state_dict())
    assert again.history == result.history
    with pytest.raises(ArgumentError, match="ratio"):
        trainer_of(callback_of(net := runs.network(), ratio=0.4), tmp_path).fit(
            module_of(net), loader(), ckpt_path=path
        )


def _train(folder: str) -> dict[str, Tensor]:
    net = runs.network()
    callback = callback_of(net)
    trainer = trainer_of(
        callback, folder, devices=2, strategy="ddp", accumulate_grad_batches=2, gradient_clip_val=0.1
    )  # fmt: skip
    trainer.fit(module_of(net), loader())
    assert trainer.world_size == 2
    runs.check_result(callback.result)
    return {**net.state_dict(), **{f"small.{name}": one for name, one in callback.result.model.state_dict().items()}}


def test_two_ranks_agree_bit_for_bit(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(runs.as_rank, (str(tmp_path), port, _train), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    runs.assert_same(first, second)


def test_a_session_of_the_lightning_module_and_manual_optimization(tmp_path: Path) -> None:
    module = module_of(runs.network(), is_manual=True)
    callback = callback_of(module)
    trainer_of(callback, tmp_path, max_epochs=1).fit(module, loader())
    _, state = runs.by_hand(1, 1, 1e9, clips_first=False)
    runs.assert_same(dict(module.net.state_dict()), state)
    runs.check_result(replace(callback.result, model=callback.result.model.net))


def test_a_scaler_that_leaves_a_step_out(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    net = runs.network()
    callback = callback_of(net, schedule=Linear(start=24, end=40, frequency=8))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)  # overflows in half precision at first
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer_of(callback, tmp_path, plugins=[plugin], max_epochs=4).fit(module_of(net), loader())
    assert scaler.get_scale() < 2.0**30
    runs.check_result(callback.result)
    assert callback.result.history.steps[-1] == 48


def test_what_is_refused(tmp_path: Path) -> None:
    from torchshear.integrations.lightning import PruningCallback

    net = runs.network()
    with pytest.raises(ArgumentError, match="session is int"):
        PruningCallback(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="form="):
        PruningCallback(runs.session_of(runs.network()), form="small")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Leave optimizer= away"):
        callback_of(other := runs.network(), optimizer=torch.optim.SGD(other.parameters(), 0.1))
    callback = callback_of(runs.network())
    with pytest.raises(ArgumentError, match="that is not in the Classifier of the trainer"):
        trainer_of(callback, tmp_path).fit(module_of(net), loader())
    with pytest.raises(ArgumentError, match="there is no result yet"):
        _ = callback.result
    with pytest.raises(ArgumentError, match="2 of 2 optimizers"):
        trainer_of(callback_of(net), tmp_path).fit(module_of(net, is_manual=True, n_optimizers=2), loader())
    module = module_of(idle := runs.network(), is_manual=True)
    module.training_step = lambda batch, batch_idx: None
    with pytest.raises(ArgumentError, match="made no step of the optimizer"):
        trainer_of(callback_of(idle), tmp_path, max_epochs=1).fit(module, loader())


def test_a_checkpoint_without_a_session(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    net = runs.network()
    runs.session_of(net)  # masks only
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module_of(net), loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    callback = callback_of(again := runs.network())
    with pytest.raises(CheckpointError, match="holds no state of a pruning session"):
        trainer_of(callback, tmp_path).fit(module_of(again), loader(), ckpt_path=tmp_path / "plain.ckpt")
