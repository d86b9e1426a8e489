"""Networks that defeat index-guessing pruners, by number: which units go together, and that nothing but them goes.

Source: the public code of Torch-Pruning 1.6.1 and its issue threads, from which 41 small networks were derived that a
tool without axes (one implicit channel index, matched by position) cannot prune correctly. The networks are those of
`tests/cases`. The widths of their groups of units are written down here: which channels are free to go, which go in
pairs, and which are shared.
"""

import pytest
import torch

import torchshear
from tests.cases import CASES, Case
from tests.oracle import assert_equals_masked, assert_outputs_equal

# Number -> network -> widths of its groups. A group is a set of units of which each may go by itself: a product such as
# heads and head dimensions is two groups, a channel that a gate or a shortcut reads again is one unit.
WIDTHS: dict[int, dict[str, list[int]]] = {
    1: {"cat_with_input": [16], "nerf_skip": [32, 32, 32], "unet": [16, 16, 16, 24, 24, 24, 32]},
    2: {"chunk_swapped": [8, 8]},
    3: {"uneven_split": [4, 8, 10]},
    4: {"split_reordered": [10, 12, 16, 20]},  # the first two parts share a convolution
    5: {"c2f": [16, 16, 16, 16, 16, 32]},
    6: {"split_iterated": [8, 8, 8, 16]},
    7: {"flip": [6, 16], "roll": [16]},
    8: {"shuffle_view": [6, 6, 12, 12, 12], "shuffle_module": [8, 24]},
    9: {"nhwc_flatten": [16]},
    10: {"tokens_flatten": [12]},
    11: {"flatten_and_tokens": [12, 20]},
    12: {"pixel_shuffle": [12, 16], "pixel_unshuffle": [8], "space_to_depth": [8]},  # 12 blocks of 2 x 2 channels
    13: {"glu_module": [12, 16]},  # a value goes with its gate
    14: {"qkv_chunk": [16, 16]},  # q with k, and v
    15: {"linear_branches": [12, 20]},
    16: {"token_split": [24]},
    17: {
        "qkv_unbind_sdpa": [4, 6, 24],  # heads, head dimensions, stream
        "qkv_select_explicit": [4, 6, 24],
        "qkv_unbind_explicit": [4, 6, 24],
        "vit": [4, 6, 24, 96],
    },
    18: {
        "attention_unequal_widths": [2, 4, 6],  # heads, d_qk, d_v
        "einsum_cross": [8, 12],
        "mixer": [20, 24, 48],
        "mixer_normed": [20, 24],
    },
    19: {"gqa_repeat": [2, 2, 6, 6], "gqa_expand": [2, 2, 6, 6]},  # key heads, queries of each, d_qk, d_v
    20: {"gate_one_channel": [24], "cbam": [8, 16, 24]},
    21: {"channel_pool": [8, 24]},
    22: {"raw_parameters": [16, 24]},
    23: {"position_map": [16]},
    24: {"buffer_mean": [20], "frozen_batch_norm": [24, 32]},
    25: {"dncnn": [24, 24]},
    26: {"frozen_branch": [16, 24], "frozen_backbone": [16, 16, 32]},
    27: {"detached_gate": [24], "no_grad_part": [16, 24]},
    28: {"tied_embedding": [24, 40], "tied_transpose": [30], "tied_convolutions": [16]},
    29: {
        "weight_norm": [16, 24],
        "standardized_weights": [16, 24],
        "spectral_norm": [16, 24],
        "linalg_householder_product": [],
    },
    30: {"grouped_narrowing": [8]},  # four blocks of two inputs; the one output of each block stays
    31: {"depthwise_multiplier": [2, 16, 20]},  # the multiplier is a factor of its own
    32: {"grouped_transposed": [16, 24]},
    33: {"instance_norm": [16, 24], "layer_norm_chw": [16], "rms_norm": [24, 40]},
    34: {"group_norm_after_grouped": [12, 24], "group_norm_residual": [32]},
    # One group for all layers and directions of a call: their units are free, their numbers are equal.
    35: {"lstm": [16], "gru": [32], "rnn": [16], "lstm_final_states": [24, 64]},
    36: {"causal_crop": [16, 24], "temporal_stride": [12, 16]},
    37: {"returns_none": [16]},
    38: {"final_cat": [24]},
    39: {"pad_shortcut": [16, 16, 16, 32, 32], "unfold": [8], "repeat": [2, 12], "stack_view": [12]},
    40: {"several_inputs": [16]},
    41: {"glu_chunk": [24], "swiglu": [32], "multihead_attention": [4, 6, 24]},
}

NUMBERED = {case.number: [other for other in CASES if other.number == case.number] for case in CASES if case.number}


def test_all_41_are_here() -> None:
    assert sorted(NUMBERED) == list(range(1, 42)) == sorted(WIDTHS)
    for number, cases in NUMBERED.items():
        assert {case.name for case in cases} == WIDTHS[number].keys(), number


@pytest.mark.parametrize("number", range(1, 42), ids=lambda number: f"case{number:02d}")
def test_case(number: int) -> None:
    for case in NUMBERED[number]:
        _check(case, WIDTHS[number][case.name])


def _check(case: Case, widths: list[int]) -> None:
    model, args, kwargs = case.build()
    groups = torchshear.analyze(torchshear.trace(model, args=args, kwargs=kwargs))
    assert sorted(group.width for group in groups.prunable) == widths, case.id
    result = torchshear.prune(model, args=args, kwargs=kwargs, ratio=0.5)
    masks = result.plan.masks()
    if case.expect == "refused":
        assert not masks
        assert case.name in str(result.report), "the operator that forbids it is named"
        assert_outputs_equal(result.model(*args, **kwargs), model(*args, **kwargs), 1e-12)
        return
    for group in result.plan.groups:
        n_blocks = groups[group.name].n_blocks
        asked = -(-group.width // 2)
        assert abs(len(group.kept) - asked) < n_blocks or len(group.kept) == group.width, (case.id, group.name)
    before = {name: parameter.numel() for name, parameter in model.named_parameters()}
    expected = sum(int(masks[name].sum()) if name in masks else n for name, n in before.items())
    assert sum(parameter.numel() for parameter in result.model.parameters()) == expected < sum(before.values())
    assert result.verification.dtype is torch.float64
    assert result.verification.max_error <= 1e-9
    if case.expect == "exact":
        assert_equals_masked(model, result.model, result.plan, args, kwargs)
