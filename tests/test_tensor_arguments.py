"""A tensor given as `args` is taken as one positional argument by every public function and class."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear import comparison, configs, family, inspection, pruners, speedup, training
from torchshear.compat import neural_compressor, nni, unipruning
from torchshear.pruners import masks
from torchshear.pruners.criteria._criterion import needs_of
from torchshear.speedup import latency
from torchshear.speedup.latency._kernels import KernelTime, Profile
from torchshear.speedup.latency._measure_table import input_identity
from torchshear.speedup.latency._probes import WidthProbe
from torchshear.speedup.latency._table import make_table

MODULES = (
    torchshear,
    configs,
    pruners,
    masks,
    speedup,
    latency,
    nni,
    neural_compressor,
    unipruning,
    comparison,
    inspection,
    family,
    training,
)
X = torch.randn(2, 4)
Use = Callable[[nn.Module, Any, Path], Any]


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def outputs(model: nn.Module) -> Tensor:
    return model(X).detach()


def planned(model: nn.Module) -> torchshear.PruningPlan:
    """A plan that is read from a file, so that the model is traced again."""
    return torchshear.plan(torchshear.analyze(torchshear.trace(model, (X,))), ratio=0.5)


def use_verify(model: nn.Module, args: Any, _: Path) -> Any:
    plan = planned(model)
    return torchshear.verify(model, torchshear.shrink(model, plan), plan, args).max_error


def use_fold(model: nn.Module, args: Any, _: Path) -> Any:
    plan = planned(made())
    shrunk = speedup.shrink_to_form(model, plan, args)
    return outputs(speedup.fold_constants(model, shrunk, plan, args).model)


def use_session(model: nn.Module, args: Any, _: Path) -> Any:
    session = torchshear.PruningSession(model, args, ratio=0.5, schedule=torchshear.schedules.OneShot(at=0))
    session.on_train_begin()
    session.on_train_end()
    return outputs(session.finish().model)


def use_manager(make: Any, **given: Any) -> Use:
    def use(model: nn.Module, args: Any, _: Path) -> Any:
        pruner = {"op_names": ["0"], "pattern": "1xchannel", "target_sparsity": 0.5}
        pruner["pruning_type"] = "snip" if given else "magnitude"
        manager = make(model, neural_compressor.WeightPruningConfig([pruner]), args=args, **given)
        if not given:
            manager.callbacks.on_train_begin()
        return outputs(manager.finish().model)

    return use


def use_named_pruner(kind: Any) -> Use:
    def use(model: nn.Module, args: Any, _: Path) -> Any:
        data: dict[str, Any] = {"data": [(X, X[:, :2])], "batches": 1, "loss_fn": nn.functional.mse_loss}
        data = data if kind.criterion is not None and needs_of(kind.criterion) else {}
        entry: dict[str, Any] = {"sparsity": 0.5, "op_types": ["Linear"]}
        if kind is nni.ConfigPruner:
            entry = {"target_sparsity": 0.5, "pruning_type": "magnitude", "pattern": "1xchannel", "op_names": ["0"]}
        return str(kind(model, [entry], args, **data).resolved)

    return use


def use_compare(model: nn.Module, args: Any, _: Path) -> Any:
    found = comparison.compare(model, lambda one: float(outputs(one).sum()), args, criteria=["l1"], ratio=0.5)
    return [row.scores for row in found.rows]


def use_search(model: nn.Module, args: Any, _: Path) -> Any:
    options: dict[str, Any] = {"method": "uniform", "ratio": 0.5, "progress": False}
    found = torchshear.search(model, args, evaluate=lambda one: float(outputs(one).sum()), **options)
    return [trial.score for trial in found.trials]


def use_searching(kind: Any, **needed: Any) -> Use:
    def use(model: nn.Module, args: Any, _: Path) -> Any:
        entry = {"sparsity": 0.25, "op_types": ["Linear"]}
        options: dict[str, Any] = {"evaluator": lambda one: float(outputs(one).sum()), "options": {"trials": 4}}
        return str(kind(model, [entry], args=args, **(options | needed)).found.trials[-1].widths)

    return use


def use_export(model: nn.Module, args: Any, folder: Path) -> Any:
    file = torchshear.export_onnx(model, folder / "model.onnx", args)
    return file.max_error


def use_refit(model: nn.Module, args: Any, _: Path) -> Any:
    plan = planned(made())
    small, data = torchshear.shrink(model, plan), [torch.randn(16, 4, generator=torch.Generator().manual_seed(0))]
    return outputs(speedup.refit(model, small, plan, data, args=args, batches=1, progress=False)[0])


def use_compensate(model: nn.Module, args: Any, _: Path) -> Any:
    plan = planned(made())
    small, data = torchshear.shrink(model, plan), [torch.randn(16, 4, generator=torch.Generator().manual_seed(0))]
    return outputs(torchshear.compensate(model, small, plan, data, args=args, batches=1, progress=False))


def use_table(model: nn.Module, args: Any, _: Path) -> Any:
    table = latency.measure_table(model, args, align=1, probes=4, use_cache=False, progress=False)
    return table.fingerprint, [point.widths for point in table.points]


def use_ticket(model: nn.Module, args: Any, _: Path) -> Any:
    ticket = training.LotteryTicket(model, args, rounds=1, ratio=0.5)
    assert list(ticket.rounds()) == [0, 1]
    return outputs(ticket.finish().model)


def use_gradual(kind: Any) -> Use:
    def use(model: nn.Module, args: Any, _: Path) -> Any:
        entry = {"final_sparsity": 0.5, "end_epoch": 1, "op_types": ["Linear"]}
        optimizer = torch.optim.SGD(model.parameters())
        pruner = kind(model, [entry], optimizer, pruning_algorithm="l1", args=args)
        pruner.compress()
        return outputs(pruner.shrink().model)

    return use


def use_lottery_pruner(model: nn.Module, args: Any, _: Path) -> Any:
    entry = {"prune_iterations": 1, "sparsity": 0.5, "op_types": ["Linear"]}
    pruner = nni.LotteryTicketPruner(model, [entry], torch.optim.SGD(model.parameters()), args=args)
    pruner.compress()
    for _ in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
    return outputs(pruner.shrink().model)


def use_scheduler(model: nn.Module, args: Any, _: Path) -> Any:
    generator = nni.LinearTaskGenerator(2, model, [{"sparsity": 0.5, "op_types": ["Linear"]}])
    return outputs(nni.PruningScheduler(nni.L1NormPruner, generator, args=args).compress())


def use_admm_pruner(model: nn.Module, args: Any, _: Path) -> Any:
    def trainer(model: nn.Module, optimizer: Any) -> None:
        model(X).sum().backward()
        optimizer.step()

    entry = {"sparsity": 0.5, "op_types": ["Linear"]}
    pruner = nni.ADMMPruner(model, [entry], trainer, num_iterations=1, training_epochs=1, args=args)
    pruner.compress()
    return outputs(pruner.shrink().model)


def use_family(model: nn.Module, args: Any, folder: Path) -> Any:
    """Widths that the device gives differ from call to call; what is looked at is what goes in."""
    groups = torchshear.analyze(torchshear.trace(model, args))
    identity = dict(latency.Device().identity()) | input_identity(args, None)
    kernel = KernelTime("0", "Gemm", (("float", (1, 4)),), (("float", (1, 2)),), 1.0)
    probes = [WidthProbe({"0.weight[0]": width}, 1.0, 1.0, Profile((kernel,), 0.1), 1.0) for width in (8, 4)]
    table = make_table(groups, probes, latency.Device(), identity, ("none", 1))
    words: dict[str, Any] = {"device": table, "align": 1, "must_be_faster": False, "progress": False}
    return torchshear.prune_family(model, args, targets=[1.0], **words)[1.0].plan.fingerprint


def use_auto_compress(model: nn.Module, args: Any, _: Path) -> Any:
    def trainer(model: nn.Module, optimizer: Any) -> None:
        model(X).sum().backward()
        optimizer.step()

    words: dict[str, Any] = {"num_iterations": 1, "admm_num_iterations": 1, "admm_epochs_per_iteration": 1}
    use = use_searching(nni.AutoCompressPruner, trainer=trainer, **words, options={"trials": 2})
    return use(model, args, _)


USES: dict[str, Use] = {
    "prune_family": use_family,
    "LotteryTicket": use_ticket,
    "prune_in_rounds": lambda model, args, _: outputs(training.prune_in_rounds(model, args, tasks=[0.5]).result.model),
    "measure_table": use_table,
    "refit": use_refit,
    "compensate": use_compensate,
    "trace": lambda model, args, _: torchshear.trace(model, args).fingerprint,
    "prune": lambda model, args, _: outputs(torchshear.prune(model, args, ratio=0.5).model),
    "shrink": lambda model, args, _: outputs(torchshear.shrink(model, planned(made()), args)),
    "shrink_to_form": lambda model, args, _: outputs(speedup.shrink_to_form(model, planned(made()), args).model),
    "verify": use_verify,
    "export_onnx": use_export,
    "fold_constants": use_fold,
    "compare": use_compare,
    "search": use_search,
    "SimulatedAnnealingPruner": use_searching(nni.SimulatedAnnealingPruner),
    "NetAdaptPruner": use_searching(
        nni.NetAdaptPruner, short_term_fine_tuner=lambda one: None, options={}, sparsity_per_iteration=0.25
    ),
    "AMCPruner": use_searching(nni.AMCPruner, total_episode=2, options={}),
    "AutoCompressPruner": use_auto_compress,
    "SensitivityPruner": use_searching(nni.SensitivityPruner, acc_drop_threshold=1e9, options={}),
    "PruningSession": use_session,
    "AGPPruner": use_gradual(nni.AGPPruner),
    "LinearPruner": use_gradual(nni.LinearPruner),
    "LotteryTicketPruner": use_lottery_pruner,
    "ADMMPruner": use_admm_pruner,
    "PruningScheduler": use_scheduler,
    "CompressionManager": use_manager(neural_compressor.CompressionManager),
    "parse_auto_slim_config": lambda model, args, _: neural_compressor.parse_auto_slim_config(
        model, args=args, ffn2_sparsity=0.5
    ),
    "prepare_compression": use_manager(neural_compressor.prepare_compression),
    "prepare_pruning": use_manager(
        neural_compressor.prepare_pruning, dataloader=[(X, X[:, :2])], loss_func=nn.functional.mse_loss
    ),
}


def public_uses() -> dict[str, Any]:
    """All public functions and classes with an argument `args`."""
    found: dict[str, Any] = {}
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            is_class = inspect.isclass(value) and not issubclass(value, Exception)
            if (inspect.isfunction(value) or is_class) and "args" in inspect.signature(value).parameters:
                found[name] = value
    return found


NAMED = {name: value for name, value in public_uses().items() if name not in USES and value is not nni.Pruner}


@pytest.mark.parametrize("name", [*USES, *NAMED])
def test_a_tensor_is_one_argument(name: str, tmp_path: Path) -> None:
    use = USES.get(name) or use_named_pruner(NAMED[name])
    found, expected = use(made(), X, tmp_path), use(made(), (X,), tmp_path)
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_every_use_is_public() -> None:
    public = public_uses()
    assert USES.keys() <= public.keys()
    others = [name for name, value in NAMED.items() if not issubclass(value, nni.Pruner)]
    assert not others, "add a use of the new function"
