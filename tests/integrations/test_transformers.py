"""Runs of the Trainer of transformers: equal to a loop by hand, resumed with the same numbers, two ranks alike."""

import shutil
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

from tests.integrations import runs
from tests.zoo.torchvision_models import load_torchvision
from torchshear.errors import ArgumentError, CheckpointError
from torchshear.pruners.schedules import Linear

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        find_spec("transformers") is None or find_spec("accelerate") is None, reason="needs them: make zoo-setup"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _torchvision() -> None:
    load_torchvision()  # transformers imports it


class Classifier(nn.Module):
    """A network that computes its loss, as the Trainer expects it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": functional.cross_entropy(logits, labels)}


def trainer_of(model: nn.Module, callback: Any, folder: Path | str, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return None

        def create_optimizer(self, *args: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=runs.LR, momentum=0.9)
            return self.optimizer

    arguments = TrainingArguments(
        **{
            "output_dir": str(folder), "use_cpu": True, "num_train_epochs": 2, "max_grad_norm": 0.1,
            "per_device_train_batch_size": runs.BATCH, "lr_scheduler_type": "constant", "save_strategy": "no",
            "logging_steps": 1, "report_to": "none", "disable_tqdm": True, **options,
        }
    )  # fmt: skip
    return InOrder(model, arguments, train_dataset=runs.Samples(), callbacks=[callback])


def callback_of(model: nn.Module, resume_from: Path | None = None, **options: Any) -> Any:
    from torchshear.integrations.transformers import PruningCallback

    return PruningCallback(runs.session_of(model, **options), resume_from=resume_from)


@pytest.mark.parametrize("bf16", [False, True])
def test_gathering_and_clipping_equal_a_loop_by_hand(bf16: bool, tmp_path: Path) -> None:
    model = Classifier(runs.network())
    callback = callback_of(model.net)
    trainer_of(model, callback, tmp_path, gradient_accumulation_steps=3, bf16=bf16).train()
    expected, state = runs.by_hand(2, 3, 0.1, clips_first=True, dtype=torch.bfloat16 if bf16 else None)
    for name, value in model.net.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5 if not bf16 else 2e-2, atol=1e-6 if not bf16 else 1e-3)
    runs.check_result(callback.result)
    history = callback.result.history
    assert history.renewals == expected.history.renewals
    assert history.steps == tuple(range(1, 9))
    with torch.no_grad():
        first = sum(float(runs.loss_of(runs.network(), range(4 * i, 4 * i + 4))) for i in range(3)) / 3
    assert history.losses[0] == pytest.approx(first, abs=2e-4 if not bf16 else 2e-2)


@pytest.mark.parametrize("every", [5, 12])
def test_resumed_it_goes_on_with_the_same_numbers(every: int, tmp_path: Path) -> None:
    def run(resume: Any = None, **options: Any) -> tuple[nn.Module, Any]:
        model = Classifier(runs.network())
        callback = callback_of(model.net, **{"schedule": Linear(start=2, end=16, frequency=7), **options})
        trainer = trainer_of(model, callback, tmp_path / "out", save_strategy="steps", save_steps=every)
        trainer.train(resume_from_checkpoint=resume)
        return model, callback.result

    whole, result = run()
    folder = tmp_path / "out" / f"checkpoint-{every}"
    resumed, again = run(str(folder))
    runs.assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    runs.assert_same(again.model.state_dict(), result.model.state_dict())
    assert again.history == result.history
    with pytest.raises(ArgumentError, match="ratio"):
        run(str(folder), ratio=0.4)
    moved = shutil.copytree(folder, tmp_path / "moved" / folder.name)
    elsewhere, _ = run(str(moved), resume_from=moved)
    runs.assert_same(dict(elsewhere.state_dict()), dict(whole.state_dict()))
    with pytest.raises(CheckpointError, match="is not the checkpoint that the trainer has loaded"):
        run(str(folder), resume_from=tmp_path / "out" / "checkpoint-24")
    (folder / "torchshear_session.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(str(folder))
    (folder / "torchshear_session.pt").unlink()
    with pytest.raises(CheckpointError, match="holds no torchshear_session.pt"):
        run(str(folder))


def _train(folder: str) -> dict[str, Tensor]:
    model = Classifier(runs.network())
    callback = callback_of(model)
    trainer = trainer_of(model, callback, folder, gradient_accumulation_steps=2, ddp_backend="gloo")
    trainer.train()
    assert trainer.args.world_size == 2
    runs.check_result(replace(callback.result, model=callback.result.model.net))
    return {**model.state_dict(), **{f"small.{name}": one for name, one in callback.result.model.state_dict().items()}}


def test_two_ranks_agree_bit_for_bit(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(runs.as_rank, (str(tmp_path), port, _train), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    runs.assert_same(first, second)


def test_a_pretrained_model_with_bf16_and_its_own_checkpoints(tmp_path: Path) -> None:
    """Tied embeddings, save_pretrained with masks, and the result is a model of the same class."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    torch.manual_seed(0)
    tokens = torch.randint(1, 50, (16, 8))
    data = [{"input_ids": one, "labels": one} for one in tokens]

    def run(resume: str | None) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=False)
        model = GPT2LMHeadModel(config)
        from torchshear import PruningSession
        from torchshear.integrations.transformers import PruningCallback

        schedule = Linear(start=1, end=5, frequency=2)
        session = PruningSession(
            model, kwargs={"input_ids": tokens[:2]}, roles="ffn", criterion="taylor", schedule=schedule
        )
        callback = PruningCallback(session)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, bf16=True, num_train_epochs=2, per_device_train_batch_size=4,
            save_steps=3, report_to="none", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train(resume_from_checkpoint=resume)
        return model, callback.result

    model, result = run(None)
    assert type(result.model) is type(model)
    assert result.model.transformer.h[0].mlp.c_fc.weight.shape == (16, 32)
    assert "forward" not in vars(result.model)
    assert result.history.reached == 0.5
    resumed, again = run(str(tmp_path / "checkpoint-3"))
    runs.assert_same(dict(resumed.state_dict()), dict(model.state_dict()))
    runs.assert_same(again.model.state_dict(), result.model.state_dict())


def test_what_is_refused(tmp_path: Path) -> None:
    from torchshear.integrations.transformers import PruningCallback

    model = Classifier(runs.network())
    with pytest.raises(ArgumentError, match="session is str"):
        PruningCallback("session")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="a checkpoint"):
        PruningCallback(runs.session_of(runs.network()), resume_from=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="that is not in the Classifier of the trainer"):
        trainer_of(model, callback_of(runs.network()), tmp_path).train()
    callback = callback_of(model.net)
    with pytest.raises(ArgumentError, match="made no step of the optimizer"):
        trainer_of(model, callback, tmp_path, num_train_epochs=0).train()
    with pytest.raises(ArgumentError, match="there is no result yet"):
        _ = callback.result
    other = Classifier(runs.network())
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}
    trainer = trainer_of(other, callback_of(other.net), tmp_path)
    for name, value in best.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ArgumentError, match="load_best_model_at_end"):
        trainer.train()


def test_accelerate_as_the_page_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/training.md runs, and its result is of half of the channels."""
    import re

    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the trainers before
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "training.md"
    code = re.search(r"```py\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page", "model": runs.network(), "x": torch.randn(2, runs.N_FEATURES)}
    x, labels = runs.samples()
    names["loader"] = torch.utils.data.DataLoader(list(zip(x, labels, strict=True)), batch_size=runs.BATCH)
    exec(compile(code.group(1), str(page), "exec"), names)
    runs.check_result(names["result"])
    assert (tmp_path / "checkpoint").is_dir()
