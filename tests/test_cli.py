"""The command line, run as a user runs it: real factories, real ONNX files, every bad input."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from onnxruntime import InferenceSession
from safetensors import safe_open
from safetensors.torch import load_model
from typer.testing import CliRunner, Result

import torchshear
from torchshear.cli import app, load_example
from torchshear.cli._folder import RECORD

NETS = '''
import torch
from torch import nn


class Net(nn.Module):
    """A residual block on a grouped convolution; channels come in four balanced blocks."""

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.inner = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.norm(self.inner(x))
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """A language model in small: the table of the input is the head, and a norm mixes the channels."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens, scale):
        return self.head(self.down(self.up(self.norm(self.table(tokens) * scale)).relu()))


class Branching(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


def net():
    torch.manual_seed(0)
    return Net(), (torch.randn(2, 3, 8, 8),)


def wide():
    return Net(512), (torch.randn(2, 3, 8, 8),)


def tied():
    torch.manual_seed(0)
    return Tied(), (torch.randint(0, 50, (2, 7)),), {"scale": torch.rand(2, 7, 1)}


class Picky(nn.Module):
    """Two parts, and Python between them that looks at values."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        y = self.trunk(x).mean((2, 3))
        return self.head(y) if y.sum() > 0 else self.head(-y)


def picky():
    torch.manual_seed(0)
    return Picky(), (torch.randn(2, 3, 8, 8),)


class Rounded(Net):
    """Has an operator that ONNX does not have."""

    def forward(self, x):
        return torch.special.i0(super().forward(x))


def no_onnx():
    torch.manual_seed(0)
    return Rounded(), (torch.randn(2, 3, 8, 8),)


def branching():
    return Branching(), (torch.randn(2, 3, 8, 8),)


def classifier():
    return nn.Linear(4, 3), (torch.randn(2, 4),)


def poisoned():
    model, args = net()
    model.stem.weight.data[0] = float("nan")
    return model, args


def failing():
    raise RuntimeError("no weights on this disk")


def list_of_args():
    return Net(), [torch.randn(2, 3, 8, 8)]


def one_of_them():
    return (Net(),)


def no_model():
    return "Net", (1,)


def list_of_kwargs():
    return Net(), (torch.randn(2, 3, 8, 8),), [1]


class Holder:
    net = staticmethod(net)


ready = Net()
'''


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a package of factories, which is the current one."""
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(NETS)
    (package / "broken.py").write_text("import torch\nvalue = 1 / 0\n")
    (package / "needy.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


def invoke(*arguments: str, columns: int = 120) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns)})


def succeed(*arguments: str, columns: int = 120) -> str:
    result = invoke(*arguments, columns=columns)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: str) -> str:
    """The one line of an error, without its prefix."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in result.stderr
    return line.removeprefix("error: ")


def assert_fails(match: str, *arguments: str) -> None:
    __tracebackhide__ = True
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(fail(*arguments))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder that the command wrote, and what it printed; in a process of its own."""
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "nets.py").write_text(NETS)
    command = [sys.executable, "-m", "torchshear.cli", "prune", "nets:net", "--ratio", "0.5", "--criterion", "l1"]
    done = subprocess.run(
        [*command, "--align", "auto", "--output", "deep/out"],
        cwd=folder,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "deep" / "out", done.stdout


def test_version_is_printed() -> None:
    assert succeed("--version").strip() == "torchshear 0.1.0"


def test_help_names_every_command() -> None:
    text = succeed("--help")
    assert all(command in text for command in ("inspect", "prune", "bench"))


@pytest.mark.parametrize("columns", [80, 120])
def test_inspect_shows_groups_constraints_and_fixed_dimensions(columns: int) -> None:
    text = succeed("inspect", "shop.nets:net", columns=columns)
    assert "Channel groups of Net" in text
    assert "stem.weight[0]" in text
    assert "4 equal blocks" in text
    assert "head.weight[0], head.bias[0]: model output 0" in text
    assert "stem.weight[1]: model input 'x', dimension 1" in text
    assert max(map(len, text.splitlines())) <= columns


def test_inspect_marks_cross_channel_groups() -> None:
    assert "cross-channel" in succeed("inspect", "shop.nets:tied")


def test_inspect_writes_json() -> None:
    document = json.loads(succeed("inspect", "shop.nets:net", "--json"))
    (group,) = document["groups"]
    assert (group["width"], group["n_blocks"], group["is_cross_channel"], group["is_prunable"]) == (32, 4, False, True)
    members = [(member["name"], member["dim"], member["purposes"]) for member in group["members"]]
    assert ("inner.weight", 1, ["in"]) in members
    assert any("nets.py:" in where for where in group["where"])
    assert {fixed["name"] for fixed in document["fixed"]} == {"stem.weight", "head.weight", "head.bias"}
    assert document["n_params"] == sum(p.numel() for p in load_example("shop.nets:net")[0].parameters())


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("group", ["0", "stem.weight[0]", "inner.bias"])
def test_inspect_shows_one_group_with_members_lines_and_constraints(group: str, columns: int) -> None:
    text = succeed("inspect", "shop.nets:net", "--group", group, columns=columns)
    assert "Group 0: stem.weight[0]" in text
    assert "32 units, of which 28 can go" in text
    assert "balanced    each of 4 blocks loses equally many units" in text
    assert "- conv2d inner (nets.py:" in text
    assert "minimum     at least 4 of 32 units stay" in text
    assert "Members (10)" in text
    assert "head.weight[1]" in text
    assert max(map(len, text.splitlines())) <= columns


def test_inspect_writes_one_group_as_json() -> None:
    document = json.loads(succeed("inspect", "shop.nets:tied", "--group", "table.weight[1]", "--json"))
    assert (document["number"], document["width"], document["is_cross_channel"]) == (0, 32, True)
    (mixed,) = (constraint for constraint in document["constraints"] if constraint["kind"] == "cross-channel")
    assert "layer_norm" in mixed["where"][0]


def test_inspect_writes_a_page(tmp_path: Path) -> None:
    text = succeed("inspect", "shop.nets:net", "--html", "net.html", "--group", "0")
    assert "written net.html; open it in a browser: file://" in " ".join(text.split())
    assert text.rstrip().endswith("net.html#group=0")
    assert (tmp_path / "net.html").read_text().startswith("<!doctype html>")


def test_inspect_names_a_group_that_is_not_there(tmp_path: Path) -> None:
    assert_fails(r"no channel group 'stm.weight\[0\]'. Did you mean 'stem.weight\[0\]'", "inspect", "shop.nets:net",
                 "--group", "stm.weight[0]", "--html", "net.html")  # fmt: skip
    assert_fails(r"no channel group of number 3. .* numbers: 0 to 0", "inspect", "shop.nets:net", "--group", "3")
    assert not (tmp_path / "net.html").exists()


def test_inspect_cannot_write_the_page() -> None:
    assert_fails(r"cannot write 'no/net.html'", "inspect", "shop.nets:net", "--html", "no/net.html")


def test_inspect_of_a_model_with_nothing_to_prune() -> None:
    assert "0 of 0 can shrink" in succeed("inspect", "shop.nets:classifier")


def test_prune_prints_report_proof_and_latency(pruned: tuple[Path, str]) -> None:
    folder, text = pruned
    assert folder.is_dir()
    for part in ("stem.weight[0]", "50.0% removed", "parameters", "MACs", "verified", "speed-up", "onnxruntime"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


def test_prune_writes_only_what_it_says(pruned: tuple[Path, str]) -> None:
    names = {"plan.json", "model.safetensors", "dense.onnx", "pruned.onnx", "report.json", RECORD}
    assert {file.name for file in pruned[0].iterdir()} == names
    assert len({file.stat().st_mode for file in pruned[0].iterdir()}) == 1


def test_pruned_model_is_rebuilt_from_plan_and_weights(pruned: tuple[Path, str]) -> None:
    folder, _ = pruned
    model, (x,), _ = load_example("shop.nets:net")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # the weights come from the file alone
    small = torchshear.shrink(model, torchshear.PruningPlan.load(folder / "plan.json"))
    load_model(small, folder / "model.safetensors")
    with torch.no_grad():
        expected = small.eval()(x)
    for batch in (x, x[:1], torch.cat([x, x[:1]])):
        (got,) = InferenceSession(folder / "pruned.onnx").run(None, {"x": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), small(batch).detach(), rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, 10)
    assert small.stem.weight.shape[0] == 16


def test_submodules_are_pruned_inside_the_model(tmp_path: Path) -> None:
    parts = ("--submodule", "trunk", "--submodule", "head")
    assert_fails("give --submodule trunk --submodule head", "inspect", "shop.nets:picky")
    assert "2 of 2 can shrink." in succeed("inspect", "shop.nets:picky", *parts)
    text = succeed("prune", "shop.nets:picky", *parts, "--output", "out", "--align", "none")
    assert "part        trunk: parameters" in text
    assert text.count("Latency") == 2
    names = {f"{kind}-{part}.onnx" for kind in ("dense", "pruned") for part in ("trunk", "head")}
    assert {f.name for f in Path("out").iterdir()} == names | {"plan.json", "model.safetensors", "report.json", RECORD}
    document = json.loads(Path("out/report.json").read_text())
    assert set(document["latency"]) == {"trunk", "head"}
    model, (x,), _ = load_example("shop.nets:picky")
    small = torchshear.shrink(model, torchshear.PruningPlan.load("out/plan.json"))
    load_model(small, "out/model.safetensors")
    (got,) = InferenceSession("out/pruned-trunk.onnx").run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), small.trunk(x).detach(), rtol=1e-4, atol=1e-5)
    assert small.head[0].out_features == 8


def test_report_holds_everything(pruned: tuple[Path, str]) -> None:
    document = json.loads((pruned[0] / "report.json").read_text())
    assert document["request"]["ratio"] == 0.5
    assert document["report"]["achieved_ratio"] == 0.5
    assert document["report"]["after"]["macs"] < document["report"]["before"]["macs"]
    assert document["verification"]["max_error"] < 1e-9
    assert document["onnx"]["pruned"]["path"] == "pruned.onnx"
    assert document["onnx"]["pruned"]["size_bytes"] == (pruned[0] / "pruned.onnx").stat().st_size
    assert len(document["latency"]["results"]["pruned"]["times_ms"]) == 50


def test_prune_without_bench_keeps_ties_and_takes_kwargs(tmp_path: Path) -> None:
    text = succeed("prune", "shop.nets:tied", "--output", "out", "--align", "none", "--no-bench")
    assert "speed-up" not in text
    assert json.loads((tmp_path / "out" / "report.json").read_text())["latency"] is None
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not {"head.weight", "table.weight"} <= set(file.keys())
    model, args, kwargs = load_example("shop.nets:tied")
    small = torchshear.shrink(model, torchshear.PruningPlan.load(tmp_path / "out" / "plan.json"))
    before = small(*args, **kwargs)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    load_model(small, tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(small(*args, **kwargs), before)


def test_prune_with_nothing_to_prune_says_why_and_that_it_is_not_faster(tmp_path: Path) -> None:
    text = succeed("prune", "shop.nets:classifier", "--output", "out")
    assert "0.0% removed" in text
    assert "model output 0" in text
    assert (tmp_path / "out" / "pruned.onnx").is_file()


@pytest.mark.parametrize("columns", [80, 120])
def test_bench_compares_with_the_first(pruned: tuple[Path, str], columns: int) -> None:
    dense, small = str(pruned[0] / "dense.onnx"), str(pruned[0] / "pruned.onnx")
    text = succeed("bench", dense, small, "--threads", "1", "--rounds", "20", "--batch", "3", columns=columns)
    assert "batch 3" in text
    assert "1 thread" in text
    assert "speed-up" in text
    assert max(map(len, text.splitlines())) <= columns


def test_bench_says_plainly_that_a_file_is_not_faster(pruned: tuple[Path, str]) -> None:
    model, args, _ = load_example("shop.nets:wide")
    torchshear.export_onnx(model, "wide.onnx", args)
    text = succeed("bench", str(pruned[0] / "pruned.onnx"), "wide.onnx", "--batch", "4", "--rounds", "20")
    assert "'wide' is slower than 'pruned'" in text


def test_bench_takes_a_file_twice_and_writes_json(pruned: tuple[Path, str]) -> None:
    dense = str(pruned[0] / "dense.onnx")
    document = json.loads(succeed("bench", dense, dense, "--rounds", "5", "--json"))
    assert list(document["results"]) == ["dense", "dense#2"]
    assert len(document["results"]["dense#2"]["times_ms"]) == 5


def test_bench_tells_files_of_the_same_name_apart(pruned: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "dense.onnx").write_bytes((pruned[0] / "pruned.onnx").read_bytes())
    document = json.loads(succeed("bench", str(pruned[0] / "dense.onnx"), "dense.onnx", "--rounds", "5", "--json"))
    assert list(document["results"]) == [str(pruned[0] / "dense.onnx"), "dense.onnx"]


BAD_FACTORIES = [
    ("shop.nets", r"cannot read 'shop.nets'. Expected package.module:factory"),
    ("shop/nets.py:net", r"cannot read 'shop/nets.py:net'. Expected package.module:factory"),
    ("shop.nets:", r"cannot read 'shop.nets:'. Expected package.module:factory"),
    ("shop.net:net", r"no module 'shop.net' in .* Expected package.module:factory; run in the folder"),
    ("nothing.here:net", r"no module 'nothing' in .* or among the installed packages"),
    ("shop.broken:net", r"importing 'shop.broken' fails: ZeroDivisionError: .* \(at broken.py:2\)"),
    ("shop.needy:net", r"importing 'shop.needy' fails: ModuleNotFoundError: .*a_package_that_nobody_has.*needy.py:1"),
    ("shop.nets:nett", r"'shop.nets' has no 'nett'. Did you mean 'net'\? Expected a function without arguments"),
    ("shop.nets:Holder.zzz", r"'shop.nets' has no 'zzz'. Expected a function"),
    ("shop.nets:ready", r"shop.nets:ready is an object of type Net. Expected a function without arguments"),
    ("shop.nets:NETS_ARE_FUN", r"has no 'NETS_ARE_FUN'"),
    ("shop.nets:Net", r"shop.nets:Net returned an object of type Net. Expected .* returns \(model, args\)"),
    ("shop.nets:failing", r"shop.nets:failing fails: RuntimeError: no weights on this disk \(at nets.py:\d+\)"),
    ("shop.nets:list_of_args", r"an object of type list as its args. Expected"),
    ("shop.nets:one_of_them", r"returned \(Net\). Expected a function"),
    ("shop.nets:no_model", r"returned an object of type str as its model. Expected"),
    ("shop.nets:list_of_kwargs", r"returned an object of type list as its kwargs. Expected"),
]


@pytest.mark.parametrize(("target", "match"), BAD_FACTORIES)
def test_bad_factory_is_a_clear_error(target: str, match: str) -> None:
    assert_fails(match, "inspect", target)
    assert_fails(match, "prune", target, "--output", "out")
    assert not Path("out").exists()


def test_factory_may_lie_in_a_class() -> None:
    assert "stem.weight[0]" in succeed("inspect", "shop.nets:Holder.net")


BAD_OPTIONS = [
    (("--ratio", "1.5"), r"--ratio 1.5; expected a number in \[0, 1\)"),
    (("--ratio", "0.001"), r"ratio"),
    (("--criterion", "l9"), r"--criterion 'l9'; expected one of"),
    (("--align", "gpu"), r"unknown alignment profile 'gpu'"),
    (("--align", "0"), r"align must be a whole number of at least 1"),
    (("--min-width", "0"), r"--min-width 0; expected an integer of at least 1"),
]


@pytest.mark.parametrize(("options", "match"), BAD_OPTIONS)
def test_bad_option_is_a_clear_error_and_leaves_nothing(options: tuple[str, str], match: str) -> None:
    assert_fails(match, "prune", "shop.nets:net", "--output", "deep/out", *options)
    assert not Path("deep").exists()


def test_weights_that_cannot_be_scored() -> None:
    assert_fails(r"stem.weight.*NaN|NaN.*stem.weight", "prune", "shop.nets:poisoned", "--output", "out")
    assert not Path("out").exists()


def test_model_that_cannot_be_captured_is_named_with_its_line() -> None:
    assert_fails(r"torch.export cannot capture Branching.*nets.py:\d+", "inspect", "shop.nets:branching")


def test_output_that_is_a_file() -> None:
    Path("out").write_text("kept")
    assert_fails(
        r"cannot write into 'out': File exists. Expected a folder", "prune", "shop.nets:net", "--output", "out"
    )
    assert_fails(r"cannot write into 'out/in': Not a directory", "prune", "shop.nets:net", "--output", "out/in")
    assert Path("out").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_that_is_not_writable() -> None:
    Path("out").mkdir(mode=0o500)
    assert_fails(r"cannot write into 'out': Permission denied", "prune", "shop.nets:net", "--output", "out")


def test_nothing_is_replaced_where_one_file_cannot_be() -> None:
    (Path("out") / "report.json").mkdir(parents=True)
    (Path("out") / "dense.onnx").write_text("kept")
    match = r"cannot write into 'out': report.json is a folder there"
    assert_fails(match, "prune", "shop.nets:net", "--output", "out", "--no-bench", "--force")
    assert sorted(file.name for file in Path("out").iterdir()) == ["dense.onnx", "report.json"]
    assert (Path("out") / "dense.onnx").read_text() == "kept"


@pytest.mark.parametrize("limit", [1_000, 4_000, 12_000])
def test_disk_full_in_the_middle_leaves_nothing(limit: int) -> None:
    """A limit on the size of files stands for the disk: the plan, the weights or the ONNX file hits it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = invoke("prune", "shop.nets:net", "--output", "new/out", "--no-bench")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: cannot write into 'new/out'")
    assert len(result.stderr.splitlines()) == 1
    assert not Path("new").exists()


def test_bench_of_files_that_are_none() -> None:
    Path("text.onnx").write_text("no model")
    assert_fails(r"no file at 'gone.onnx'. Write it first", "bench", "gone.onnx")
    assert_fails(r"onnxruntime .* does not run 'text.onnx'", "bench", "text.onnx")


@pytest.mark.parametrize(("word", "number"), [("rounds", 0), ("threads", 0), ("batch", -1)])
def test_bench_of_numbers_out_of_range(pruned: tuple[Path, str], word: str, number: int) -> None:
    expected = f"{word} must be a whole number of at least 1, but got {word}={number}"
    assert_fails(expected, "bench", str(pruned[0] / "dense.onnx"), f"--{word}", str(number))


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "shop.nets:net"),
        ("bench",),
        ("inspect",),
        ("prun",),
        ("prune", "a:b", "--output", "o", "--ratio", "x"),
    ],
)
def test_usage_errors_end_with_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_modules_are_measured_in_torch_on_the_command_line(tmp_path: Path) -> None:
    text = succeed("prune", "shop.nets:wide", "--output", "out", "--ratio", "0.5", "--runtime", "torch", "--batch", "3")
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["latency"]["runtime"] == f"torch {torch.__version__}"
    assert document["latency"]["batch"] == 3
    assert list(document["latency"]["results"]) == ["dense", "pruned"]
    assert f"torch {torch.__version__}, " in text
    assert list(document["onnx"]) == ["dense", "pruned"]
    given = ("prune", "shop.nets:wide", "--output", "other", "--ratio", "0.5")
    assert_fails("provider='No' is not installed", *given, "--provider", "No")
    assert_fails("runtime='tvm'", *given, "--runtime", "tvm")


@pytest.mark.zoo
def test_a_model_without_onnx_is_measured_in_torch_on_the_command_line(tmp_path: Path) -> None:
    given = ("shop.nets:no_onnx", "--ratio", "0.5", "--bench")
    assert_fails("ONNX", "prune", *given, "--output", "other")
    text = succeed("prune", *given, "--output", "out", "--runtime", "torch")
    assert "no ONNX     torch cannot turn Rounded into ONNX" in text
    assert not list((tmp_path / "out").glob("*.onnx"))
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["onnx"] == {}
    assert list(document["latency"]["results"]) == ["dense", "pruned"]


@pytest.mark.zoo
def test_a_target_of_latency_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path / "cache"))
    given = ("--target-latency", "0.95", "--threads", "2", "--batch", "3", "--align", "4", "--must-be-faster", "false")
    text = succeed("prune", "shop.nets:wide", "--output", "out", *given)
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["request"]["target_latency"] == "0.95"
    assert document["request"]["device"]["threads"] == 2
    assert document["allocation"]["target_share"] == 0.95
    assert document["latency"]["threads"] == 2
    assert document["latency"]["batch"] == 3
    assert "realised" in text


def test_a_wrong_target_of_latency_on_the_command_line() -> None:
    given = ("prune", "shop.nets:wide", "--output", "other", "--target-latency", "3.5")
    assert_fails("expected a share of the dense model's latency", *given)
