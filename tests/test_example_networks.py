"""Networks of the examples whose data is made or found by the examples themselves: notes of known pitch, and text."""

import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from torch import Tensor

pytest.importorskip("matplotlib", reason="the example draws by the extra 'demo'", exc_type=ImportError)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RATE = 16_000


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path() -> None:
    """Modules of the examples can be imported."""
    sys.path.insert(0, str(EXAMPLES))


def module(name: str) -> ModuleType:
    """Return a module of the examples."""
    return import_module(name)


def pitch(frame: np.ndarray, low: float = 60.0, high: float = 1150.0) -> float:
    """Return the pitch of a frame in hertz, by autocorrelation as YIN normalises it (doi:10.1121/1.1458024).

    Of the squared differences between two windows of the frame, one lag apart, each over the mean of those up to that
    lag, the first minimum below a tenth, else the deepest; refined by a parabola.
    """
    lags = np.arange(math.ceil(RATE / low) + 2)
    size = len(frame) - len(lags)
    apart = np.array([np.square(frame[:size] - frame[lag : lag + size]).sum() for lag in lags])
    depth = apart * lags / np.maximum(apart.cumsum(), 1e-9)
    inner = np.arange(int(RATE / high), len(lags) - 1)
    minima = inner[(depth[inner] <= depth[inner - 1]) & (depth[inner] <= depth[inner + 1])]
    low_enough = minima[depth[minima] < 0.1]
    lag = low_enough[0] if len(low_enough) else minima[depth[minima].argmin()]
    left, middle, right = depth[lag - 1 : lag + 2]
    return RATE / (lag + 0.5 * (left - right) / (left - 2 * middle + right))


@pytest.fixture(scope="module")
def notes() -> tuple[Tensor, Tensor]:
    """Notes of the pitch tracker's example, with their labels."""
    frames, cents = module("crepe").notes(300, 7)
    return frames, cents


def test_notes_are_what_the_tracker_wants(notes: tuple[Tensor, Tensor]) -> None:
    frames, cents = notes
    assert frames.shape == (300, 1024)
    assert frames.dtype == torch.float32
    values = frames.double().numpy()
    assert np.abs(values.mean(1)).max() < 1e-5
    assert np.abs(values.var(1) - 1).max() < 2e-3  # whether divided by 1,024 or 1,023
    assert cents.shape == (300,)


def test_notes_have_the_pitch_of_their_labels(notes: tuple[Tensor, Tensor]) -> None:
    frames, cents = notes
    heard = np.array([1200 * math.log2(pitch(frame) / 10) for frame in frames.double().numpy()])
    apart = 2 ** (np.abs(heard - cents.double().numpy()) / 1200)
    assert (1200 * np.abs(np.log2(apart / apart.round()))).max() < 20
    assert (apart.round() == 1).mean() > 0.97  # nothing that knows no voices is right about all octaves


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the language model's example in its fast mode."""
    folder = tmp_path_factory.mktemp("language_model") / "out"
    command = [sys.executable, str(EXAMPLES / "language_model.py"), "--fast", "--left", "0.5", "--output", str(folder)]
    command += ["--methods", "l1", "wanda, inside", "reconstruction, global"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times faster" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    return folder


@pytest.mark.zoo
def test_language_model_reports_every_step(text_run: Path) -> None:
    document = json.loads((text_run / "report.json").read_text())
    (dense,), rows = document["dense"], document["rows"]
    assert [row["method"] for row in rows] == ["l1", "wanda, inside", "reconstruction, global"]
    for row in rows:
        assert 0.45 < row["macs"] <= 0.5
        assert 1 < row["refitted"] < row["cut"]
        assert abs(row["refitted"] / dense - 1) < 0.02
    assert rows[-1]["distilled"] < rows[-1]["cut"]
    assert rows[-1]["speedup"][1] <= rows[-1]["speedup"][0] <= rows[-1]["speedup"][2]
    assert list(text_run.glob("weights-0-*.safetensors"))


@pytest.mark.zoo
def test_language_model_runs_in_onnxruntime(text_run: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 128, (2, 128))
    for name in ("dense", "pruned"):
        session = InferenceSession(text_run / f"{name}.onnx")
        (scores,) = session.run(None, {"tokens": tokens})
        assert scores.shape == (2, 128, 128)
        other = tokens.copy()
        other[:, 100:] = 0
        (changed,) = session.run(None, {"tokens": other})
        assert np.abs(changed - scores)[:, :100].max() < 1e-4  # nothing looks ahead
        assert np.abs(changed - scores)[:, 100:].max() > 1e-2


def test_text_that_is_held_out_was_not_learnt() -> None:
    learnt, held = ("".join(map(chr, part.tolist())) for part in module("language_model").load_text())
    assert len(learnt) > 250_000
    assert len(held) > 25_000
    passages = [held[start : start + 150] for start in range(0, len(held) - 150, 150)]
    assert sum(passage in learnt for passage in passages) < 0.01 * len(passages)


def test_perplexity_is_that_of_frequencies() -> None:
    codes = torch.randint(0, 4, (1281,), generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])

    class Constant(torch.nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return shares.log().expand(*tokens.shape, 4)

    counts = np.bincount(codes[1:].numpy(), minlength=4)
    wanted = math.prod(share**-count for share, count in zip(shares.double().tolist(), counts / 1280, strict=True))
    assert module("language_model").perplexity(Constant(), codes) == pytest.approx(wanted, rel=1e-5)
