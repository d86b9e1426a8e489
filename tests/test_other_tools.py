"""Names of other tools: imported, looked up or given as keywords they answer with what to use here."""

import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import torchshear
from torchshear import _other_tools
from torchshear.compat import neural_compressor, nni, unipruning
from torchshear.compat.nni import L1NormPruner, LevelPruner, Pruner
from torchshear.errors import KeywordError, OtherToolImportError, OtherToolNameError, TorchshearError

MIGRATION = Path(__file__).parents[1] / "docs" / "migration.md"
TABLES = {**_other_tools.NAMES, **_other_tools.METHODS, **_other_tools.KEYWORDS}


@pytest.mark.parametrize("package", ["torchshear", "torchshear.pruners"])
def test_importing_a_name_of_another_tool_shows_what_to_use(package: str) -> None:
    for name in (
        "AGPPruner",
        "prepare_pruning",
        "prepare_compression",
        "UniPruner",
        "MagnitudePruner",
        "DependencyGraph",
    ):
        with pytest.raises(ImportError, match=f"^{package} has no '{name}': ") as error:
            exec(f"from {package} import {name}", {})
        assert isinstance(error.value, TorchshearError | OtherToolImportError)
        with pytest.raises(AttributeError, match=f"^{package} has no '{name}': "):
            getattr(import_module(package), name)
        assert not hasattr(import_module(package), name)
    with pytest.raises(ImportError, match="prepare_pruning.* in torchshear.compat.neural_compressor"):
        from torchshear.pruners import prepare_pruning  # noqa: F401


def test_names_that_nobody_knows_are_missing_as_anywhere() -> None:
    with pytest.raises(ImportError, match="cannot import name 'AGPPrunr' from 'torchshear.pruners'"):
        exec("from torchshear.pruners import AGPPrunr", {})
    with pytest.raises(AttributeError, match="module 'torchshear' has no attribute 'prun'") as error:
        torchshear.prun  # noqa: B018
    assert not isinstance(error.value, TorchshearError)


def test_methods_of_other_pruners_say_what_to_use() -> None:
    pruner = LevelPruner(nn.Linear(4, 4), [{"op_types": ["default"], "sparsity": 0.5}])
    for name, expected in (("on_train_begin", "no hooks"), ("update_epoch", "schedules"), ("step", r"shrink\(\)")):
        with pytest.raises(OtherToolNameError, match=f"LevelPruner has no '{name}': .*{expected}"):
            getattr(pruner, name)()
    assert not hasattr(pruner, "get_best_result")
    with pytest.raises(AttributeError, match="'LevelPruner' object has no attribute 'nothing'"):
        pruner.nothing  # noqa: B018


KEYWORDS = {
    "mode": "total_sparsity",
    "dummy_input": r"args=\(x,\)",
    "statistics_batch_num": "batches=",
    "trainer": "data=",
    "round_to": "align=",
    "iterative_steps": "rounds",
}


@pytest.mark.parametrize("word", KEYWORDS)
def test_keywords_of_other_tools_say_what_to_use(word: str) -> None:
    model, config = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), [{"op_types": ["Linear"], "sparsity": 0.5}]
    expected = f"no argument '{word}'; expected .* Instead of '{word}': .*{KEYWORDS[word]}"
    with pytest.raises(KeywordError, match=expected):
        L1NormPruner(model, config, **{word: 1})
    with pytest.raises(TypeError, match=expected):
        torchshear.prune(model, (torch.randn(1, 4),), **{word: 1})
    with pytest.raises(KeywordError, match=r"'wrong'; .*model, config_list, .*min_width\.$"):
        L1NormPruner(model, config, wrong=1)


def test_what_is_here_is_in_no_table() -> None:
    for package in (torchshear, torchshear.pruners):
        assert not _other_tools.NAMES.keys() & {*dir(package), *package.__all__}
    assert not _other_tools.METHODS.keys() & set(dir(Pruner))
    assert not _other_tools.KEYWORDS.keys() & inspect.signature(Pruner).parameters.keys()


def test_what_the_table_names_is_here() -> None:
    for text in set(TABLES.values()):
        for path in re.findall(r"torchshear(?:\.\w+)+", text):
            assert pkgutil.resolve_name(path)
        for word in re.findall(r"criterion='(\w+)'", text):
            assert word in torchshear.pruners.registered_criteria()


def test_names_of_pruners_in_the_migration_guide_are_here_or_answer() -> None:
    cells = [line.split("|")[1] for line in MIGRATION.read_text().splitlines() if line.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`([A-Za-z]+Pruner)`", cell)}
    assert len(names) > 20
    assert names <= _other_tools.NAMES.keys()


def test_names_that_stand_in_compat_answer_with_their_place() -> None:
    for package in (nni, neural_compressor, unipruning):
        for name in package.__all__:
            if name in _other_tools.NAMES:
                with pytest.raises(ImportError, match=f"no '{name}': .* in {re.escape(package.__name__)}"):
                    exec(f"from torchshear.pruners import {name}", {})
    classes = {name for name in nni.__all__ if name.endswith("Pruner")}
    functions = {name for name in unipruning.__all__ if not name[0].isupper()}
    assert classes | functions | {*neural_compressor.__all__} <= _other_tools.NAMES.keys()
