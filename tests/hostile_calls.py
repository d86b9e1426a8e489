"""Wrong values for every argument of the public functions: each call works, or raises an error of our own tree."""

import inspect
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

import torchshear
from tests.blocks import Source
from tests.hostile_values import FAILS, PLACES, VALUES
from tests.speedup.latency.making_tables import joined, probes_of, table_of_probes
from torchshear import comparison, configs, dependency, family, inspection, pruners, searching, speedup, training
from torchshear.compat import neural_compressor, nni, unipruning
from torchshear.dependency._alignment import Alignment
from torchshear.errors import TorchshearError
from torchshear.latency_target import LatencyAllocation, LatencyRound
from torchshear.pruners import masks, regularizers, schedules
from torchshear.speedup import latency
from torchshear.speedup.compensation._recalibrate import check_recalibration
from torchshear.speedup.latency._measure_table import input_identity

CONFIG = [{"op_types": ["Conv2d"], "sparsity": 0.5}]
PRUNER = {"op_names": ["conv"], "pattern": "1xchannel", "pruning_type": "snip", "target_sparsity": 0.5}
FEW_ROUNDS = {
    "exclude": [f"{name}.weight[0]" for name in ("left", "right", "mix")],
    "max_ratio": 0.2,
}  # of `joined`: two widths
SECONDS = 30  # of one processor; a call that takes more hangs


class Network(nn.Module):
    """A small network with a convolution, a norm, attention-free and quick to capture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


@dataclass(frozen=True, repr=False)
class Given:
    """What valid calls are made with."""

    model: nn.Module
    x: Tensor
    graph: Any
    groups: Any
    plan: Any
    small: nn.Module
    statistics: Any
    grams: Any
    masks: Any
    second: Any
    pruner: Any
    compared: Any
    found: Any
    measured: Any
    table: Any
    tabled: tuple[nn.Module, Any]
    family: Any
    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Given":
        """Make all of it, with files in a folder."""
        torch.manual_seed(0)
        model, x = Network().eval(), torch.randn(2, 3, 6, 6)
        groups = torchshear.analyze(torchshear.trace(model, (x,)))
        result = torchshear.prune(model, (x,))
        data = [(x, torch.tensor([0, 1]))]
        statistics = torchshear.collect(groups, data, cross_entropy, batches=1, progress=False)
        grams = torchshear.collect(groups, data, batches=1, criteria="reconstruction", progress=False)
        laid = masks.choose_masks(model, "1x1", 0.5)
        laid.save(folder / "masks.safetensors")
        result.plan.save(folder / "plan.json")
        torchshear.export_onnx(model, folder / "dense.onnx", (x,))
        second = torchshear.plan(torchshear.analyze(torchshear.trace(result.model, (x,))))
        pruner = nni.L1NormPruner(model, CONFIG, args=(x,))
        pruner.compress()
        compared = comparison.compare(model, lambda model: 0.5, args=(x,), criteria=["l1"], seeds=(0,), ratio=0.5)
        searched = {"evaluate": lambda model: 0.5, "method": "uniform", "target_macs": 0.5, "progress": False}
        found = torchshear.search(model, (x,), **searched)
        measured = torchshear.compare_latency(
            {"dense": folder / "dense.onnx", "same": folder / "dense.onnx"}, batch=1, rounds=2, min_seconds=1e-4
        )
        unipruning.write_unipruning_mask(result.plan, folder / "mask.json")
        (folder / "config.yaml").write_text("- op_types: [Conv2d]\n  sparsity: 0.5\n")
        (folder / "src").mkdir()
        save_file(model.state_dict(), folder / "src" / "model.safetensors")
        torch.manual_seed(0)
        made = (groups.graph, groups, result.plan, result.model, statistics, grams)
        *tabled, analyzed = joined()
        here = dict(latency.Device().identity()) | input_identity(tabled[1], None)
        table = table_of_probes(analyzed, probes_of(analyzed), here)  # of no measurement, which would take long
        table.save(folder / "table.json")
        made_for = made_family(tuple(tabled), measured, table)
        return cls(
            model, x, *made, laid, second, pruner, compared, found, measured, table, tuple(tabled), made_for, folder
        )


def made_family(tabled: tuple[nn.Module, Any], measured: Any, table: Any) -> family.PrunedFamily:
    """A family whose only member was not made for its target, and times of something else."""
    result = torchshear.prune(*tabled)
    times = LatencyRound({}, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    allocation = LatencyAllocation(table.device, 1.0, 1.0, {}, (times,), 0, 0.0, 1.0, (0.0, 0.0))
    return family.PrunedFamily("Joined", ("same",), (replace(result, allocation=allocation),), measured, table)


class Call(NamedTuple):
    """A public function, and arguments with which it works."""

    function: Callable[..., Any]
    valid: Callable[[Given], dict[str, Any]]


def data(given: Given) -> Any:
    return [(given.x, torch.tensor([0, 1]))]


def samples(given: Given) -> dict[str, Any]:
    """Return what a refit takes: several samples."""
    return {"loader": [given.x.repeat(8, 1, 1, 1)], "batches": 1, "progress": False}


def session_in(*hooks: str) -> torchshear.PruningSession:
    """A session of a new network, to which some hooks have come."""
    session = torchshear.PruningSession(Network(), torch.randn(2, 3, 6, 6), schedule=schedules.OneShot(at=0))
    for hook in hooks:
        getattr(session, hook)(*([0] if hook == "on_epoch_begin" else []))
    return session


def unipruner(given: Given, is_applied: bool = False) -> unipruning.UniPruner:
    """A pruner that asks for half of the channels of a new network, and has written its files if it is applied."""
    words = {"target_sparsity": 0.6, "pruning_step": 4, "filter_lower_threshold": 4, "exp_name": "hostile"}
    pruner = unipruning.UniPruner(words | {"output_path": str(given.folder)})
    if is_applied:
        pruner.apply(Network(), given.x)
        pruner.write(0)
    return pruner


def ffn() -> nn.Module:
    """A feed-forward network between two layers."""
    return nn.Sequential(
        nn.Linear(4, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 2)
    )


def manager(given: Given) -> neural_compressor.CompressionManager:
    """A manager whose training has begun."""
    config = neural_compressor.WeightPruningConfig([PRUNER])
    made = neural_compressor.prepare_compression(Network(), config, args=given.x)
    made.callbacks.on_train_begin()
    return made


def zeroing(given: Given) -> unipruning.ZeroingCallback:
    """A callback to which the beginning of a training has come."""
    (callback,) = unipruner(given, True).callbacks()
    callback.on_train_begin()
    return callback


def masked(pattern: str = "1x1") -> dict[str, Any]:
    """A network on which masks of its last layer lie, and the masks."""
    model = Network()
    chosen = masks.choose_masks(model, pattern, 0.5, layers=["fc"])
    masks.apply(model, chosen)
    return {"model": model, "masks": chosen}


def semi_structured() -> dict[str, Any]:
    """A network whose last layer is zero where it is masked, and the masks."""
    found = masked("2:4")
    masks.make_permanent(found["model"])
    return found


def ticket() -> training.LotteryTicket:
    """A lottery ticket in its first round."""
    made = training.LotteryTicket(Network(), torch.randn(2, 3, 6, 6), rounds=1)
    made.begin_round()
    return made


def gradual(given: Given) -> nni.AGPPruner:
    """A pruner that has begun on a new network."""
    pruner = nni.AGPPruner(Network(), CONFIG, args=given.x)
    pruner.compress()
    return pruner


CALLS: dict[str, Call] = {
    "trace": Call(torchshear.trace, lambda g: {"model": g.model, "args": (g.x,), "kwargs": {}, "submodules": None}),
    "analyze": Call(torchshear.analyze, lambda g: {"graph": g.graph, "prunable_outputs": ()}),
    "plan": Call(torchshear.plan, lambda g: {"groups": g.groups, "criterion": "l1", "ratio": 0.5, "align": None,
        "min_width": 1, "roles": None, "exclude": (), "weights": None, "statistics": None, "scope": "local",
        "min_ratio": 0.0, "max_ratio": None, "group_reduction": "sum", "normalize": "auto"}),
    "plan for a target": Call(torchshear.plan, lambda g: {"groups": g.groups, "scope": "global", "target_macs": 0.7,
        "target_params": None, "target_size": None}),
    "plan for a size": Call(torchshear.plan, lambda g: {"groups": g.groups, "target_size": "1KB"}),
    "prune": Call(torchshear.prune, lambda g: {"model": g.model, "args": (g.x,), "kwargs": None, "criterion": "taylor",
        "ratio": 0.5, "align": None, "min_width": 1, "data": data(g), "loss_fn": cross_entropy, "batches": 1,
        "compensate": "statistics", "prunable_outputs": (), "submodules": None, "progress": False}),
    "prune for a latency": Call(torchshear.prune, lambda g: {"model": g.tabled[0], "args": g.tabled[1],
        "target_latency": 1.0, "target_size": 1.0, "device": g.table, "align": 4, "must_be_faster": False,
        **FEW_ROUNDS}),
    "prune_family": Call(torchshear.prune_family, lambda g: {"model": g.tabled[0], "args": g.tabled[1],
        "targets": [1.0], "device": g.table, "align": 4, "must_be_faster": False, "evaluate": lambda model: 0.5,
        "progress": False, **FEW_ROUNDS}),
    "PrunedFamily.draw": Call(family.PrunedFamily.draw, lambda g: {"self": g.family,
        "path": g.folder / "family.png"}),
    "PrunedFamily.save": Call(family.PrunedFamily.save, lambda g: {"self": g.family,
        "folder": Path(tempfile.mkdtemp(dir=g.folder))}),
    "prune by a config": Call(torchshear.prune, lambda g: {"model": g.model, "args": (g.x,), "config": CONFIG,
        "criterion": "l1"}),
    "shrink": Call(torchshear.shrink, lambda g: {"model": g.model, "plan": g.plan, "args": (g.x,), "kwargs": {},
        "verify": True}),
    "verify": Call(torchshear.verify, lambda g: {"model": g.model, "small": g.small, "plan": g.plan, "args": (g.x,),
        "kwargs": {}, "seed": 0, "data": data(g), "batches": 1}),
    "collect": Call(torchshear.collect, lambda g: {"network": g.groups, "loader": data(g), "loss_fn": cross_entropy,
        "batches": 1, "progress": False, "criteria": "taylor", "exclude": ()}),
    "recalibrate": Call(torchshear.recalibrate, lambda g: {"model": g.model, "loader": data(g), "batches": 1,
        "progress": False}),
    "export_onnx": Call(torchshear.export_onnx, lambda g: {"model": g.model, "path": g.folder / "small.onnx",
        "args": (g.x,), "kwargs": {}, "check_batches": (1,), "rtol": 2e-4, "atol": 1e-6}),
    "compare_latency": Call(torchshear.compare_latency, lambda g: {"models": {"dense": g.folder / "dense.onnx"},
        "inputs": None, "batch": 1, "threads": 1, "provider": "CPUExecutionProvider", "rounds": 2, "warmup": 1,
        "min_seconds": 1e-4, "confidence": 0.9, "seed": 0}),
    "measure_table": Call(latency.measure_table, lambda g: {"model": g.model, "args": (g.x,), "kwargs": {},
        "device": latency.Device(batch=2), "align": 4, "probes": 4, "use_cache": False, "progress": False}),
    "measure_staircase": Call(latency.measure_staircase, lambda g: {"device": latency.Device(), "use_cache": False}),
    "LatencyTable.predict_ms": Call(latency.LatencyTable.predict_ms, lambda g: {"self": g.table,
        "widths": {"stem.weight[0]": 8}}),
    "LatencyTable.save": Call(latency.LatencyTable.save, lambda g: {"self": g.table,
        "path": g.folder / "table copy.json"}),
    "LatencyTable.load": Call(latency.LatencyTable.load, lambda g: {"path": g.folder / "table.json"}),
    "load_checkpoint": Call(torchshear.load_checkpoint, lambda g: {"model": Network(), "source": g.folder / "src"}),
    "shrink_checkpoint": Call(torchshear.shrink_checkpoint, lambda g: {"plan": g.plan, "source": g.folder / "src",
        "destination": g.folder / "out", "unknown": "refuse"}),
    "PruningPlan.load": Call(torchshear.PruningPlan.load, lambda g: {"path": g.folder / "plan.json"}),
    "PruningPlan.save": Call(torchshear.PruningPlan.save, lambda g: {"self": g.plan, "path": g.folder / "p.json"}),
    "PruningPlan.then": Call(torchshear.PruningPlan.then, lambda g: {"self": g.plan, "second": g.second}),
    "L1NormPruner": Call(nni.L1NormPruner, lambda g: {"model": g.model, "config_list": CONFIG, "args": (g.x,),
        "kwargs": None, "dependency_aware": False, "align": None, "min_width": 1}),
    "ActivationAPoZRankPruner": Call(nni.ActivationAPoZRankPruner, lambda g: {"model": g.model, "config_list": CONFIG,
        "args": (g.x,), "data": data(g), "batches": 1}),
    "SlimPruner": Call(nni.SlimPruner, lambda g: {"model": g.model,
        "config_list": [{"op_types": ["BatchNorm2d"], "sparsity": 0.5}], "args": (g.x,)}),
    "LevelPruner": Call(nni.LevelPruner, lambda g: {"model": g.model, "config_list": CONFIG, "args": ()}),
    "AGPPruner": Call(nni.AGPPruner, lambda g: {"model": g.model, "config_list": CONFIG, "args": (g.x,)}),
    "LinearPruner": Call(nni.LinearPruner, lambda g: {"model": g.model, "config_list": CONFIG, "total_iteration": 2}),
    "LotteryTicketPruner": Call(nni.LotteryTicketPruner, lambda g: {"model": g.model, "config_list": [
        {**CONFIG[0], "prune_iterations": 2}], "optimizer": torch.optim.SGD(g.model.parameters())}),
    "ADMMPruner": Call(nni.ADMMPruner, lambda g: {"model": g.model, "config_list": CONFIG,
        "trainer": lambda model: None}),
    "AMCPruner": Call(nni.AMCPruner, lambda g: {"model": g.model, "config_list": CONFIG, "evaluator": lambda model: 0.0,
        "train_episode": 2, "warmup": 1}),
    "AMC": Call(searching.AMC, lambda g: {"episodes": 4, "warm_up": 2}),
    "Annealing": Call(searching.Annealing, lambda g: {"start": 50.0}),
    "Evolution": Call(searching.Evolution, lambda g: {"population": 4}),
    "NetAdapt": Call(searching.NetAdapt, lambda g: {"step": 0.1}),
    "RandomSearch": Call(searching.RandomSearch, lambda g: {"batch": 4}),
    "Sensitivity": Call(searching.Sensitivity, lambda g: {"step": 0.2}),
    "NetAdaptPruner": Call(nni.NetAdaptPruner, lambda g: {"model": g.model, "config_list": CONFIG,
        "short_term_fine_tuner": lambda model: None, "evaluator": lambda model: 0.0}),
    "SensitivityPruner": Call(nni.SensitivityPruner, lambda g: {"model": g.model, "config_list": CONFIG,
        "evaluator": lambda model: 0.0}),
    "SimulatedAnnealingPruner": Call(nni.SimulatedAnnealingPruner, lambda g: {"model": g.model, "config_list": CONFIG,
        "evaluator": lambda model: 0.0}),
    "AutoCompressPruner": Call(nni.AutoCompressPruner, lambda g: {"model": g.model, "config_list": CONFIG,
        "trainer": lambda model: None, "evaluator": lambda model: 0.0, "num_iterations": 1}),
    "LinearTaskGenerator": Call(nni.LinearTaskGenerator, lambda g: {"total_iteration": 2, "origin_model": g.model,
        "origin_config_list": CONFIG, "origin_masks": {}}),
    "PruningScheduler": Call(nni.PruningScheduler, lambda g: {"pruner": "l1", "task_generator":
        nni.LinearTaskGenerator(2, g.model, CONFIG)}),
    "AGPPruner.update_epoch": Call(nni.AGPPruner.update_epoch, lambda g: {
        "self": gradual(g), "epoch": 0}),
    "AGPPruner.get_pruned_weights": Call(nni.AGPPruner.get_pruned_weights, lambda g: {"self": gradual(g), "dim": 0}),
    "AGPPruner.load_model_state_dict": Call(nni.AGPPruner.load_model_state_dict, lambda g: {"self": gradual(g),
        "state": g.model.state_dict()}),
    "Pruner.export_model": Call(nni.Pruner.export_model, lambda g: {"self": g.pruner,
        "model_path": g.folder / "model.safetensors", "mask_path": g.folder / "m.safetensors", "onnx_path": None}),
    "reconstruction_errors": Call(pruners.reconstruction_errors, lambda g: {"groups": g.groups, "statistics": g.grams}),
    "channel_means": Call(pruners.channel_means, lambda g: {"network": g.groups, "loader": data(g), "batches": 1,
        "progress": False}),
    "plan_from_kept": Call(pruners.plan_from_kept, lambda g: {"groups": g.groups, "kept": dict(g.plan.kept)}),
    "plan_dependency_aware": Call(nni.plan_dependency_aware, lambda g: {"groups": g.groups, "ratios": {"conv": 0.5},
        "criterion": "l1", "extra": "apply"}),
    "plan_unipruning": Call(unipruning.plan_unipruning, lambda g: {"groups": g.groups, "target_params": 0.8, "run": 1,
        "min_width": 1}),
    "parse_config": Call(configs.parse_config, lambda g: {"config": CONFIG}),
    "load_config": Call(configs.load_config, lambda g: {"path": g.folder / "config.yaml"}),
    "check_recalibration": Call(check_recalibration, lambda g: {"model": g.model, "batches": 1}),
    "shrink_to_form": Call(speedup.shrink_to_form, lambda g: {"model": g.model, "plan": g.plan, "form": "native",
        "verify": False}),
    "shrink_optimizer": Call(speedup.shrink_optimizer, lambda g: {"optimizer": torch.optim.SGD(g.model.parameters()),
        "model": g.model, "small": g.small, "plan": g.plan}),
    "shrink_average": Call(speedup.shrink_average, lambda g: {"averaged": AveragedModel(g.model), "model": g.model,
        "small": g.small, "plan": g.plan}),
    "plan_from_unipruning_mask": Call(unipruning.plan_from_unipruning_mask, lambda g: {"groups": g.groups,
        "path": g.folder / "mask.json"}),
    "write_unipruning_mask": Call(unipruning.write_unipruning_mask, lambda g: {"plan": g.plan,
        "path": g.folder / "written.json"}),
    "read_unipruning_config": Call(unipruning.read_unipruning_config, lambda g: {"config": {"target_sparsity": 0.5}}),
    "resolve": Call(configs.resolve, lambda g: {"model": g.model, "entries": configs.parse_config(CONFIG),
        "groups": g.groups}),
    "random_criterion": Call(pruners.random_criterion, lambda g: {"seed": 0}),
    "choose_masks": Call(masks.choose_masks, lambda g: {"model": g.model, "pattern": "1x1", "ratio": 0.5}),
    "apply": Call(masks.apply, lambda g: {"model": Network(), "masks": g.masks}),
    "remove": Call(masks.remove, lambda g: {"model": masked()["model"]}),
    "make_permanent": Call(masks.make_permanent, lambda g: {"model": masked()["model"]}),
    "pattern_lock": Call(masks.pattern_lock, lambda g: {"model": g.model, "layers": None}),
    "plan_from_masks": Call(masks.plan_from_masks, lambda g: {"groups": g.groups, "masks": g.masks}),
    "to_semi_structured": Call(masks.to_semi_structured, lambda g: semi_structured()),
    "Masks.of": Call(masks.Masks.of, lambda g: {"tensors": {"fc.weight": torch.ones(4, 8, dtype=torch.bool)},
        "pattern": "1x1"}),
    "Masks.save": Call(masks.Masks.save, lambda g: {"self": g.masks, "path": g.folder / "saved.safetensors"}),
    "Masks.load": Call(masks.Masks.load, lambda g: {"path": g.folder / "masks.safetensors"}),
    "report": Call(masks.report, lambda g: {"masks": g.masks, "width": 100}),
    "compare": Call(comparison.compare, lambda g: {"model": g.model, "evaluate": lambda model: 0.5, "args": (g.x,),
        "kwargs": None, "criteria": ["l1"], "seeds": (0,), "target_macs": 0.5, "scope": "local"}),
    "search": Call(torchshear.search, lambda g: {"model": g.model, "evaluate": lambda model: 0.5, "args": (g.x,),
        "kwargs": None, "method": "random", "trials": 2, "target_macs": 0.5, "seed": 0, "stop_early": "median",
        "reuse_activations": False,
        "progress": False}),
    "SearchResult.draw": Call(searching.SearchResult.draw, lambda g: {"self": g.found, "path": g.folder / "s.png"}),
    "Comparison.row": Call(comparison.Comparison.row, lambda g: {"self": g.compared, "criterion": "l1",
        "budget": g.compared.budgets[0]}),
    "Comparison.ranked": Call(comparison.Comparison.ranked, lambda g: {"self": g.compared,
        "budget": g.compared.budgets[0]}),
    "Comparison.draw": Call(comparison.Comparison.draw, lambda g: {"self": g.compared,
        "path": g.folder / "picture.png"}),
    "LatencyComparison.speedup": Call(speedup.LatencyComparison.speedup, lambda g: {"self": g.measured,
        "name": "same"}),
    "LatencyComparison.uncertainty": Call(speedup.LatencyComparison.uncertainty, lambda g: {"self": g.measured,
        "name": "same"}),
    "LatencyComparison.is_faster": Call(speedup.LatencyComparison.is_faster, lambda g: {"self": g.measured,
        "name": "same"}),
    "ChannelGroups.describe": Call(dependency.ChannelGroups.describe, lambda g: {"self": g.groups, "mode": "eval"}),
    "ChannelGroups.to_networkx": Call(dependency.ChannelGroups.to_networkx, lambda g: {"self": g.groups,
        "mode": "train"}),
    "Alignment": Call(Alignment, lambda g: {"block": 8, "granule": 4, "name": "own", "linear": 2}),
    "Alignment.allowed_widths": Call(Alignment.allowed_widths, lambda g: {"self": Alignment(8, 4, "own"), "width": 20,
        "multiplicity": 1, "is_convolved": True}),
    "describe_groups": Call(inspection.describe_groups, lambda g: {"groups": g.groups}),
    "write_page": Call(inspection.write_page, lambda g: {"groups": g.groups, "path": g.folder / "page.html"}),
    "fold_constants": Call(speedup.fold_constants, lambda g: {"model": g.model,
        "shrunk": speedup.shrink_to_form(g.model, g.plan), "plan": g.plan}),
    "refit": Call(speedup.refit, lambda g: {"model": g.model, "small": g.small, "plan": g.plan, "args": (g.x,),
        "kwargs": {}} | samples(g)),
    "distill": Call(torchshear.distill, lambda g: {"small": g.small, "model": g.model, "loader": 2 * data(g),
        "steps": 2, "plan": g.plan, "progress": False, "learning_rate": 1e-3, "weight_decay": 0.0, "temperature": 1.0,
        "layer_weight": 1.0, "checkpoint": None}),
    "PruningSession": Call(torchshear.PruningSession, lambda g: {"model": Network(), "args": g.x,
        "schedule": schedules.AGP(end=4), "optimizer": None, "writer": None}),
    "PruningSession.on_epoch_begin": Call(torchshear.PruningSession.on_epoch_begin, lambda g: {
        "self": session_in("on_train_begin"), "epoch": 0}),
    "PruningSession.on_step_begin": Call(torchshear.PruningSession.on_step_begin, lambda g: {
        "self": session_in("on_train_begin", "on_epoch_begin"), "step": 0}),
    "PruningSession.on_before_optimizer_step": Call(torchshear.PruningSession.on_before_optimizer_step, lambda g: {
        "self": session_in("on_train_begin", "on_epoch_begin", "on_step_begin"), "grad_scale": None}),
    "PruningSession.on_step_end": Call(torchshear.PruningSession.on_step_end, lambda g: {
        "self": session_in("on_train_begin", "on_epoch_begin", "on_step_begin"), "loss": 0.5}),
    "PruningSession.finish": Call(torchshear.PruningSession.finish, lambda g: {
        "self": session_in("on_train_begin", "on_train_end"), "form": "auto"}),
    "PruningSession.load_state_dict": Call(torchshear.PruningSession.load_state_dict, lambda g: {
        "self": session_in(), "state": session_in().state_dict()}),
    "LotteryTicket": Call(training.LotteryTicket, lambda g: {"model": Network(), "args": g.x, "kwargs": None,
        "ratio": 0.5, "rounds": 2, "optimizer": None, "scheduler": None, "others": None, "control": "random",
        "initialise": None, "seed": 0}),
    "LotteryTicket.finish": Call(training.LotteryTicket.finish, lambda g: {"self": ticket(), "form": "auto"}),
    "LotteryTicket.load_state_dict": Call(training.LotteryTicket.load_state_dict, lambda g: {"self":
        training.LotteryTicket(Network(), g.x, rounds=1), "state": ticket().state_dict()}),
    "by_criterion": Call(training.by_criterion, lambda g: {"criterion": "l1", "unit": "macs", "statistics": None,
        "scope": "auto"}),
    "prune_in_rounds": Call(training.prune_in_rounds, lambda g: {"model": g.model, "args": g.x, "tasks": [0.5],
        "pruner": "l1", "folder": None}),
    "AGP": Call(schedules.AGP, lambda g: {"start": 0, "end": 8, "frequency": 2, "initial": 0.0, "by": "step"}),
    "Poly": Call(schedules.Poly, lambda g: {"end": 8, "power": 2.0}),
    "OneShot": Call(schedules.OneShot, lambda g: {"at": 3, "by": "epoch"}),
    "Schedule.ratio": Call(schedules.Schedule.ratio, lambda g: {"self": schedules.AGP(end=8), "position": 3,
        "final": 0.5}),
    "Schedule.draw": Call(schedules.Schedule.draw, lambda g: {"self": schedules.AGP(end=8),
        "path": g.folder / "schedule.png", "final": 0.5}),
    "History.draw": Call(schedules.History.draw, lambda g: {"self": schedules.History(0.5, "channels"),
        "path": g.folder / "history.png"}),
    "ScaleL1": Call(regularizers.ScaleL1, lambda g: {"coefficient": 1e-4}),
    "GroupLasso": Call(regularizers.GroupLasso, lambda g: {"coefficient": 1e-4, "run": 2, "sized": True}),
    "BlockLasso": Call(regularizers.BlockLasso, lambda g: {"pattern": "4x1", "coefficient": 1e-4, "sized": False}),
    "GrowingL2": Call(regularizers.GrowingL2, lambda g: {"growth": 1e-4, "every": 10, "most": 1.0}),
    "ADMM": Call(regularizers.ADMM, lambda g: {"rho": 1e-3, "every": 10, "by": "epoch", "growth": 1.1, "most": 1.0}),
    "Repeated": Call(schedules.Repeated, lambda g: {"frequency": 3, "start": 0, "end": 9, "by": "epoch"}),
    "PruningSession by a config": Call(torchshear.PruningSession, lambda g: {"model": Network(), "args": g.x,
        "schedule": schedules.AGP(end=4), "config": CONFIG, "criterion": "l2", "align": 1, "min_width": 1}),
    "WeightPruningConfig": Call(neural_compressor.WeightPruningConfig, lambda g: {"pruning_configs": [PRUNER]}),
    "CompressionManager": Call(neural_compressor.CompressionManager, lambda g: {"model": Network(),
        "config": neural_compressor.WeightPruningConfig([PRUNER]), "args": g.x, "kwargs": None, "data": None,
        "loss_fn": None, "batches": None, "at_once": False}),
    "CompressionManager.finish": Call(neural_compressor.CompressionManager.finish, lambda g: {"self": manager(g),
        "form": "auto"}),
    "CompressionManager.save": Call(neural_compressor.CompressionManager.save, lambda g: {"self": manager(g),
        "root": g.folder / "saved"}),
    "parse_auto_slim_config": Call(neural_compressor.parse_auto_slim_config, lambda g: {"model": ffn(),
        "dataloader": None, "ffn2_sparsity": 0.5, "mha_sparsity": 0.0, "args": torch.randn(2, 4), "kwargs": None}),
    "prepare_compression": Call(neural_compressor.prepare_compression, lambda g: {"model": Network(),
        "confs": neural_compressor.WeightPruningConfig([PRUNER]), "args": g.x, "kwargs": None}),
    "prepare_pruning": Call(neural_compressor.prepare_pruning, lambda g: {"model": Network(),
        "config": neural_compressor.WeightPruningConfig([PRUNER]), "optimizer": None, "dataloader": data(g),
        "loss_func": cross_entropy, "args": g.x, "kwargs": None}),
    "UniPruner": Call(unipruning.UniPruner, lambda g: {"config": {"target_sparsity": 0.5}, "soft": True,
        "use_gamma": False}),
    "UniPruner.apply": Call(unipruning.UniPruner.apply, lambda g: {"self": unipruner(g), "model": Network(),
        "args": g.x, "kwargs": None, "optimizer": None}),
    "UniPruner.write": Call(unipruning.UniPruner.write, lambda g: {"self": unipruner(g, True), "epoch": 0}),
    "UniPruner.resume": Call(unipruning.UniPruner.resume, lambda g: {"self": unipruner(g, True),
        "checkpoint": g.folder / "hostile" / "hostile_zeroed_rank0_epoch0.ckpt"}),
    "UniPruner.convert": Call(unipruning.UniPruner.convert, lambda g: {"self": unipruner(g), "model": g.model,
        "mask": g.folder / "mask.json", "args": g.x}),
    "ZeroingCallback": Call(unipruning.ZeroingCallback, lambda g: {"pruner": unipruner(g, True)}),
    "ZeroingCallback.on_epoch_begin": Call(unipruning.ZeroingCallback.on_epoch_begin, lambda g: {
        "self": zeroing(g), "epoch": 0}),
    "compensate": Call(torchshear.compensate, lambda g: {"model": g.model, "small": g.small, "plan": g.plan,
        "method": "refit"} | samples(g)),
}  # fmt: skip

CALLBACKS = (
    *("criterion", "evaluate", "evaluator", "finetune", "finetuner", "loss_fn", "progress", "score", "trainer"),
    "val_loader",
)  # called, or handed to what is called


def parameters_of(name: str, given: Given) -> list[str]:
    """The arguments of a call that are made wrong: those that it is given, and all others of the function."""
    known = CALLS[name].valid(given)
    named = inspect.signature(CALLS[name].function).parameters.values()
    own = [one.name for one in named if one.kind is not inspect.Parameter.VAR_KEYWORD]
    return [argument for argument in dict.fromkeys([*known, *own]) if argument != "self"]


def check_call(name: str, source: Source, given: Given) -> bool:
    """Call a public function with one or two wrong arguments; anything but success and an error of ours fails.

    What an iterable or a function of the user raises is passed on.

    Args:
        name: key of `CALLS`.
        source: chooses the arguments and the values.
        given: what valid calls are made with.

    Returns:
        Whether the call was refused.
    """
    n_wrong = source.choice([1, 1, 2])
    names = parameters_of(name, given)
    wrong = {source.choice(names): _key(source) for _ in range(n_wrong)}
    return is_refused(name, wrong, given)


def _key(source: Source) -> str:
    """A key of `VALUES`, or one and where it stands, as in "text in a list"."""
    key = source.choice(list(VALUES))
    return f"{key} in {source.choice(list(PLACES))}" if source.choice([True, False]) else key


def _wrong(key: str) -> Any:
    """A new value for a key as `_key` gives it."""
    value, _, place = key.partition(" in ")
    return PLACES[place](VALUES[value]()) if place else VALUES[value]()


def values_refused(name: str, argument: str, values: Iterable[str], given: Given) -> list[str]:
    """The wrong values of one argument that are refused.

    An object whose method is called is made anew only behind a call that was not: one that was has changed nothing.
    """
    refused, valid = [], None
    for value in values:
        valid = CALLS[name].valid(given) if valid is None else valid
        is_used_up = "self" not in valid or any(isinstance(one, Iterator) for one in valid.values())
        if is_refused(name, {argument: value}, given, valid):
            refused.append(value)
        else:
            is_used_up = True
        valid = None if is_used_up else valid
    return refused


def is_refused(name: str, wrong: Mapping[str, str], given: Given, valid: Mapping[str, Any] | None = None) -> bool:
    """Whether a call is refused whose wrong arguments keys tell, as "text" or "text in a list"; see `check_call`."""
    call = CALLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of values that it discourages
        arguments = dict(call.valid(given) if valid is None else valid)
        arguments |= {argument: _wrong(key) for argument, key in wrong.items()}
    if any(argument in CALLBACKS and callable(arguments[argument]) for argument in wrong):
        return False  # what a function of the user raises is passed on
    started = time.process_time()
    try:
        call.function(**arguments)
        message = None
    except TorchshearError as error:
        message = str(error)
    except Exception as error:
        if not getattr(error, "__notes__", None) and str(error) != FAILS:
            error.add_note(f"{name} with {dict(wrong)}")
            raise
        return True
    seconds = time.process_time() - started
    assert seconds < SECONDS, f"{name} with {dict(wrong)}: {seconds:.0f} s"
    assert message is None or 0 < len(message) < 20_000, f"{name} with {dict(wrong)}: {message!r}"
    return message is not None
