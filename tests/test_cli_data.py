"""Data, losses, configs and comparisons on the command line, bad input included."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_model
from torch.nn import functional
from typer.testing import CliRunner

import torchshear
from torchshear.cli import _compare as compare_command
from torchshear.cli import app, load_example
from torchshear.cli._data import NamedLoader, load_loss
from torchshear.cli._folder import RECORD
from torchshear.errors import DataError
from torchshear.options import CompensationMethod
from torchshear.speedup import OnnxFile

NETS = '''
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.out = nn.Conv2d(8, 12, 3), nn.Linear(12, 4)

    def forward(self, x):
        y = self.two(self.norm(self.one(x)).relu()).relu()
        return self.out(y.mean((2, 3)))


class WithLoss(Net):
    """Takes labels and gives a dictionary with its loss, as models of transformers do."""

    def forward(self, x, labels):
        logits = super().forward(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def net():
    torch.manual_seed(0)
    return Net(), (torch.randn(2, 3, 6, 6),)


def with_loss():
    torch.manual_seed(0)
    return WithLoss(), (), {"x": torch.randn(2, 3, 6, 6), "labels": torch.tensor([0, 1])}


batches = [(torch.randn(4, 3, 6, 6, generator=g), torch.randint(0, 4, (4,), generator=g))
           for g in [torch.Generator().manual_seed(s) for s in range(3)]]
calls = []


def loader():
    calls.append(1)
    return batches


def stream():
    calls.append(1)
    yield from batches


def dicts():
    return [{"x": x, "labels": y} for x, y in batches]


def strange():
    return [{"image": x, "labels": y} for x, y in batches]


def broken_stream():
    yield batches[0]
    raise OSError("disk gone")


def failing_loader():
    raise FileNotFoundError("no data here")


def no_loader():
    return 3


class data:
    ready = batches


def own_loss(output, target):
    return functional.cross_entropy(output, target)


def bad_loss(output, target):
    return output.nothing


def evaluate(model):
    with torch.no_grad():
        return -functional.cross_entropy(model(batches[0][0]), batches[0][1])


def scored():
    return (*net(), evaluate)


def scored_with_kwargs():
    model, args = net()
    return model, (), {"x": args[0]}, lambda model: float(model(x=batches[0][0]).mean().detach())


def text_score():
    return (*net(), lambda model: "high")


def failing_score():
    return (*net(), lambda model: 1 / 0)


def kwargs_last():
    return (*net(), {})


def model_last():
    return (*net(), Net())


def too_many():
    return (*net(), {}, evaluate, 1)
'''


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "data_nets", raising=False)


def run(*arguments: str, columns: int = 120) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns)})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def no_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are not exported where a test is about other things: that takes most of a run."""

    def export(model: torch.nn.Module, path: Path, *_: object) -> OnnxFile:
        path.touch()
        return OnnxFile(path, 0, 18, 0.0, (1,), True)

    monkeypatch.setattr(torchshear, "export_onnx", export)


def prune(*options: str, target: str = "data_nets:net", columns: int = 120) -> tuple[dict, str]:
    code, text, errors = run(
        "prune", target, "--output", "out", "--align", "none", "--no-bench", *options, columns=columns
    )
    assert code == 0, errors
    assert errors == ""  # no progress where there is no terminal
    return json.loads(Path("out/report.json").read_text()), text


def kept() -> dict[str, list[int]]:
    return {name: units.tolist() for name, units in torchshear.PruningPlan.load("out/plan.json").kept.items()}


def expected(criterion: str, **words: object) -> torchshear.PruneResult:
    model, args, kwargs = load_example("data_nets:net")
    from_module = NamedLoader("data_nets:batches")
    return torchshear.prune(model, args, kwargs, criterion=criterion, data=from_module, batches=3, **words)  # type: ignore[arg-type]


# -- data and losses --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_onnx")
@pytest.mark.parametrize("data", ["loader", "stream", "batches", "data.ready"])
def test_data_by_name(data: str) -> None:
    document, _ = prune("--criterion", "apoz", "--data", f"data_nets:{data}", "--batches", "3")
    assert document["request"]["criterion"] == "apoz"
    assert kept() == {name: units.tolist() for name, units in expected("apoz").plan.kept.items()}


@pytest.mark.usefixtures("no_onnx")
@pytest.mark.parametrize("loss", ["cross_entropy", "dense", "data_nets:own_loss"])
def test_losses_by_name(loss: str) -> None:
    prune("--criterion", "taylor", "--data", "data_nets:loader", "--loss", loss, "--batches", "3")
    plan = expected("taylor", loss_fn="dense" if loss == "dense" else functional.cross_entropy).plan
    assert kept() == {name: units.tolist() for name, units in plan.kept.items()}


@pytest.mark.usefixtures("no_onnx")
def test_the_loss_that_the_model_gives() -> None:
    options = ("--criterion", "taylor", "--batches", "3", "--exclude", "out")
    prune(*options, "--data", "data_nets:dicts", "--loss", "output", target="data_nets:with_loss")
    own = kept()
    prune(*options, "--data", "data_nets:loader", "--loss", "cross_entropy")
    assert own == kept()


def test_named_losses_are_those_of_torch() -> None:
    output, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert load_loss("cross_entropy")(output, target) == functional.cross_entropy(output, target)
    assert load_loss("mse")(output, output + 2) == pytest.approx(4.0)
    own = load_loss("output")
    scalar = torch.tensor(0.5)
    assert own({"loss": scalar}, None) is own((scalar, output), None) is own(scalar, None) is scalar

    class Output:
        loss = scalar

    assert own(Output(), None) is scalar
    for without in (output, {"logits": output}, (output,), (), None):
        with pytest.raises(DataError, match="loss 'output': the output is .* without a loss; expected a scalar"):
            own(without, None)
    with pytest.raises(
        DataError, match="loss 'mse': the output of the model is an object of type dict; expected a ten"
    ):
        load_loss("mse")({}, target)
    with pytest.raises(DataError, match="loss 'cross_entropy': the target of the batch is an object of type tuple"):
        load_loss("cross_entropy")(output, (output,))
    with pytest.raises(DataError, match=r"loss 'mse': the output has shape \(4, 1\), the target \(4,\); expected one"):
        load_loss("mse")(torch.ones(4, 1), torch.ones(4))
    with pytest.raises(
        DataError, match="loss 'cross_entropy' fails: IndexError: Target 7 .*Check what the loader gives"
    ):
        load_loss("cross_entropy")(output, torch.tensor([7, 0, 0, 0]))


def test_each_pass_starts_anew_without_making_the_data_twice() -> None:
    module = __import__("data_nets")
    listed = NamedLoader("data_nets:loader")
    assert [len(list(listed)) for _ in range(3)] == [3, 3, 3]
    assert len(module.calls) == 1
    streamed = NamedLoader("data_nets:stream")
    said: list[str] = []
    streamed.say = said.append
    assert [len(list(streamed)) for _ in range(2)] == [3, 3]
    assert len(module.calls) == 3
    assert said[:3] == [f"data_nets:stream: batch {number}" for number in (1, 2, 3)]


@pytest.mark.usefixtures("no_onnx")
@pytest.mark.parametrize("kind", ["constants", "means", "statistics", "refit"])
def test_compensations(kind: Any) -> None:
    document, text = prune("--criterion", "apoz", "--data", "data_nets:stream", "--batches", "3", "--compensate", kind)
    folded = re.search(rf"^folded +{kind} of \d+ channels, \d+ left at zero: error .* in float64", text, re.MULTILINE)
    assert bool(folded) == (kind in ("constants", "means"))
    assert ("batch norms estimated anew" in text) == (kind == "statistics")
    assert bool(re.search(r"^refitted +\d of \d layers on the data, after the proof", text, re.M)) == (kind == "refit")
    assert document["compensation"] == kind
    if folded:
        assert document["fold"]["max_error"] < 1e-9
        assert document["fold"]["kind"] == kind
    result = expected("apoz", compensate=kind)
    assert (document["report"]["refit"] is None) == (kind != "refit")
    if result.refit is not None:
        layers = [(layer["name"], layer["method"]) for layer in document["report"]["refit"]["layers"]]
        assert layers == [(layer.name, layer.method) for layer in result.refit.layers]
        assert document["report"]["refit"]["error_after"] == pytest.approx(result.refit.error_after, rel=1e-3)
        assert document["report"]["refit"]["is_kept"] is True
        assert "Refit: error of layers on samples held out" in text
        assert re.search(r"^outputs +relative squared error \S+ -> \S+ on \d samples held out; fitted", text, re.M)
    model, _, _ = load_example("data_nets:net")
    small = torchshear.shrink(model, torchshear.PruningPlan.load("out/plan.json"))
    load_model(small, "out/model.safetensors")
    slack = 1e-4 if kind == "refit" else 0  # two runs of least squares differ by rounding, as memory is aligned
    for name, tensor in result.model.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor, rtol=slack, atol=slack)


# -- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_onnx")
@pytest.mark.parametrize("columns", [80, 120])
def test_a_config_prints_what_it_means(columns: int) -> None:
    Path("config.yaml").write_text("- op_names: [one]\n  sparsity: 0.5\n- op_types: [Linear]\n  sparsity: 0.25\n")
    document, text = prune("--config", "config.yaml", columns=columns)
    assert text.startswith("Config\n")
    for word in ("one.weight[0]", "config_list[0]", "out_channel", "removed", "model output 0"):
        assert word in text
    assert max(map(len, text.splitlines())) <= columns
    assert {group["name"]: group["kept"] for group in document["report"]["groups"]} == {
        "one.weight[0]": 4,
        "two.weight[0]": 12,
    }
    assert document["request"]["config"]["rows"][0]["layer"] == "one"


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--criterion", "apoz"), "the criterion 'apoz' looks at activations; give batches as --data."),
        (("--criterion", "apo"), "--criterion 'apo'; expected one of"),
        (("--criterion", "apoz", "--data", "data_nets"), "cannot read 'data_nets'. Expected package.module:loader"),
        (("--criterion", "apoz", "--data", "data_net:loader"), "no module 'data_net' in"),
        (("--criterion", "apoz", "--data", "data_nets:lader"), "has no 'lader'. Did you mean 'loader'? Expected a fun"),
        (("--criterion", "apoz", "--data", "data_nets:no_loader"), "gives an object of type int. Expected a function"),
        (("--criterion", "apoz", "--data", "data_nets:NETS_"), "has no 'NETS_'"),
        (
            ("--criterion", "apoz", "--data", "data_nets:failing_loader"),
            "FileNotFoundError: no data here (at data_nets",
        ),
        (("--criterion", "apoz", "--data", "data_nets:broken_stream"), "OSError: disk gone (at data_nets.py:"),
        (("--criterion", "apoz", "--data", "data_nets:strange"), "batch 0 is a dictionary with image, labels"),
        (
            ("--criterion", "apoz", "--data", "data_nets:loader", "--batches", "4"),
            "the loader ended after 3 of 4 batches",
        ),
        (
            ("--criterion", "taylor", "--data", "data_nets:loader"),
            "looks at gradients; give a loss as --loss",
        ),
        (("--data", "data_nets:loader"), "data is given, and no criterion looks at it (l1)"),
        (("--compensate", "refit"), "--compensate 'refit' runs data; give batches as --data, or write 'constants'"),
        (("--memory", "1000"), "--memory is what a refit may take; give it with --compensate 'refit'"),
        (("--compensate", "refits"), "--compensate 'refits'; expected one of 'none', 'refit', 'statistics'"),
        (
            ("--loss", "cros_entropy"),
            "loss 'cros_entropy'; expected one of dense, cross_entropy, mse, output, or pack",
        ),
        (("--loss", "cros_entropy"), "Close to it: cross_entropy"),
        (("--loss", "data_nets:own_los"), "has no 'own_los'. Did you mean 'own_loss'?"),
        (("--loss", "data_nets:batches"), "data_nets:batches is an object of type list. Expected a function of output"),
        (
            ("--criterion", "taylor", "--data", "data_nets:loader", "--loss", "data_nets:bad_loss", "--batches", "3"),
            "loss 'data_nets:bad_loss' fails: AttributeError: 'Tensor' object has no attribute 'nothing' (at data_nets",
        ),
        (
            ("--criterion", "taylor", "--data", "data_nets:loader", "--loss", "output", "--batches", "3"),
            "loss 'output': the output is an object of type Tensor without a loss",
        ),
        (("--config", "no.yaml"), "config file 'no.yaml' cannot be read"),
        (("--config", "wrong.yaml"), "config_list[1]: 'sparcity' is no key of an NNI entry. Close to it: sparsity"),
        (("--config", "fits_nothing.yaml"), "config_list[0]"),
        (("--config", "twice.yaml"), "the key 'sparsity' stands twice in one mapping, again in line 3"),
        (("--config", "good.yaml", "--ratio", "0.5"), "--config says which layers lose how much, and --ratio 0.5"),
        (("--config", "good.yaml", "--min-ratio", "0.1"), "and --min-ratio 0.1 says something else"),
        (("--target-macs", "0"), "--target-macs 0.0; expected what may be left"),
    ],
)
def test_bad_words_of_prune(options: tuple[str, ...], message: str) -> None:
    Path("good.yaml").write_text("- op_names: [one]\n  sparsity: 0.5\n")
    Path("wrong.yaml").write_text("- op_names: [one]\n  sparsity: 0.5\n- op_names: [two]\n  sparcity: 0.5\n")
    Path("fits_nothing.yaml").write_text("- op_names: [three]\n  sparsity: 0.5\n")
    Path("twice.yaml").write_text("- op_names: [one]\n  sparsity: 0.5\n  sparsity: 0.4\n")
    code, text, errors = run("prune", "data_nets:net", "--output", "out", "--align", "none", *options)
    assert (code, text) == (1, "")
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert not Path("out").exists()


def test_help_lists_the_criteria() -> None:
    for command in ("prune", "compare"):
        code, text, _ = run(command, "--help")
        words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
        assert code == 0
        assert all(name in words for name in torchshear.pruners.registered_criteria())
        assert all(f" {method} " in words for method in get_args(CompensationMethod))


# -- compare ----------------------------------------------------------------------------------------------------------

COMPARE = ("compare", "data_nets:scored", "--seed", "0", "--seed", "1")
DATA = ("--data", "data_nets:stream", "--loss", "cross_entropy", "--batches", "3")


@pytest.mark.parametrize("columns", [80, 120])
def test_compare_prints_and_writes(columns: int) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    options = ("--criteria", "l1", "--criteria", "taylor", "--target-macs", "0.5", "--target-macs", "0.3")
    code, text, errors = run(
        *(*COMPARE, *options, *DATA, "--compensate", "refit", "--memory", "100000", "--scope", "global"),
        *("--output", "new/out"),
        columns=columns,
    )
    assert (code, errors) == (0, "")
    assert max(map(len, text.splitlines())) <= columns
    assert "Net, at most 50% of the MACs" in text
    assert "Net, at most 30% of the MACs" in text
    assert re.search(r"┃ +after cut ┃ +after refit ┃", text)
    assert "written     in new/out: comparison.json, comparison.png, comparison.txt" in text
    document = json.loads(Path("new/out/comparison.json").read_text())
    assert document["target"] == "data_nets:scored"
    assert document["seeds"] == [0, 1]
    assert document["compensation"] == "refit"
    rows = {(row["criterion"], row["budget"]): row for row in document["rows"]}
    assert len(rows) == 8
    for (name, budget), row in rows.items():
        assert len(row["scores"]) == len(row["compensated"]) == (2 if name == "random" else 1)
        assert row["macs_share"] <= (0.5 if "50%" in budget else 0.3)
        assert row["before"] == document["before"]
    assert "control: uniform" in Path("new/out/comparison.txt").read_text()
    assert Path("new/out/comparison.png").read_bytes().startswith(b"\x89PNG")


def test_compare_takes_keyword_arguments_and_ratios() -> None:
    code, text, _ = run("compare", "data_nets:scored_with_kwargs", "--criteria", "l2", "--ratio", "0.5", "--seed", "3")
    assert code == 0
    assert "Net, ratio 0.5" in text
    assert "over seeds" not in text  # one seed has no spread


def test_compare_without_matplotlib_writes_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_command, "has_matplotlib", lambda: False)
    code, text, _ = run(*COMPARE, "--criteria", "l1", "--output", "out")
    assert code == 0
    assert {file.name for file in Path("out").iterdir()} == {"comparison.json", "comparison.txt", RECORD}
    assert "no picture  matplotlib is not installed; install torchshear[demo]" in text


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            "net",
            (),
            "returned (Net, tuple). Expected a function without arguments that returns (model, args, evaluate)",
        ),
        ("kwargs_last", (), "returned an object of type dict as its evaluate, the last. Expected"),
        ("model_last", (), "returned an object of type Net as its evaluate, the last"),
        ("too_many", (), "returned (Net, tuple, dict, function, int). Expected"),
        ("text_score", (), "evaluate gave 'high' of type str for the dense model; expected a number"),
        ("failing_score", (), "evaluate fails on the dense model: ZeroDivisionError: division by zero"),
        ("scored", ("--criteria", "l3"), "--criterion 'l3'; expected one of"),
        ("scored", ("--data", "data_nets:no_loader"), "gives an object of type int"),
        ("scored", ("--loss", "mse"), "--loss is given without data"),
        ("scored", ("--target-macs", "0.5", "--ratio", "0.5"), "expected one kind of budget"),
        ("scored", ("--target-macs", "0.0001"), "the best possible is"),
        ("scored", ("--scope", "lokal"), "--scope 'lokal'; expected one of auto, local, global, isomorphic"),
        ("scored", ("--align", "wide"), "wide"),
        ("scored", ("--seed", "1", "--seed", "1"), "each once"),
    ],
)
def test_bad_words_of_compare(target: str, options: tuple[str, ...], message: str) -> None:
    code, text, errors = run("compare", f"data_nets:{target}", "--output", "out", *options)
    assert (code, text) == (1, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not Path("out").exists()


def test_compare_cannot_write() -> None:
    Path("out").write_text("a file")
    code, _, errors = run(*COMPARE, "--criteria", "l1", "--output", "out")
    assert code == 1
    assert "cannot write into 'out'" in errors
    assert Path("out").read_text() == "a file"
