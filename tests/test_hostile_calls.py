"""Wrong arguments of public functions are refused by errors of our own, whatever they are."""

import inspect
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torchshear
from tests.blocks import RandomSource
from tests.hostile_calls import CALLBACKS, CALLS, Given, check_call, is_refused, parameters_of, values_refused
from tests.hostile_values import VALUES
from torchshear import comparison, configs, family, inspection, pruners, searching, speedup, training
from torchshear.compat import neural_compressor, nni, unipruning
from torchshear.pruners import masks, regularizers, schedules
from torchshear.speedup import latency

# Of these a call that succeeds takes half a second or more; `benchmarks/fuzz_inputs.py --section calls` makes many.
SLOW = (
    *(
        "compare",
        "compare_latency",
        "export_onnx",
        "prune",
        "prune by a config",
        "prune for a latency",
        "prune_in_rounds",
        "search",
        "prune_family",
        "shrink",
        "fold_constants",
    ),
    *("refit", "compensate", "measure_table"),
)

# Of these many wrong arguments are taken, and many calls so made take long together.
LONG = (
    *("L1NormPruner", "ActivationAPoZRankPruner", "SlimPruner", "Pruner.export_model", "shrink_to_form"),
    *("PrunedFamily.save", "PruningSession", "PruningSession by a config", "prepare_pruning"),
    *("LotteryTicket", "LotteryTicket.finish", "LotteryTicket.load_state_dict"),
)

# What is called by other code of ours, or by whoever writes a criterion or a rule, with values that were checked.
INNER = {
    *("isomorphism_classes", "criterion", "unit_sums", "registered_criteria", "detect_profile", "profiles"),
    *("layer_type", "applied_masks", "groups_document"),
}

# Methods that torch or other code of ours calls, or that are two of a kind with one that is called.
INNER_METHODS = {
    "Entry.asks_the_same",
    *("OutputFactor.register", "Mask.forward", "Mask.right_inverse", "TracedModule.forward"),
    "LatencyComparison.speedup_interval",
    *(f"SearchSpace.{name}" for name in ("at", "check_reachable", "of", "narrowed", "rescale", "shares_of", "uniform")),
    *(
        f"{name}.propose"
        for name in ("AMC", "Annealing", "Evolution", "Milp", "NetAdapt", "RandomSearch", "SearchMethod")
    ),
    *("Sensitivity.propose", "Uniform.propose", "NetAdapt.reduction"),
    *("Schedule.passed", "Penalty.value", "Penalty.after_step", "Penalty.load_state_dict", "Regularizer.bind"),
    "Penalty.update",
    *(
        f"{one}.curve"
        for one in ("Schedule", "AGP", "Cos", "Cube", "Exp", "Linear", "Lottery", "OneShot", "Poly", "Repeated")
    ),
    *(f"{one}.bind" for one in ("ADMM", "BlockLasso", "GroupLasso", "GrowingL2", "ScaleL1")),
    "GrowingL2.factor",
}
OF_PRUNERS = (pruners, masks, schedules, regularizers)
MODULES = (
    *(torchshear, configs, *OF_PRUNERS, speedup, latency, nni, unipruning, comparison, inspection, searching, family),
    training,
    neural_compressor,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    folder, before = tmp_path_factory.mktemp("calls"), Path.cwd()
    os.chdir(folder)  # what wrong paths write lies here
    yield Given.make(folder)
    os.chdir(before)


def test_every_public_function_is_called() -> None:
    public = {name for module in MODULES for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    assert public - INNER <= CALLS.keys(), "give the new function valid arguments in tests/hostile_calls.py"


def test_every_public_method_is_called() -> None:
    classes = {one for module in MODULES for name in module.__all__ if inspect.isclass(one := getattr(module, name))}
    methods = {
        f"{one.__name__}.{name}"
        for one in classes
        for name in vars(one)
        if not name.startswith("_") and inspect.isroutine(method := getattr(one, name))
        if inspect.signature(method).parameters.keys() - {"self"}
    }
    assert "PruningPlan.then" in methods
    assert methods - INNER_METHODS <= CALLS.keys(), "give the new method valid arguments in tests/hostile_calls.py"


@pytest.mark.parametrize("name", CALLS)
def test_valid_calls_succeed(name: str, made: Given) -> None:
    if name == "to_semi_structured" and not torch.cuda.is_available():
        pytest.skip("semi-structured tensors need CUDA")
    assert not is_refused(name, {}, made)


@given(st.integers(0, 2**32))
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
def test_wrong_arguments_are_refused(made: Given, seed: int) -> None:
    source = RandomSource(random.Random(seed))
    name = source.choice([name for name in CALLS if name not in SLOW])
    check_call(name, source, made)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in (*SLOW, *LONG)])
def test_every_wrong_value_of_every_argument(name: str, made: Given) -> None:
    for argument in parameters_of(name, made):
        refused = values_refused(name, argument, VALUES, made)
        assert refused or argument in CALLBACKS, f"{argument} takes whatever is given"


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("wrong", ["none", "text", "numpy array", "endless list", "object", "tensor", "nan"])
def test_wrong_arguments_of_slow_calls_are_refused(name: str, wrong: str, made: Given) -> None:
    first = next(iter(CALLS[name].valid(made)))
    assert is_refused(name, {first: wrong}, made)
