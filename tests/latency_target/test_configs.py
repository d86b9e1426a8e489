"""Config lists beside a target of latency, on a device of a known law: what entries bound, and what is said of it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import torchshear
from tests.latency_target.pretending import DENSE, Pretended, pretend
from tests.speedup.latency.making_tables import ALIGNMENT, joined
from torchshear.configs import parse_config, resolve
from torchshear.configs._beside_options import bound_by
from torchshear.errors import ArgumentError, PlanError
from torchshear.pruners.selection._request import Request

CONFIG = [
    {"op_types": ["Conv2d"], "sparsity": 0.75},
    {"op_names": ["stem"], "sparsity": 0.25},
    {"op_names": ["right"], "exclude": True},
]


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> type[Pretended]:
    return pretend(monkeypatch)


def prune(**options: Any) -> torchshear.PruneResult:
    model, args, _ = joined()
    return torchshear.prune(model, args, **({"align": ALIGNMENT, "target_latency": 0.6} | options))


def widths(result: torchshear.PruneResult) -> dict[str, int]:
    return {group.name.split(".")[0]: len(group.kept) for group in result.plan.groups}


def test_shares_are_the_most_that_goes_and_all_else_stays_whole(tmp_path: Path) -> None:
    free, bound = prune(), prune(config=CONFIG)
    assert widths(free)["stem"] < 18
    found = widths(bound)
    assert found["stem"] >= 18
    assert 8 <= found["left"] < 32
    assert found["right"] == 16
    assert found["mix"] >= 10
    assert bound.allocation is not None
    assert bound.allocation.round.measured_share <= 0.6
    assert bound.config is not None
    assert {row.layer: row.ratio for row in bound.config.rows if row.ratio} == {"stem": 0.25, "left": 0.75, "mix": 0.75}
    notes = {group.name: group.note for group in bound.report.groups}
    assert "stays whole: no entry of the config selects it" in notes["right.weight[0]"]
    assert bound.plan.request["config"]["rows"]
    _, args, _ = joined()
    torchshear.export_onnx(bound.model, tmp_path / "small.onnx", args)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: args[0].numpy()})
    assert np.allclose(out, bound.model(args[0]).detach().numpy(), atol=1e-4)


def test_widths_are_those_of_the_same_bounds_without_a_config() -> None:
    by_config = prune(config=CONFIG)
    by_words = prune(max_ratio={"stem": 0.25, "left": 0.75, "mix": 0.75}, ratio={"stem": 1e-3, "left": 0.9, "mix": 0.5})
    assert [group.kept.tolist() for group in by_config.plan.groups] == [g.kept.tolist() for g in by_words.plan.groups]


@pytest.mark.parametrize(
    "entry",
    [
        {"op_types": ["Conv2d"], "total_sparsity": 0.35, "max_sparsity_per_layer": 0.5},
        {"op_types": ["Conv2d"], "sparse_ratio": 0.35, "global_group_id": "a", "max_sparse_ratio": 0.5},
    ],
)
def test_layers_that_are_ranked_together_lose_no_more_than_their_share_together(entry: dict[str, Any]) -> None:
    apart = prune(target_latency=0.5, config=[{"op_types": ["Conv2d"], "sparsity": 0.5}])
    together = prune(target_latency=0.5, config=[entry])
    gone = {name: DENSE[f"{name}.weight[0]"] - width for name, width in widths(apart).items()}
    assert sum(gone.values()) > 0.35 * sum(DENSE.values())
    found = widths(together)
    assert sum(found.values()) >= 0.65 * sum(DENSE.values())
    assert all(found[name] >= 0.5 * DENSE[f"{name}.weight[0]"] for name in found)
    assert together.allocation is not None
    assert together.allocation.round.measured_share <= 0.5
    with pytest.raises(PlanError, match=r"with 4 groups that may shrink under config_list\[0\]"):
        prune(config=[entry | {key: 0.05 for key in ("total_sparsity", "sparse_ratio") if key in entry}])


def test_least_shares_of_layers_hold() -> None:
    entry = {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "global_group_id": "a", "min_sparse_ratio": 0.25}
    free = widths(prune(target_latency=0.9))
    assert any(width > 0.75 * DENSE[f"{name}.weight[0]"] for name, width in free.items())
    found = widths(prune(target_latency=0.9, config=[entry]))
    assert all(width <= 0.75 * DENSE[f"{name}.weight[0]"] for name, width in found.items())


def test_each_entry_ranks_by_its_own_criterion() -> None:
    _, _, groups = joined()
    torch.manual_seed(1)
    data = [(torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))) for _ in range(2)]
    pruners = [
        {"op_names": ["left"], "pattern": "1xchannel", "target_sparsity": 0.75, "criterion_type": "snip"},
        {"op_names": ["stem"], "pattern": "1xchannel", "target_sparsity": 0.75, "criterion_type": "magnitude"},
    ]
    config = {"pruning_configs": [one | {"pruning_scope": "local"} for one in pruners]}
    words: dict[str, Any] = {"data": data, "loss_fn": nn.functional.cross_entropy, "progress": False, "batches": 2}
    result = prune(config=config, **words)
    kept = {group.name.split(".")[0]: group.kept for group in result.plan.groups}
    statistics = torchshear.collect(
        groups,
        data,
        nn.functional.cross_entropy,
        batches=2,
        progress=False,
        criteria=["snip"],
        exclude=("mix.weight[0]", "right.weight[0]"),
    )
    for layer, criterion in (("left", "snip"), ("stem", "l1")):
        assert len(kept[layer]) < DENSE[f"{layer}.weight[0]"]
        share = 1 - len(kept[layer]) / DENSE[f"{layer}.weight[0]"]
        single = torchshear.plan(
            groups, criterion, {layer: share}, statistics=statistics, group_reduction="filters"
        ).kept[f"{layer}.weight[0]"]
        assert kept[layer].tolist() == single.tolist()
    assert result.plan.request["criterion"] == "l1, snip"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 40, 3, padding=1)
        self.outer, self.fc = nn.Conv2d(40, 20, 3, padding=1), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.outer(torch.relu(self.inner(x)))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def test_coupled_layers_lose_what_all_of_them_may_lose() -> None:
    model = Residual().eval()
    groups = torchshear.analyze(torchshear.trace(model, torch.randn(1, 3, 8, 8)))
    config = [{"op_types": ["Conv2d"], "sparsity": 0.6}, {"op_names": ["outer"], "sparsity": 0.2}]
    request = bound_by(resolve(model, parse_config(config), groups, "l2"), Request(target_latency=0.5))
    assert request.max_ratio == {"stem.weight[0]": 0.2, "inner.weight[0]": 0.6}
    assert request.criterion == "l2"
    alone = resolve(model, parse_config([{"op_names": ["stem", "inner"], "sparsity": 0.6}]), groups, "l1")
    assert bound_by(alone, Request(target_latency=0.5)).max_ratio == {"inner.weight[0]": 0.6}


def test_other_targets_and_families_go_beside_it(tmp_path: Path) -> None:
    model, args, _ = joined()
    dense = torchshear.export_onnx(model, tmp_path / "dense.onnx", args).size_bytes
    config = [{"op_types": ["Conv2d"], "sparsity": 0.5}]
    result = prune(target_latency=0.9, config=config, target_params=0.6, target_macs=0.8, target_size=0.8)
    assert result.report.after.n_params <= 0.6 * result.report.before.n_params
    assert torchshear.export_onnx(result.model, tmp_path / "small.onnx", args).size_bytes <= 0.8 * dense
    family = torchshear.prune_family(
        model, args, targets=[0.8, 0.6], config=config, align=ALIGNMENT, progress=False, must_be_faster=False
    )
    for member in family.members:
        assert all(width >= 0.5 * DENSE[f"{name}.weight[0]"] for name, width in widths(member).items())
        assert member.config is not None


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"target_latency": 0.05}, PlanError, r"3 groups that may shrink under config_list\[0\], config_list\[1\]"),
        ({"ratio": {"stem": 0.5}}, ArgumentError, "config= says which layers lose how much, and ratio="),
        ({"max_ratio": 0.5}, ArgumentError, "and max_ratio=0.5 says something else"),
        ({"target_latency": None, "target_macs": 0.5}, ArgumentError, "may stand beside target_latency="),
        ({"config": [{"op_names": ["lift"], "sparsity": 0.5}]}, ArgumentError, r"config_list\[0\].*lift"),
    ],
)
def test_errors_name_the_entry(words: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prune(**({"config": CONFIG} | words))
    assert Pretended.measured == 0
