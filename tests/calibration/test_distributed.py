"""Two processes that collect together sum what one process would on the data of both; none waits for one that ended."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional

import torchshear
from tests.calibration.sums import analysed, batches
from tests.networks import classified, randomise
from tests.networks.attention import EncoderBlock
from tests.networks.plain import GroupedBranch
from tests.processes import end_together
from torchshear.calibration._statistics import Statistics
from torchshear.dependency import ChannelGroups
from torchshear.errors import DataError
from torchshear.pruners import registered_criteria
from torchshear.pruners.criteria._criterion import find_criterion, needs_of


def _process(rank: int, folder: str) -> None:
    """One of two that collect together, and then meet failures; what each gives is saved."""
    limit = timedelta(hours=1)  # of waiting for the other process
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    groups = analysed(randomise(GroupedBranch()).eval())
    torch.save({"sums": _collected(rank, groups), "errors": _errors(rank, groups)}, f"{folder}/{rank}.pt")
    end_together(folder)


def _collected(rank: int, groups: ChannelGroups) -> dict[str, Any]:
    data = batches(4)[2 * rank : 2 * rank + 2]
    found: Any = torchshear.collect(groups, data, functional.cross_entropy, 2, criteria=ON_DATA)
    heads = _heads(classified(3, 5, 12)[2 * rank : 2 * rank + 2])
    return {"numbers": _numbers(found), "scores": _scores(groups, found), "kept": _kept(groups, found)} | heads


def _broken_loader() -> Iterator[Any]:
    yield batches(1)[0]
    raise OSError("disk gone")


def _broken_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such class")


def _heads(data: list[Any]) -> dict[str, Any]:
    """What is summed of attention heads."""
    model = randomise(EncoderBlock()).double().eval()
    groups = torchshear.analyze(torchshear.trace(model, (data[0][0],)))
    return {"heads": dict(torchshear.collect(groups, data, functional.cross_entropy, len(data)).heads)}


ON_DATA = tuple(name for name in registered_criteria() if needs_of(name))


def _scores(groups: ChannelGroups, statistics: Statistics) -> dict[str, dict[str, torch.Tensor]]:
    """Scores of all groups by all criteria that look at data."""
    return {
        name: {group.name: find_criterion(name)(group, _weights(groups), statistics) for group in groups}
        for name in ON_DATA
    }


def _weights(groups: ChannelGroups) -> dict[str, torch.Tensor]:
    return {name: entry.tensor for name, entry in groups.graph.state.items() if entry.kind == "parameter"}


def _kept(groups: ChannelGroups, statistics: Statistics) -> dict[str, dict[str, list[int]]]:
    plans = {name: torchshear.plan(groups, name, 0.5, statistics=statistics) for name in ON_DATA}
    return {name: {group: units.tolist() for group, units in plan.kept.items()} for name, plan in plans.items()}


FAILURES: dict[str, dict[str, Any]] = {
    "loader": {"loader": _broken_loader()},
    "loss": {"loss_fn": _broken_loss},
    "argument": {"batches": 0},
    "criteria": {"criteria": "apoz"},
    "length": {"batches": 1},
    "data": {"loader": batches(1)},
}


def _errors(rank: int, groups: ChannelGroups) -> dict[str, str]:
    """Collect once for each failure, which the second process meets."""
    errors: dict[str, str] = {}
    for how, failing in FAILURES.items():
        options = {"loader": batches(2), "loss_fn": functional.cross_entropy, "batches": 2}
        try:
            torchshear.collect(groups, **(options | (failing if rank else {})))
        except Exception as error:
            errors[how] = f"{type(error).__name__}: {error}"
    return errors


def _numbers(statistics: Statistics) -> dict[str, Any]:
    return {
        "n": (statistics.n_batches, statistics.n_samples),
        "taylor": {name: sums.taylor for name, sums in statistics.weights.items()},
        "rows": {str(key): sums.squares for key, sums in statistics.rows.items()},
        "gates": {name: (sums.squares, sums.batches) for name, sums in statistics.gates.items()},
        "values": {str(key): (sums.count, sums.squares, sums.grams) for key, sums in statistics.values.items()},
        "loss": statistics.loss,
    }


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two gave."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_equal_one_on_the_union_of_their_data(processes: list[dict[str, Any]]) -> None:
    first, second = (found["sums"] for found in processes)
    groups = analysed(randomise(GroupedBranch()).eval())
    alone = torchshear.collect(groups, batches(4), functional.cross_entropy, 4, criteria=ON_DATA)
    torch.testing.assert_close(first["numbers"], second["numbers"], rtol=0, atol=0)
    torch.testing.assert_close(first["numbers"], _numbers(alone), rtol=1e-5, atol=1e-9)
    assert first["kept"] == second["kept"]
    heads = _heads(classified(3, 5, 12))
    assert heads["heads"]
    torch.testing.assert_close({"heads": first["heads"]}, heads)
    torch.testing.assert_close(first["heads"], second["heads"], rtol=0, atol=0)
    expected, kept = _scores(groups, alone), _kept(groups, alone)
    in_turn = [batches(4)[number] for number in (0, 2, 1, 3)]  # only momentum knows an order
    turns = torchshear.collect(groups, in_turn, functional.cross_entropy, 4, criteria=ON_DATA)
    expected["snip_momentum"], kept["snip_momentum"] = (f(groups, turns)["snip_momentum"] for f in (_scores, _kept))
    torch.testing.assert_close(first["scores"], expected, rtol=1e-5, atol=1e-9)
    assert first["kept"] == kept


def test_whatever_stops_one_process_stops_both(processes: list[dict[str, Any]]) -> None:
    first, second = (found["errors"] for found in processes)
    assert second["loader"] == "OSError: disk gone"
    assert first["loader"] == "DataError: process 1 could not collect: OSError: disk gone"
    assert second["loss"] == "KeyError: 'no such class'"
    assert first["loss"] == "DataError: process 1 could not collect: KeyError: 'no such class'"
    assert second["argument"].startswith("ArgumentError: batches must be a whole number")
    assert first["argument"].startswith("DataError: process 1 could not collect: batches must be")
    assert first["criteria"] == second["criteria"]
    assert first["criteria"].startswith("DataError: processes collect for different networks or criteria")
    assert first["length"] == second["length"]
    assert first["length"].startswith("DataError: processes ran [2, 1] batches; expected equally many on each")
    assert second["data"].startswith("DataError: ")
    assert "ended after 1 of 2 batches" in second["data"]
    assert first["data"] == f"DataError: process 1 could not collect: {second['data'].removeprefix('DataError: ')}"


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    with pytest.raises(DataError, match="ended after 1 of 2"):
        torchshear.collect(analysed(GroupedBranch().eval()), batches(1), None, 2)
