"""Inputs that exercise a model are drawn within what it takes."""

import pytest
import torch
from torch import Tensor, nn

import torchshear
from torchshear.errors import ArgumentError
from torchshear.graph import ExampleInputs
from torchshear.speedup._random_values import check_examples, random_inputs, table_sizes


class Lookup(nn.Module):
    """Tokens of one table, positions of another, a mask and lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.out = nn.Embedding(50, 8), nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor, places: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        x = self.tokens(tokens.view(-1, 7)) + self.places(places.to(torch.long))
        return self.out((x * mask.unsqueeze(-1)).sum(1) / lengths.unsqueeze(-1))


EXAMPLE = ExampleInputs.of(
    (
        torch.zeros(4, 7, dtype=torch.long),
        torch.zeros(4, 7, dtype=torch.int32),
        torch.ones(4, 7, dtype=torch.long),
        torch.full((4,), 7),
    )
)


def test_the_tables_behind_integers_are_found() -> None:
    graph = torchshear.trace(Lookup().eval(), EXAMPLE.args)
    assert table_sizes(graph) == {0: 50, 1: 7}


def test_integers_run_over_their_tables_and_masks_have_both_values() -> None:
    drawn = random_inputs(EXAMPLE, {0: 50, 1: 7}, lambda inputs: True, seed=0).args
    assert len(drawn[0].unique()) > 15
    assert (int(drawn[0].min()), int(drawn[1].max())) >= (0, 6)
    assert drawn[1].dtype == torch.int32
    assert drawn[2].unique().tolist() == [0, 1]
    assert drawn[2][:, 0].all(), "no row is empty"
    assert torch.equal(drawn[3], EXAMPLE.args[3])


def test_what_the_model_does_not_take_is_drawn_with_more_care() -> None:
    example = ExampleInputs.of((torch.tensor([3, 1, 2, 9]), torch.randn(4, 2)))
    as_set = lambda inputs: sorted(inputs.args[0].tolist()) == [1, 2, 3, 9]  # noqa: E731
    drawn = random_inputs(example, {}, as_set, seed=0).args
    assert sorted(drawn[0].tolist()) == [1, 2, 3, 9]
    assert not torch.equal(drawn[1], example.args[1])
    kept = random_inputs(example, {}, lambda inputs: inputs.args[0].tolist() == [3, 1, 2, 9], seed=0).args
    assert torch.equal(kept[0], example.args[0])
    assert not torch.equal(kept[1], example.args[1])


def test_floating_masks_keep_their_two_values() -> None:
    mask = torch.tensor([[0.0, 0.0, -1e9, 0.0], [0.0, -1e9, -1e9, 0.0]])
    drawn = random_inputs(ExampleInputs.of((mask,)), {}, lambda inputs: True, seed=3).args[0]
    assert set(drawn.unique().tolist()) <= {0.0, float(mask.min())}
    assert not torch.equal(drawn, mask)


def test_truth_values_and_complex_numbers_are_drawn() -> None:
    example = ExampleInputs.of((torch.ones(3, 40, dtype=torch.bool), torch.zeros(5, dtype=torch.complex64)))
    first, second = random_inputs(example, {}, lambda inputs: True, seed=0).args
    assert 0.4 < float(first.float().mean()) < 0.95
    assert second.dtype == torch.complex64
    assert second.imag.abs().min() > 0


@pytest.mark.parametrize(
    ("tensor", "said"),
    [(torch.zeros(0, 3), r"has shape \(0, 3\) and so no values"), (torch.empty(2, device="meta"), "meta")],
)
def test_examples_without_values_are_refused(tensor: Tensor, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        check_examples(ExampleInputs.of((torch.ones(2), tensor)))
