"""Reading config lists: words, values, combinations of keys; and the errors that name entry, key and nearest word."""

import copy
import re

import numpy as np
import pytest

from torchshear.configs import parse_config
from torchshear.configs._entry import Where
from torchshear.errors import ArgumentError


def one(config, dialect=None):
    (entry,) = parse_config(config, dialect)
    return entry


def test_first_words_of_nni() -> None:
    entry = one([{"op_types": ["Conv2d"], "sparsity": 0.5}])
    assert entry.dialect == "nni"
    assert (entry.label, entry.where, entry.ratio) == ("config_list[0]", Where(types=("Conv2d",)), 0.5)
    assert (entry.scope, entry.pattern, entry.criterion, entry.excludes) == ("local", "default", None, False)


def test_second_words_of_nni() -> None:
    entry = one([{"op_names": ["a"], "op_partial_names": ["b"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.8}])
    assert entry.where == Where(names=("a",), partials=("b",))
    assert (entry.scope, entry.pool, entry.max_ratio) == ("global", "config_list[0]", 0.8)
    assert one([{"op_names": ["a"], "sparsity_per_layer": 0.25}]).ratio == 0.25
    assert one([{"op_types": ["Conv2d"], "total_sparsity": 0.25}]).max_ratio == 0.99


def test_third_words_of_nni() -> None:
    entry = one(
        {
            "config_list": [
                {
                    "op_names_re": [r"layer1\..*"],
                    "exclude_op_names": ["layer1.0"],
                    "exclude_op_names_re": [".*bn"],
                    "exclude_op_types": ["Linear"],
                    "sparse_ratio": 0.5,
                    "global_group_id": "g",
                    "min_sparse_ratio": 0.1,
                    "max_sparse_ratio": 0.9,
                    "granularity": "in_channel",
                    "target_names": ["weight", "bias"],
                }
            ]
        }
    )
    assert entry.dialect == "nni v3"
    assert entry.where == Where(
        patterns=(r"layer1\..*",), not_names=("layer1.0",), not_patterns=(".*bn",), not_types=("Linear",)
    )
    assert (entry.pool, entry.min_ratio, entry.max_ratio, entry.pattern) == ("g", 0.1, 0.9, "in_channel")


@pytest.mark.parametrize(
    ("granularity", "pattern"),
    [
        ("default", "default"),
        ("out_channel", "out_channel"),
        ("in_channel", "in_channel"),
        ([1, -1], "out_channel"),
        ([-1, 1], "in_channel"),
        ([4, 1], "4x1"),
    ],
)
def test_granularity(granularity, pattern) -> None:
    assert one([{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": granularity}]).pattern == pattern


def test_neural_compressor_defaults() -> None:
    entry = one({"pruning_configs": [{}]})
    assert entry.dialect == "neural_compressor"
    assert (entry.ratio, entry.criterion, entry.pattern, entry.reduce) == (0.9, "snip_momentum", "4x1", "mean")
    assert (entry.pool, entry.min_ratio, entry.max_ratio) == ("pruning_configs[0]", 0.0, 0.98)
    assert entry.where == Where(types=("Conv", "Linear"), are_types_given=False)
    assert one({"target_sparsity": 0.5, "pattern": "4x1"}).ratio == 0.5


def test_a_pruner_comes_before_the_common_keys_and_lists_are_replaced() -> None:
    config = {
        "pruning_configs": [
            {"op_names": ["a"], "excluded_op_names": [], "target_sparsity": 0.25},
            {"pattern": "1xchannel"},
        ],
        "op_names": ["b", "c"],
        "excluded_op_names": ["fc"],
        "target_sparsity": 0.75,
        "pruning_scope": "local",
        "pruning_type": "magnitude",
    }
    first, second = parse_config(config)
    assert (first.where.patterns, first.where.not_patterns, first.ratio) == (("a",), (), 0.25)
    assert (second.where.patterns, second.where.not_patterns, second.ratio) == (("b", "c"), ("fc",), 0.75)
    assert (first.pattern, second.pattern) == ("4x1", "out_channel")
    assert first.criterion == second.criterion == "l1"
    assert first.scope == "local"


@pytest.mark.parametrize(
    ("pattern", "unit"),
    [("channelx1", "in_channel"), ("1xchannel", "out_channel"), ("mha", "heads"), ("1x1", "1x1"), ("8x1", "8x1")],
)
def test_patterns(pattern, unit) -> None:
    assert one([{"pattern": pattern, "target_sparsity": 0.5}]).pattern == unit


def test_what_a_pattern_of_consecutive_inputs_allows() -> None:
    assert one([{"pattern": "2:4", "target_sparsity": 0.5}]).max_ratio == 0.5
    with pytest.raises(ArgumentError, match=r"pruning_configs\[0\]: target_sparsity=0\.9 .* '2:4'.*expected 0\.5"):
        parse_config([{"pattern": "2:4"}])


def test_a_target_above_the_bound_of_a_layer_is_lowered_and_said() -> None:
    entry = one([{"target_sparsity": 0.9, "max_sparsity_ratio_per_op": 0.6}])
    assert entry.ratio == 0.6
    assert entry.notes == ("target_sparsity=0.9 is lowered to max_sparsity_ratio_per_op=0.6",)


def test_keys_of_a_schedule_that_is_one_step_are_read() -> None:
    entry = one([{"start_step": 5, "end_step": 5, "sparsity_decay_type": "cube", "target_sparsity": 0.5}])
    assert entry.notes == ("sparsity_decay_type has no effect where all goes at once",)


CONV = {"op_types": ["Conv2d"]}
WRONG = [
    ([{**CONV, "sparsty": 0.5, "exclude": True}], r"config_list\[0\]: 'sparsty' is no key.*Close to it: sparsity"),
    ([{**CONV, "sparsity": 0.5}, {**CONV, "sparsity": 0.5}], r"config_list\[1\] repeats config_list\[0\]"),
    ([{**CONV, "sparsity": 0.5}, {**CONV, "sparsity": 0.3}], r"config_list\[1\] contradicts config_list\[0\]"),
    ([{**CONV, "sparsity": 1.0}], r"config_list\[0\]: sparsity=1\.0; expected a number in \[0, 1\)"),
    ([{**CONV, "sparsity": -0.1}], r"sparsity=-0\.1; expected"),
    ([{**CONV, "sparsity": float("nan")}], r"sparsity=nan; expected"),
    ([{**CONV, "sparsity": 10**400}], r"sparsity=1000.*\.\.\.; expected"),
    ([{**CONV, "sparsity": True}], r"sparsity=True; expected"),
    ([{**CONV, "sparsity": "0.5"}], r"sparsity='0\.5'.*A number in quotes is a text"),
    ([{**CONV, "sparsity": None}], r"sparsity=None"),
    ([{**CONV}], r"tell whose words|no ratio"),
    ([{"sparsity": 0.5}], r"config_list\[0\] selects no layers"),
    ([{"op_types": [], "sparsity": 0.5}], r"op_types is empty"),
    ([{"op_types": ["A", "A"], "sparsity": 0.5}], r"op_types holds 'A' twice"),
    ([{"op_types": [3], "sparsity": 0.5}], r"op_types holds 3"),
    ([{"op_types": {"a": 1}, "sparsity": 0.5}], r"op_types=\{'a': 1\}; expected a list"),
    ([{**CONV, "sparsity": 0.5, "sparsity_per_layer": 0.5}], r"sparsity and sparsity_per_layer, which say the same"),
    ([{**CONV, "sparsity": 0.5, "exclude": True}], r"config_list\[0\] excludes layers and has 'sparsity' as well"),
    ([{**CONV, "exclude": False}], r"exclude=False: NNI excludes on any value"),
    ([{**CONV, "sparsity": 0.5}, {"op_names": ["a"], "sparse_ratio": 0.5}], r"'sparsity', a word of NNI 1 and 2"),
    ([{**CONV, "sparsity": 0.5, "max_sparsity_per_layer": 0.8}], r"total_sparsity, which is not there"),
    ([{**CONV, "total_sparsity": 0.5, "max_sparsity_per_layer": 0.3}], r"each layer shall lose 0\.0 to 0\.3"),
    ([{**CONV, "total_sparsity": 0.5, "max_sparsity_per_layer": {"a": 1}}], r"max_sparsity_per_layer=\{'a': 1\}"),
    ([{**CONV, "sparse_ratio": 0.5, "min_sparse_ratio": 0.3}], r"min_sparse_ratio bounds shares of a global_group_id"),
    ([{**CONV, "sparse_threshold": 0.5}], r"sparse_threshold=0\.5: thresholds belong to movement pruning"),
    ([{**CONV, "sparse_ratio": 0.5, "granularity": "per_chanel"}], r"granularity='per_chanel'; expected"),
    ([{**CONV, "sparse_ratio": 0.5, "granularity": [1, [2]]}], r"granularity=\[1, \[2\]\]; expected"),
    ([{**CONV, "sparsity": 16**5000}], r"sparsity=a number of thousands of digits; expected"),
    ([{**CONV, "sparse_ratio": 0.5, "op_names_re": ["("]}], r"'\(' is no regular expression"),
    ([{**CONV, "sparse_ratio": 0.5, "target_names": ["in_"]}], r"target_names=\['in_'\]; expected weight"),
    (
        [{**CONV, "sparse_ratio": r, "global_group_id": "g", "op_names": [n]} for r, n in ((0.5, "a"), (0.4, "b"))],
        r"config_list\[1\] and config_list\[0\] share the pool 'g'",
    ),
    ([{**CONV, "initial_sparsity": 0.0, "final_sparsity": 0.8}], r"initial_sparsity=0\.0: .*follows no schedule"),
    (
        [{**CONV, "sparsity": 0.5, "pattern": "4x1"}],
        r"mixes words: 'op_types' of nni and 'pattern' of neural_compressor",
    ),
    ([{"op_names": ["a"]}], r"the keys op_names do not tell whose words"),
    ([{"target_sparsity": 0.5, "filter_lower_threshold": 32}], r"of UniPruning.*read_unipruning_config"),
    ([{"target_sparsity": 0.5, "op_nmes": ["a"]}], r"pruning_configs\[0\]: 'op_nmes' is no key.*Close to it: op_names"),
    ([{"pattern": "channelx2"}], r"pruning_configs\[0\]: pattern='channelx2'.*Close to it: channelx1"),
    ([{"pattern": "4:2"}], r"pattern='4:2'"),
    ([{"pattern": "0x1"}], r"pattern='0x1'"),
    ([{"pruning_type": "snip_momentum_progressive"}], r"follows a schedule"),
    ([{"pruning_type": "sparse_gpt"}], r"pruning_type='sparse_gpt' needs"),
    ([{"parameters": {"reg_coeff": np.zeros(2)}, "pattern": "4x1"}], r"parameters=.*regularisers act"),
    ([{"pruning_type": "magnitud"}], r"Close to it: magnitude"),
    ([{"start_step": 1, "end_step": 5}], r"pruning_configs\[0\]: start_step=1 and end_step=5 ask for a schedule"),
    ([{"start_step": 5, "end_step": 1}], r"start_step=5 is behind end_step=1"),
    ([{"pruning_scope": "globl"}], r"pruning_scope='globl'; expected one of global, local\. Close to it: global"),
    ([{"reg_type": "group_lasso", "pattern": "4x1"}], r"reg_type='group_lasso': regularisers"),
    (
        [{"min_sparsity_ratio_per_op": 0.9, "max_sparsity_ratio_per_op": 0.5}],
        r"min_sparsity_ratio_per_op=0\.9 is above",
    ),
    ([{"pattern": "1xchannel", "criterion_reduce_type": "max"}], r"criterion_reduce_type='max' where units are whole"),
    ([{"target_sparsity": 0.5}, {"target_sparsity": 0.5}], r"pruning_configs\[1\] repeats"),
    ([], r"the config is an empty list; expected at least one entry"),
    ([{**CONV, "sparsity": 0.5}, 3], r"entry 1 of the config is int; expected a mapping"),
    ([{}], r"entry 0 of the config is empty; expected a mapping"),
    ("text", r"the config is str"),
    ({"config_list": []}, r"config_list is \[\]; expected a list of at least one"),
    ({"config_list": 3}, r"config_list is 3"),
    ({"pruning_configs": []}, r"pruning_configs is \[\]"),
    ({"config_list": [[1]]}, r"config_list\[0\] is \[1\]; expected an NNI entry"),
]


@pytest.mark.parametrize(("config", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_refused(config, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_config(config)


def test_dialect_is_said() -> None:
    assert one([{"op_names": ["a"]}], "neural_compressor").ratio == 0.9
    with pytest.raises(ArgumentError, match=re.escape("config_list[0] says no ratio")):
        parse_config([{"op_names": ["a"]}], "nni")
    with pytest.raises(ArgumentError, match="dialect='nnii'.*Close to it: nni"):
        parse_config([{"op_names": ["a"]}], "nnii")


def test_configs_are_independent_and_left_alone() -> None:
    first = {"pruning_configs": [{"op_names": ["a"], "excluded_op_names": ["b"]}], "target_sparsity": 0.3}
    before = copy.deepcopy(first)
    (one_entry,) = parse_config(first)
    assert first == before
    (other,) = parse_config({"pruning_configs": [{}]})
    assert (other.ratio, other.where.patterns, other.where.not_patterns) == (0.9, (), ())
    first["pruning_configs"][0]["op_names"].append("c")
    assert one_entry.where.patterns == ("a",)
