"""The configuration of UniPruning, whose target says what is kept."""

import numpy as np
import pytest

from torchshear.compat.unipruning import read_unipruning_config
from torchshear.errors import ArgumentError


def test_the_target_is_what_is_kept() -> None:
    given = {
        "frequency": 5,
        "target_sparsity": 0.75,
        "pruning_step": 16,
        "filter_lower_threshold": 24,
        "input_size": [2, 3, 32, 32],
        "prune_flag": 1,
        "rank": 0,
        "device_target": "Ascend",
    }
    config = read_unipruning_config(given)
    assert config.params_kept == 0.75
    assert config.params_ratio == 0.25
    assert (config.run, config.min_width, config.frequency) == (16, 24, 5)
    assert config.input_size == (2, 3, 32, 32)
    assert config.is_on
    assert "keeps 75.0% of the parameters" in str(config)
    assert "25.0% removed" in str(config)
    assert "device_target has no effect here" in config.notes
    assert (config.rank, config.exp_name, config.output_path) == (0, "unipruning", None)


def test_defaults_and_the_clearer_word() -> None:
    config = read_unipruning_config({"keep_ratio": 1.0, "prune_flag": 0})
    assert (config.params_kept, config.run, config.min_width, config.frequency) == (1.0, 32, 32, 9)
    assert not config.is_on
    assert not config.notes
    assert "nothing is pruned" in str(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config has neither; expected exactly one"),
        ({"target_sparsity": 0.5, "keep_ratio": 0.5}, "target_sparsity and keep_ratio"),
        ({"target_sparsity": 0.0}, "expected a number in"),
        ({"target_sparsity": 0.5, "pruning_steps": 3}, "'pruning_steps' is no key.*pruning_step"),
        ({"target_sparsity": 0.5, "pruning_step": 0}, "an integer of at least 1"),
        ({"target_sparsity": 0.5, "input_size": [1, -3]}, "input_size=-3"),
        ({"target_sparsity": 0.5, "input_size": 3}, "the shape of an example input"),
        ({"target_sparsity": 0.5, "prune_flag": 2}, "expected 0 or 1"),
        ({"target_sparsity": 0.5, "prune_flag": np.array([0, 1])}, "expected 0 or 1"),
        ([("target_sparsity", 0.5)], "expected a UniPruning config"),
    ],
)
def test_what_is_refused(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        read_unipruning_config(config)
