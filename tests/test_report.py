"""What a report says to its reader: limits of the result, reasons by their weight, names that stay whole."""

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import Tensor, nn

import torchshear
import torchshear.comparison
from tests.networks import Net, analyzed
from torchshear.report import PruningReport, make_report, render_report


def attention(net: nn.Module, h: Tensor) -> Tensor:
    """Self-attention with 4 heads, written so that no attribute holds a head's width and the form must be traced."""
    b, n, c = h.shape
    q, k, v = (layer(h).view(b, n, 4, c // 4).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Attention(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(8, width), nn.Linear(width, 5)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return attention(self, self.i(x))


class Positioned(Attention):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return attention(self, self.i(x) + positions)


class Clamped(Attention):
    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        if self.training and not torch.isfinite(h).all():
            h = h.clamp(-1e4, 1e4)
        return attention(self, h)


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def form_of(model: nn.Module, *args: Tensor) -> str:
    result = torchshear.prune(model.eval(), args)
    assert result.form == "traced"
    return str(result.report).partition("form ")[2].partition("cannot shrink")[0]


def test_a_batch_that_stays_is_told() -> None:
    assert "its batch stays that of the example, since its inputs begin with 2 and 6" in form_of(
        Positioned(), X, torch.randn(6, 1)
    )
    assert "batch" not in form_of(Attention(), X)


def test_a_missing_train_mode_is_told() -> None:
    told = form_of(Clamped(), X)
    assert "it does not run in train mode: torch.export cannot capture Clamped" in told
    assert "test_report.py" in told
    assert "train mode" not in form_of(Attention(), X)


def test_parameters_that_nothing_reads_are_told() -> None:
    deep = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 512))  # of an encoder only the first are used
    model = Net(lambda m, x: m.head(m.used(x).relu()), used=nn.Linear(8, 32), head=nn.Linear(32, 5), deep=deep)
    report = torchshear.prune(model.eval(), (X,)).report
    unread = [name for name, reason in report.refused.items() if reason == "no operator reads it"]
    assert unread == [f"deep.{name}" for name in ("0.weight[0]", "0.weight[1]", "0.bias[0]")] + [
        f"deep.2.{name}" for name in ("weight[0]", "weight[1]", "bias[0]")
    ]
    lines = str(report).splitlines()
    first = lines.index("cannot shrink (9):") + 1  # the reason that holds most parameters goes first
    assert lines[first] == "  6 x no operator reads it"
    assert lines[first + 1].strip().startswith("deep.0.weight[0], deep.0.weight[1]")
    assert lines[first + 1].endswith("and 2 more")


def test_reasons_are_counted_in_the_terms_of_a_user() -> None:
    """Channels are dealt out to two branches by a shuffle that leaves one alone on its way."""

    def dealt(m: Net, x: Tensor) -> Tensor:
        h = m.stem(x)
        return m.left(torch.cat([h[..., :1], m.other(x)], -1)) + m.right(h[..., 1:])

    parts = {"stem": nn.Linear(8, 7), "other": nn.Linear(8, 3), "left": nn.Linear(4, 5), "right": nn.Linear(6, 5)}
    report = make_report(torchshear.plan(analyzed(Net(dealt, **parts).eval(), X)))
    alone = next(group.name for group in report.groups if group.width == 1)
    assert report.refused[alone] == (
        "the only one of its layer that splits or shuffles send this way; the last of a part stays"
    )
    text = str(report)
    assert "  4 x model output 0\n      left.weight[0], left.bias[0], right.weight[0], right.bias[0]\n" in text

    def single(m: Net, x: Tensor) -> Tensor:
        """Sums over flips and rolls make one unit of all 4 positions."""
        h = m.stem(x)
        return m.head((h + h.flip(-1) + h.roll(1, -1)) * m.gain.view(4))

    model = Net(single, stem=nn.Linear(8, 4), gain=nn.Parameter(torch.ones(4, 1)), head=nn.Linear(4, 5))
    report = make_report(torchshear.plan(analyzed(model.eval(), X)))
    assert "all 4 are tied to one another, so that none goes alone" in report.refused.values()


def test_reasons_of_one_kind_stand_together_wherever_they_are() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = layer(x).sort(-1).values
        return x

    many = Net(run, layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(30))).eval()
    report = make_report(torchshear.plan(analyzed(many, X), min_ratio=0))
    shown = str(report).partition("cannot shrink")[2].splitlines()[1:]
    assert len(report.refused) > 60
    assert len(shown) < 16
    counted = sum(int(match[1]) for line in shown if (match := re.match(r"  (\d+) x ", line)))
    assert counted == len(report.refused)


@pytest.fixture(scope="module")
def long_names() -> PruningReport:
    def run(m: Net, x: Tensor) -> Tensor:
        block = m.transformer_encoder_layers["intermediate_blocks"]
        return block["projection"](block["feed_forward_network"](x).relu())

    inner = nn.ModuleDict({"feed_forward_network": nn.Linear(8, 16), "projection": nn.Linear(16, 8)})
    deep = Net(run, transformer_encoder_layers=nn.ModuleDict({"intermediate_blocks": inner})).eval()
    return make_report(torchshear.plan(analyzed(deep, X)))


@pytest.mark.parametrize("width", [70, 80, 100, 200])
def test_names_break_between_words(long_names: PruningReport, width: int) -> None:
    table = render_report(long_names, width).partition("channels  ")[0]
    for word in ("transformer_encoder_layers.", "intermediate_blocks.", "feed_forward_network.", "weight[0]"):
        assert word in table, table
    assert max(map(len, table.splitlines())) <= width


def test_results_are_written_in_a_line() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    graph = torchshear.trace(model, (X,))
    groups = torchshear.analyze(graph)
    result = torchshear.prune(model, (X,))
    assert re.fullmatch(
        r"<PruneResult: native Sequential, parameters 212 -> 108 \(50\.9% left\), "
        r"MACs 1,152 -> 576 \(50\.0% left\), max_error \S+>",
        repr(result),
    )
    statistics = torchshear.collect(groups, [(X,)], batches=1, progress=False)
    for value in (graph, groups, groups[0], result, result.plan, result.report, statistics):
        assert len(repr(value)) < 160
        assert "\n" not in repr(value)
        assert repr(value).startswith(f"<{type(value).__name__}")


class _Table(HTMLParser):
    """Cells of the tables of a page, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._is_cell = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        self._is_cell = tag in ("td", "th")
        if self._is_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = False

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.rows[-1][-1] += data


def test_notebooks_show_tables() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    result = torchshear.prune(model, X, ratio=0.5)
    compared = torchshear.comparison.compare(
        model, lambda m: m(X).detach().square().mean().item(), X, criteria=["l2"], ratio=0.5
    )
    found = {}
    for shown in (result.report, result.plan, compared):
        table = _Table()
        table.feed(shown._repr_html_())
        found[type(shown).__name__] = table.rows
    assert found["PruningReport"][1] == ["0.weight[0]", "ffn", "16", "8", "50%", ""]
    assert found["PruningPlan"] == [["group", "width", "kept", "note"], ["0.weight[0]", "16", "8", ""]]
    assert [row[0] for row in found["Comparison"][:2]] == ["criterion", "(before)"]
    assert {"l2", "control: random", "control: uniform"} == {row[0] for row in found["Comparison"][2:]}


def test_text_in_tables_of_notebooks_is_escaped() -> None:
    layers = nn.ModuleDict({"<b>&": nn.Linear(8, 16), "out": nn.Linear(16, 4)})
    model = Net(lambda m, x: m.layers["out"](m.layers["<b>&"](x).relu()), layers=layers)
    report = torchshear.prune(model.eval(), X).report
    assert "<b>&." not in report._repr_html_()
    assert "&lt;b&gt;&amp;.weight[0]" in report._repr_html_()
