"""Tables of a device that follows a known law: found again, whatever disturbs it; and files of tables."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.speedup.latency.making_tables import (
    ALIGNMENT,
    fresh_widths,
    joined,
    kernels_at,
    probes_of,
    table_of_probes,
    total_ms,
)
from torchshear.dependency import Alignment
from torchshear.dependency.groups._width_cost import WidthCost
from torchshear.dependency.groups._width_form import axis_forms
from torchshear.errors import ArgumentError, LatencyError
from torchshear.speedup.latency import Device, LatencyTable, _probes
from torchshear.speedup.latency._kernels import KernelTime, Profile
from torchshear.speedup.latency._probes import WidthProbe, choose_probes
from torchshear.speedup.latency._table import check_table


def test_the_law_of_a_device_is_found_again() -> None:
    _, _, groups = joined()
    table = table_of_probes(groups, probes_of(groups))
    assert table.known_share == pytest.approx(1.0)
    assert table.dense_ms == pytest.approx(total_ms({g.name: g.width for g in groups}) + 0.1, rel=1e-4)
    for seed in range(10):
        widths = fresh_widths(groups, seed)
        assert table.predict_ms(widths) == pytest.approx(total_ms(widths) + 0.1, rel=1e-3)
    assert table.errors[1] < 1e-3
    assert table.notes == ()
    assert "error at widths that were not fitted: median 0.0%" in str(table)


def test_times_that_were_disturbed_are_left_out_and_said() -> None:
    _, _, groups = joined()
    probes = probes_of(groups)
    for number in (0, 3):
        kernels = list(probes[number].profile.kernels)
        kernels[1] = replace(kernels[1], ms=kernels[1].ms * 4)
        probes[number] = replace(probes[number], profile=Profile(tuple(kernels), 0.1))
    table = table_of_probes(groups, probes)
    widths = fresh_widths(groups, 1)
    assert table.predict_ms(widths) == pytest.approx(total_ms(widths) + 0.1, rel=2e-2)
    assert table.n_disturbed == 2
    assert "2 times of kernels were disturbed, and left out." in table.notes


def test_kernels_are_told_by_their_order_and_not_by_names() -> None:
    """Numbers in names differ between exports, and some graphs have a few nodes more."""
    _, _, groups = joined()
    probes = []
    for number, probe in enumerate(probes_of(groups)):
        kernels = [
            replace(kernel, name=f"{kernel.name}_{n + number}") for n, kernel in enumerate(probe.profile.kernels)
        ]
        more = KernelTime("more", "Reshape", (("float", (1,)),), (("float", (1,)),), 0.0)
        kernels[number % 3 : number % 3] = [more] * (number % 2)
        probes.append(replace(probe, profile=Profile(tuple(kernels), 0.1)))
    table, widths = table_of_probes(groups, probes), fresh_widths(groups, 6)
    assert table.known_share == pytest.approx(1)
    assert table.predict_ms(widths) == pytest.approx(total_ms(widths) + 0.1, rel=1e-3)


def test_time_of_the_profiler_in_each_kernel_does_not_count() -> None:
    _, _, groups = joined()
    probes = []
    for number, probe in enumerate(probes_of(groups)):
        kernels = tuple(replace(kernel, ms=kernel.ms + 0.1) for kernel in probe.profile.kernels)
        dense_ms = probe.dense_ms * (1.5 if number == 3 else 1.0)  # which makes the machine a noisy one
        probes.append(replace(probe, profile=Profile(kernels, 0.0), dense_ms=dense_ms))
    table, widths = table_of_probes(groups, probes), fresh_widths(groups, 3)
    true = (total_ms(widths) + 0.1) / (total_ms(probes[0].widths) + 0.1)
    assert table.predict_ms(widths) / table.dense_ms == pytest.approx(true, rel=1e-3)


def test_shares_are_of_the_dense_time_though_that_is_beyond_a_step() -> None:
    """Weights that begin to fit into a cache, which no polynomial follows: narrower models take half of what is due."""
    _, _, groups = joined()
    probes = [
        replace(probe, share=probe.share / (2 if number else 1)) for number, probe in enumerate(probes_of(groups))
    ]
    table, widths = table_of_probes(groups, probes), fresh_widths(groups, 5)
    assert table.dense_ms == pytest.approx(probes[0].dense_ms)
    true = (total_ms(widths) + 0.1) / (total_ms(probes[0].widths) + 0.1) / 2
    assert table.predict_ms(widths) / table.dense_ms == pytest.approx(true, rel=0.15)
    assert table.errors[0] < 0.15


def test_the_dense_time_is_no_less_than_that_of_the_formula() -> None:
    _, _, groups = joined()
    probes = [
        replace(probe, share=probe.share * (2 if number else 1)) for number, probe in enumerate(probes_of(groups))
    ]
    table = table_of_probes(groups, probes)
    assert table.dense_ms == table.predict_ms({}) > probes[0].dense_ms


def test_a_spell_in_which_all_kernels_are_slower_changes_nothing() -> None:
    _, _, groups = joined()
    probes = probes_of(groups)
    for number, slowdown in ((2, 1.3), (5, 1.1)):
        probes[number] = probes[number].at_speed(probes[number].reference_ms * slowdown)
    table, widths = table_of_probes(groups, probes), fresh_widths(groups, 4)
    assert table.predict_ms(widths) == pytest.approx(total_ms(widths) + 0.1, rel=1e-3)
    assert table.n_disturbed == 0


def test_a_slow_spell_of_the_machine_is_said() -> None:
    _, _, groups = joined()
    probes = probes_of(groups)
    probes[2] = replace(probes[2], dense_ms=probes[2].dense_ms * 1.5)
    table = table_of_probes(groups, probes)
    assert table.noise == pytest.approx(0.5)
    widths = fresh_widths(groups, 5)
    assert table.predict_ms(widths) == pytest.approx(total_ms(widths) + 0.1, rel=1e-3)
    assert any("The machine is noisy: the dense model took up to 1.50 times" in note for note in table.notes)


def test_kernels_that_cannot_be_followed_count_in_proportion() -> None:
    """One has a size that no axis has, one is not in every probe."""
    _, _, groups = joined()
    probes = []
    for number, probe in enumerate(probes_of(groups)):
        odd = KernelTime("odd", "Odd", (("float", (number * 7 + 3,)),), (("float", (1,)),), 0.05)
        seldom = KernelTime("seldom", "Odd", (("float", (1,)),), (("float", (1,)),), 0.001)
        profile = Profile((*probe.profile.kernels, odd, *([seldom] if number else [])), 0.1)
        probes.append(replace(probe, share=profile.total_ms / probe.dense_ms, profile=profile))
    table = table_of_probes(groups, probes)
    assert {kernel.name for kernel in table.kernels} == {kernel.name for kernel in kernels_at(probes[0].widths)}
    assert table.known_share < 1
    widths = fresh_widths(groups, 2)
    assert table.predict_ms(widths) == pytest.approx(total_ms(widths) + 0.151, rel=0.02)


def test_narrow_widths_cost_as_much_as_the_blocks_that_they_fill() -> None:
    _, _, groups = joined()
    table = replace(table_of_probes(groups, probes_of(groups)), block=16)
    assert table.predict_ms({"right.weight[0]": 4}) == table.predict_ms({"right.weight[0]": 16})
    assert table.predict_ms({"left.weight[0]": 16}) < table.predict_ms({"left.weight[0]": 20})


def test_no_two_sizes_look_alike_at_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, groups = joined()
    forms = axis_forms(groups)
    assert len(forms) == 5  # four groups, and the two branches joined
    found = choose_probes(groups, ALIGNMENT, forms, 6)
    assert found[0] == {group.name: group.width for group in groups.prunable}
    assert found == choose_probes(groups, ALIGNMENT, forms, 6)
    columns = [tuple(probe[name] / found[0][name] for probe in found) for name in found[0]]
    assert len(set(columns)) == len(columns)
    with pytest.raises(LatencyError, match="no group of .* has more than one width"):
        choose_probes(groups, Alignment(1000, 1000, "one width each"), forms, 4)
    monkeypatch.setattr(_probes, "_TRIES", 0)
    with pytest.raises(LatencyError, match="no 4 vectors of widths tell the 5 sizes"):
        choose_probes(groups, ALIGNMENT, forms, 4)


def test_groups_that_have_one_width_need_not_be_told_apart() -> None:
    _, _, groups = joined()
    widest = max(group.width for group in groups.prunable)
    assert len({group.name for group in groups.prunable if group.width < widest}) > 1
    found = choose_probes(groups, Alignment(widest // 2, widest // 2, "half"), axis_forms(groups), 6)
    fixed = {group.name for group in groups.prunable if group.width <= widest // 2}
    assert all(probe[name] == found[0][name] for probe in found for name in fixed)
    assert len({tuple(sorted(probe.items())) for probe in found}) > 1


def test_widths_of_a_prediction_are_checked() -> None:
    _, _, groups = joined()
    table = table_of_probes(groups, probes_of(groups))
    for widths in ({"stem.weight[0]": 0}, {"stem.weight[0]": 25}, {"nothing": 1}):
        with pytest.raises(ArgumentError, match="expected one of the 4 groups of the table"):
            table.predict_ms(widths)


def test_a_table_is_saved_and_loaded(tmp_path: Path) -> None:
    _, _, groups = joined()
    table = table_of_probes(groups, probes_of(groups))
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    widths = fresh_widths(groups, 3)
    assert again.predict_ms(widths) == table.predict_ms(widths)
    assert again.kernels == table.kernels
    assert again.points == table.points
    assert str(again) == str(table)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("terms"),
        lambda document: document.update(format=99),
        lambda document: document.update(terms=[[[77], 1.0]]),
        lambda document: document.update(terms=[[[0], -1.0]]),
        lambda document: document.update(dense_ms=0.0),
        lambda document: document.update(dense_ms=float("nan")),
        lambda document: document.update(groups="none"),
    ],
)
def test_a_damaged_table_is_refused(change: Any, tmp_path: Path) -> None:
    _, _, groups = joined()
    table_of_probes(groups, probes_of(groups)).save(tmp_path / "table.json")
    document = json.loads((tmp_path / "table.json").read_text())
    change(document)
    (tmp_path / "table.json").write_text(json.dumps(document))
    with pytest.raises(LatencyError, match="is no latency table of this version, or is damaged"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_table_of_another_device_or_model_is_refused() -> None:
    _, _, groups = joined()
    here = dict(Device().identity()) | {"inputs": ["float32[3, 8, 8]"]}
    check_table(table_of_probes(groups, probes_of(groups), here), groups, {"inputs": ["float32[3, 8, 8]"]})
    other = table_of_probes(groups, probes_of(groups), here | {"cpu": "another", "runtime": "onnxruntime 0.1"})
    with pytest.raises(
        ArgumentError, match="of another device or other inputs: runtime 'onnxruntime 0.1'.*cpu 'another'"
    ):
        check_table(other, groups, {"inputs": ["float32[3, 8, 8]"]})
    with pytest.raises(ArgumentError, match="Measure a table of this model"):
        check_table(replace(other, fingerprint="0" * 64), groups, {})


def test_without_kernels_whole_runs_follow_operations_and_parameters() -> None:
    _, _, groups = joined()
    cost = WidthCost(groups)

    def law(widths: Mapping[str, int]) -> float:
        found = cost(np.array([widths[group.name] for group in groups]))
        return 0.2 + 1e-6 * found.macs + 3e-5 * found.n_params

    def probe(widths: Mapping[str, int]) -> WidthProbe:
        dense = law({group.name: group.width for group in groups})
        return WidthProbe(widths, law(widths) / dense, dense, Profile((), 0.0, law(widths)), dense)

    table = table_of_probes(groups, [probe(one.widths) for one in probes_of(groups)])
    for seed in range(20):
        widths = fresh_widths(groups, seed)
        assert table.predict_ms(widths) == pytest.approx(law(widths), rel=1e-3)
    assert table.kernels == ()
    assert any("fitted to whole runs" in note for note in table.notes)


@pytest.mark.parametrize("light", [1.0, 0.2])
def test_a_compiled_model_takes_a_share_of_what_its_operators_take(light: float) -> None:
    """What has no products may take any share of its time, as where a compiler runs it with other operators."""
    _, _, groups = joined()

    def whole(widths: Mapping[str, int]) -> float:
        return 0.05 + sum(one.ms * (light if one.operator == "Concat" else 0.7) for one in kernels_at(widths))

    def probe(widths: Mapping[str, int]) -> WidthProbe:
        dense = whole({group.name: group.width for group in groups})
        kernels = tuple(replace(one, ms=one.ms * (20 if one.operator == "Concat" else 1)) for one in kernels_at(widths))
        return WidthProbe(widths, whole(widths) / dense, dense, Profile(kernels, 0.0, whole(widths)), dense)

    table = table_of_probes(groups, [probe(one.widths) for one in probes_of(groups)])
    for seed in range(20):
        widths = fresh_widths(groups, seed)
        assert table.predict_ms(widths) == pytest.approx(whole(widths), rel=1e-2)


def test_probes_are_plain_data() -> None:
    _, _, groups = joined()
    probe = probes_of(groups)[1]
    entry = json.loads(json.dumps(probe.to_json()))
    assert WidthProbe.from_json(entry) == probe
    whole = replace(probe, profile=Profile((), 0.0, 1.5))
    assert WidthProbe.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    with pytest.raises(ValueError, match="without times"):
        WidthProbe.from_json(entry | {"share": 0.0})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"threads": 0}, "threads"),
        ({"batch": -1}, "batch"),
        ({"runtime": "tvm"}, "runtime"),
        ({"provider": "NoExecutionProvider"}, "is not installed; onnxruntime has .*CPUExecutionProvider"),
        ({"provider": 3}, "provider"),
    ],
)
def test_devices_that_cannot_run_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        Device(**given)
